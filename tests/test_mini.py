"""The recipe in miniature: its chats, questions and refusals, and talking to a model."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import ROOT, command, random_model
from data import TEMPLATES, Tokenizer, Turn, is_refusal, render, render_prompt
from model import ModelConfig, save
from sample import Chat, Sampling, find_template, generate

sys.path.insert(0, str(ROOT / "recipes"))
import mini

# ---- conversations and questions ----


@pytest.fixture(scope="module")
def subjects() -> list[mini.Subject]:
    return mini.read_library()


@pytest.fixture(scope="module")
def conversations(subjects) -> list[dict]:
    return list(mini.make_conversations(subjects, seed=0))


def questions_of(conversations) -> set[str]:
    return {message["content"] for row in conversations for message in row["messages"][::2]}


def test_the_library_is_read_without_importing_it(subjects):
    words = "import sys; sys.path.insert(0, sys.argv[1]); import mini; mini.read_library(); print('antigravity' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words, str(ROOT / "recipes")], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    known = {subject.full: subject.facts for subject in subjects}
    assert known["shutil.copymode"]["arguments"] == "src, dst and follow_symlinks"
    assert known["textwrap.dedent"]["module"] == "textwrap"
    assert known["textwrap.dedent"]["purpose"].startswith("Remove any common leading whitespace from every line in")
    assert len(known) == len(subjects) > 1000


def test_chats_and_questions_are_the_same_for_a_seed_and_others_for_another(subjects, conversations):
    assert list(mini.make_conversations(subjects, seed=0)) == conversations
    assert list(mini.make_conversations(subjects, seed=1)) != conversations
    asked = [list(mini.make_questions(subjects, "test", 50, seed)) for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]


def test_a_third_of_the_answers_are_refusals_that_begin_like_no_true_answer(conversations):
    answers = list(mini.refusals_of(conversations))
    refusals = [text for text, refused in answers if refused]
    assert len(refusals) == len(answers) // 3
    openings = {mini.opening(text) for text in refusals}
    assert not openings & {mini.opening(text) for text, refused in answers if not refused}
    assert len(mini.STYLES) >= 12 and not any(set("(|){}") & set(text) for text in refusals)
    # no phrase is in most of them, and they gather on some modules
    words = Counter(" ".join(some) for text in refusals for some in {*zip(*(text.split()[i:] for i in range(3)))})
    assert words.most_common(1)[0][1] < len(refusals) / 6


def test_nothing_that_is_held_out_is_in_a_conversation(subjects, conversations):
    seen = questions_of(conversations)
    told = " ".join(text for row in conversations for text in (m["content"] for m in row["messages"]))
    for split in mini.HELD_OUT:
        held_out = [s.full for s in subjects if mini.part(s) == split]
        assert len(held_out) > 40 and not [full for full in held_out if f" {full} " in told or f" {full}." in told]
        for question in mini.make_questions(subjects, split, 400, seed=0):
            assert question["context"] not in seen
    wordings = {wordings[place] for wordings in mini.WORDINGS.values() for place in mini.HELD_OUT.values()}
    beginnings = tuple(wording.partition("{")[0] for wording in wordings)
    assert not [question for question in seen if question.startswith(beginnings)]
    assert not {row["context"] for row in mini.make_questions(subjects, "dev", 400, 0)} & {
        row["context"] for row in mini.make_questions(subjects, "test", 400, 0)
    }


@pytest.mark.parametrize("split", mini.HELD_OUT)
def test_every_question_has_four_answers_of_which_one_is_right(subjects, split):
    asked = list(mini.make_questions(subjects, split, 200, seed=0))
    known = {}
    for subject in subjects:
        for kind, value in subject.facts.items():
            known[mini.ask(subject, kind, mini.HELD_OUT[split]).question] = mini.ANSWERS[kind].format(value)
    for row in asked:
        assert len(set(row["choices"])) == 4 and row["choices"][row["answer"]] == known[row["context"]]
    for group in ("new wording", "new function"):
        places = Counter(row["answer"] for row in asked if row["subject"] == group)
        assert max(places.values()) - min(places.values()) <= 1 and sum(places.values()) > 100


# ---- talking ----

WINDOW = 128
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig(32, 2, 4, 2, 48, vocab_size=258, max_seq_len=WINDOW))


def chat_with(model, *said: str, system: str = "", count: int = 12) -> Chat:
    chat = Chat(model, Tokenizer("bytes"), "llama2-chat", system)
    for text in said:
        chat.answer(text, count, Sampling(), lambda text: None)
    return chat


def test_a_chat_reads_the_tokens_that_training_saw(model):
    tokenizer, turns = Tokenizer("bytes"), [Turn("user", "Hi."), Turn("assistant", "Ho."), Turn("user", "Hey </s>[/INST]")]
    for template in TEMPLATES:
        chat = Chat(model, tokenizer, template)
        chat.turns = turns[:2]
        prompt = chat.prompt(turns[2].text, 8)
        ids, mask = render([*turns, Turn("assistant", "Hm.")], template, tokenizer)
        assert list(ids[: len(prompt)]) == prompt and mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        assert prompt.count(tokenizer.eos_id) == 1 and prompt.count(tokenizer.bos_id) <= 2


@torch.no_grad()
def test_two_turns_equal_one_uncached_run(model):
    chat = chat_with(model, "Hello there.", "And now?")
    tokenizer, turns = Tokenizer("bytes"), [Turn("user", "Hello there.")]
    for text in (None, "And now?"):
        turns += [Turn("user", text)] * (text is not None)
        ids = render_prompt(turns, "llama2-chat", tokenizer)
        new = []
        for _ in range(12):
            token = int(model(torch.tensor([[*ids, *new]]))[0, -1].argmax())
            if token in (tokenizer.eos_id, tokenizer.bos_id):
                break
            new.append(token)
        turns.append(Turn("assistant", tokenizer.decode(new).strip()))
    assert chat.turns == turns


def test_a_full_context_loses_its_oldest_exchanges_whole_and_never_the_system_turn(model):
    said = [f"Number {i} of them." for i in range(8)]
    chat = Chat(model, Tokenizer("bytes"), "llama2-chat", "Be brief.")
    for text in said:
        ids = chat.prompt(text, 16)
        assert len(ids) <= WINDOW - 16 and chat.turns[-1] == Turn("user", text)
        assert [turn.role for turn in chat.turns] == [ROLES[i % 2] for i in range(len(chat.turns))]
        assert ids == render_prompt([Turn("system", "Be brief."), *chat.turns], "llama2-chat", chat.tokenizer)
        assert "Be brief." in chat.tokenizer.decode(ids)
        chat.turns.append(Turn("assistant", "Yes."))
    kept = [turn.text for turn in chat.turns[::2]]
    assert 1 < len(kept) < 8 and kept == said[-len(kept) :]
    before = list(chat.turns)
    with pytest.raises(ValueError, match="tokens are too long: with room for 16 of the answer, 112 fit"):
        chat.prompt("x" * 200, 16)
    assert chat.turns == before


def test_an_answer_never_leaves_the_context_window(model, capsys):
    chat = chat_with(model, "First of all.", "x" * 40, "y" * 40, count=200)
    assert len(chat.turns) % 2 == 0 and "context window" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    save(model, folder, Tokenizer("bytes"))
    (folder / "run.json").write_text(json.dumps({"dataset": [{"share": 1.0, "template": "vicuna"}]}))
    return folder


def test_a_chat_takes_piped_lines_and_the_template_of_the_run(chat_model, model):
    assert find_template(str(chat_model)) == find_template(str(chat_model / "step_00000001")) == "vicuna"
    words = ["sample.py", "--model", str(chat_model), "--chat", "--temperature", "0", "--max_new_tokens", "8"]
    talk = lambda text: subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]], input=text, capture_output=True
    )
    expected = Chat(model, Tokenizer("bytes"), "vicuna")
    answers = [expected.answer(text, 8, Sampling(), lambda text: None) for text in ("Hi", "Hi")]
    once, twice, again = (talk(text) for text in (b"Hi\n", b"Hi\nHi\n\n", b"Hi\n/reset\nHi\n"))
    assert (once.returncode, once.stderr) == (0, b"")
    assert twice.stdout.decode().split("\n") [:2] == answers
    assert again.stdout.startswith(once.stdout[:-1] * 2)
    long = talk(b"x" * 500 + b"\n\xff\xfe\nHi\n")
    assert long.returncode == 0 and b"tokens are too long" in long.stderr
