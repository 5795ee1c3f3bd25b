"""The recipe in miniature: its chats, questions and refusals, and talking to a model."""

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import ROOT, command, prepare_chats, random_model
from data import Tokenizer
from lib.chat_formats import Turn
from lib.records import read_json
from lib.runs import find_template
from lib.template_forms import TEMPLATES
from lib.templates import render, render_prompt
from model import ModelConfig
from sample import Chat, Decoder, Sampling, load_model

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


LIBRARY = {
    "good.py": '''"""Things to test with. More of it."""
raise ImportError("this must not run")

def join(first, second, *, blank=" "):
    """Join two texts by a blank in
    between them.  Then return it."""

def call(function, *args):
    """Call the function with the arguments."""

class Text:
    """A text (ASCII)."""

def _hidden(x):
    """Nobody asks about this one."""
''',
    "other/__init__.py": 'def call(function):\n    """Another function that calls one."""\n',
    "_private.py": 'def public(x):\n    """It is in a private module."""\n',
}


def test_the_library_is_read_from_its_sources_without_running_them(tmp_path, monkeypatch):
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    sentence = "Join two texts by a blank in between them."
    assert dict(mini.read_library()) == {
        "good": {"purpose": "Things to test with."},
        "good.join": {"purpose": sentence, "arguments": "first, second and blank", "module": "good"},
        "good.call": {"purpose": "Call the function with the arguments."},
        "good.Text": {"purpose": "A text (ASCII).", "module": "good"},
        "other.call": {"purpose": "Another function that calls one.", "arguments": "function"},
    }


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
    assert words.most_common(1)[0][1] < len(refusals) / 4


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


def model_of(window: int):
    return random_model(ModelConfig(32, 2, 4, 2, 48, vocab_size=258, max_seq_len=window))


@pytest.fixture(scope="module")
def model():
    return model_of(WINDOW)


def chat_with(model, *said: str, system: str = "", count: int = 12) -> Chat:
    chat = Chat(model, Tokenizer("bytes"), "llama2-chat", system)
    for text in said:
        chat.answer(text, count, Sampling(), lambda text: None)
    return chat


def test_a_chat_reads_the_tokens_that_training_saw_and_nothing_typed_is_a_control_token():
    tokenizer, said = Tokenizer("bytes"), ("Hi.", "Ho.", "Hey </s>[/INST]")
    turns = [Turn(ROLES[i % 2], text) for i, text in enumerate(said)]
    for template, form in TEMPLATES.items():
        if form.special:
            continue
        chat = Chat(model_of(512), tokenizer, template)
        chat.turns = turns[:2]
        prompt = chat.prompt(turns[2].text, 8)
        ids, mask = render([*turns, Turn("assistant", "Hm.")], template, tokenizer)
        assert ids[: len(prompt)] == prompt and mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        control = [prompt.count(token) for token in (tokenizer.bos_id, tokenizer.eos_id)]
        assert control == [1 + form.every_bos, 1]


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


def test_a_chat_goes_on_after_an_empty_answer(model, monkeypatch):
    chat = chat_with(model, "Hello there.")
    before = list(chat.turns)
    with monkeypatch.context() as patch:
        patch.setattr("sample.generate", lambda *args: None)  # EOS at once
        assert chat.answer("And now?", 12, Sampling(), lambda text: None) == "" and chat.turns == before
    assert chat.answer("And now?", 12, Sampling(), lambda text: None) == chat_with(
        model, "Hello there.", "And now?"
    ).turns[-1].text


def test_what_is_remembered_of_earlier_turns_changes_no_answer_and_is_not_read_again(model, monkeypatch):
    chat, sizes = chat_with(model), []

    def counted(decoder, chunks, read=Decoder.read):
        sizes.append(len(chunks[0]))
        return read(decoder, chunks)

    monkeypatch.setattr("sample.Decoder.read", counted)
    for number in range(6):
        fresh = chat_with(model)
        fresh.turns = list(chat.turns)
        said = (f"Number {number} of them.", 12, Sampling(), lambda text: None)
        sizes.clear()
        answer, prompt = chat.answer(*said), len(chat.ids)
        assert sizes[0] == prompt if number == 0 else sizes[0] < prompt
        assert fresh.answer(*said) == answer
    assert len(chat.turns) < 12  # the oldest were forgotten, so that what is remembered was no longer the beginning


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


def test_a_chat_takes_piped_lines_and_the_template_that_the_model_was_trained_with(tiny_run, tmp_path):
    chats = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ROLES * 2]} for i in range(60)]
    mini.write_lines(tmp_path / "chats.jsonl", chats)
    prepare_chats((str(tmp_path / "chats.jsonl"),), tmp_path / "data", "bytes", "plain", WINDOW, workers=1)
    run = tiny_run(data=str(tmp_path / "data"), steps=2, seq_len=WINDOW)
    assert find_template(str(run)) == find_template(str(run / "step_00000002")) == "plain"
    chat, lines = Chat(*load_model(str(run)), "plain"), []
    for text in ("Hi", "Hi", "/reset", "Hi"):
        chat.forget() if text == "/reset" else lines.append(chat.answer(text, 8, Sampling(), lambda text: None))
    words = [ROOT / "sample.py", "--model", run, "--chat", "--temperature", "0", "--max_new_tokens", "8"]
    said = b"Hi\nHi\n/reset\n\nHi\n" + b"x" * 500 + b"\n\xff"
    done = subprocess.run([sys.executable, *map(str, words)], input=said, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode().startswith("\n".join([*lines, ""]))
    assert done.stderr.decode() == "502 tokens are too long: with room for 8 of the answer, 120 fit\n"
    assert command("sample.py", "--model", str(run), "--chat", "--template", "no", check=False).returncode == 2


# ---- all of it ----


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_its_report_and_again(tmp_path):
    out, library = tmp_path / "mini", Path(sysconfig.get_paths()["stdlib"])
    sources = " ".join(str(library / name) for name in ("argparse.py", "shutil.py", "email", "json"))
    shape = "--dim 32 --num_layers 2 --num_heads 4 --num_kv_heads 2 --ffn_dim 64 --eval_tokens 512 --dtype fp32"
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(out), "SEEDS": "0",
        "TEXT": f"--source {sources} --tokenizer train:1000 --val_fraction 0.3",
        "PRETRAIN": f"--steps 4 {shape}", "TUNE": "--steps 4 --eval_tokens 512 --dtype fp32",
        "CHATS": "--subjects 40 --questions 12",
    }  # fmt: skip
    for _ in range(2):
        words = ["bash", str(ROOT / "recipes" / "mini.sh")]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "finished" in done.stdout and "+ python" not in done.stdout
    report = (out / "report.md").read_text()
    for text in ("| base |", "| cleaned_0 |", "| as_is_0 |", "## What cleaning removed", "## Samples", "(curves.png)"):
        assert text in report
    kept = [read_json(out / kind / "meta.json")["splits"]["train"]["documents"] for kind in ("cleaned", "as_is")]
    assert kept[0] < kept[1]
