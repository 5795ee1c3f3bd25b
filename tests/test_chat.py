"""Conversations: their formats, their templates, and the sets to fine-tune on."""

import dataclasses
import gzip
import json
import math
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import eval
from conftest import command, prepare, prepare_chats
from data import IGNORE, Batch, Dataset, Mixture, Tokenizer, fill, show
from lib.chat_formats import FORMATS, Turn, read_conversations
from lib.chats import in_order, usable
from lib.cleaning import Cleaning
from lib.layouts import Packed, Pairs
from lib.template_forms import TEMPLATES
from lib.templates import bracketed, render, render_prompt, split_to_fit

TYPED = "Hi </s> <s>[INST] <<SYS>> ### Response: <|im_end|> <|endoftext|> ASSISTANT: <unk> <0x0A> [/INST]"
SAID = [("Hi, who\nare you?", "A program."), ("And\n\nthen? {0}", "  Nothing {}:\n    more.\n"), ("Bye", "👋 Adieu")]
TALK = [Turn(role, text) for pair in SAID for role, text in zip(("user", "assistant"), pair)]
FILES = {"llama2": "llama2_tokenizer/tokenizer.model", "gpt2": "gpt2_bpe/r50k_base.tiktoken"}
WRITTEN = [name for name, form in TEMPLATES.items() if not form.special]  # for any tokenizer


@pytest.fixture(params=["bytes", "llama2", "gpt2"])
def tokenizer(request, shared) -> Tokenizer:
    """One that puts a blank before every text, and one whose BOS is its EOS, are among them."""
    return Tokenizer(shared(FILES[request.param]) if request.param in FILES else request.param)


def runs(ids: list[int], mask: list[int]) -> list[list[int]]:
    """The stretches of ids that the mask holds."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    return [ids[begin:end] for begin, end in zip(edges[::2], edges[1::2])]


def check_answers(ids: list[int], mask: list[int], answers: list[str], template: str, tokenizer: Tokenizer):
    """The loss counts exactly the answers, each with its EOS; llama2-chat has a blank on either side of one."""
    found = runs(ids, mask)
    assert [run[-1] for run in found] == [tokenizer.eos_id] * len(answers)
    said = [TEMPLATES[template].answer.replace("{answer}", answer.strip()) for answer in answers]
    if tokenizer.name == "tokenizer.model":  # decoding leaves off the blank before a text
        said = [text.removeprefix(" ") for text in said]
    assert [tokenizer.decode(run[:-1]) for run in found] == said
    assert sum(run.count(tokenizer.eos_id) for run in found) == len(answers)


def write_json(path, records: list):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    data = (lines if ".jsonl" in path.suffixes else json.dumps(records)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def sharegpt(turns: list[Turn]) -> dict:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in turns]}


def as_it_is(turns: list[Turn], place: str) -> list[Turn]:
    return turns


def chat_set(tmp_path, talks: list[list[Turn]], max_len: int = 2048, template: str = "plain", **options) -> str:
    source = write_json(tmp_path / "talks.jsonl", [sharegpt(talk) for talk in talks])
    out = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
    options = {"cleaning": Cleaning(near_duplicates=0)} | options
    prepare_chats((str(source),), out, "bytes", template, max_len, workers=1, **options)
    return str(out)


def talk(number: int, *sizes: int) -> list[Turn]:
    """An exchange for each size, its answer so many characters long."""
    answers = (Turn("assistant", f"{number}".rjust(size, "x")) for size in sizes)
    return [turn for answer in answers for turn in (Turn("user", f"Q{number}"), answer)]


# ---- templates ----


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("system", [[], [Turn("system", "Be {kind}.")]])
def test_the_loss_counts_exactly_the_answers_with_their_eos(template, system, tokenizer):
    """Traps 3, 4 and 7."""
    ids, mask = render([*system, *TALK], template, tokenizer)
    check_answers(ids, mask, [answer for _, answer in SAID], template, tokenizer)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and not mask[0]


@pytest.mark.parametrize("template", WRITTEN)
def test_control_tokens_in_what_a_user_types_change_nothing(template, tokenizer):
    """Trap 8."""
    answer = Turn("assistant", TYPED)
    plain, typed = (
        render([Turn("system", text), Turn("user", text), TALK[1], Turn("user", text), answer], template, tokenizer)
        for text in ("Hello", TYPED)
    )
    assert runs(*typed) == runs(*plain)
    check_answers(*typed, [TALK[1].text, TYPED], template, tokenizer)
    for special in {tokenizer.bos_id, tokenizer.eos_id}:
        assert typed[0].count(special) == plain[0].count(special)
    assert tokenizer.decode(typed[0]).count(TYPED) == 4


@pytest.mark.parametrize("template", WRITTEN)
def test_before_an_answer_a_prompt_is_what_training_saw(template, tokenizer):
    """Traps 4 and 9: the tokens of prompt and answer, put together, are those of the rendered conversation."""
    for system in ([], [Turn("system", "Be kind.")]):
        ids, mask = render([*system, *TALK], template, tokenizer)
        starts = np.flatnonzero(np.diff([0, *mask]) == 1).tolist()
        for number, start in enumerate(starts):
            prompt = render_prompt([*system, *TALK[: 2 * number + 1]], template, tokenizer)
            assert prompt == ids[:start]
            assert tokenizer.name != "tokenizer.model" or prompt[-1] != 29871


def test_a_small_conversation_has_these_tokens_and_this_mask(shared):
    """Trap 6: written by hand, from the vocabulary."""
    turns = [Turn("user", "Hi"), Turn("assistant", "A"), Turn("user", "Hi"), Turn("assistant", "A")]
    ids, mask = render(turns, "plain", Tokenizer("bytes"))
    assert ids == [256, 72, 105, 10, 65, 257, 10, 72, 105, 10, 65, 257]
    assert mask == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    llama = Tokenizer(shared(FILES["llama2"]))
    ids, mask = render(turns, "llama2-chat", llama)
    exchange = [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962, 319, 29871, 2]
    assert ids == 2 * exchange and mask == 2 * ([0] * 9 + [1] * 3)
    ids, mask = render(turns[:2], "chatml", llama)
    assert ids[-3:] == [13, 29909, 2] and mask[-3:] == [0, 1, 1]  # `A` goes on after a line end: no blank before it
    assert bracketed(ids, mask, llama) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦A</s>⟧"


def test_llama2_chat_gives_the_tokens_and_labels_that_axolotl_gives(shared):
    """After them, that file has a stray BOS and padding."""
    tokenizer = Tokenizer(shared(FILES["llama2"]))
    (record,) = read_conversations(shared("llama2_tokenizer/axolotl_conversation.json"))
    theirs = json.loads(shared("llama2_tokenizer/axolotl_conversation.tokenized_llama2chat.json").read_text())
    first = tokenizer.decode(theirs["input_ids"][1:200])
    system = first[first.index("<<SYS>>\n") + 8 : first.index("\n<</SYS>>")]
    ids, mask = render([Turn("system", system), *record.sides[0]], "llama2-chat", tokenizer)
    assert len(ids) == 2055 and ids == theirs["input_ids"][:2055] and theirs["input_ids"][2055:2057] == [1, 0]
    assert [i if counts else IGNORE for i, counts in zip(ids, mask)] == theirs["labels"][:2055]


def test_templates_are_written_as_published():
    decode = lambda turns, template: bracketed(*render(turns, template, tokenizer), tokenizer)
    tokenizer, turns = Tokenizer("bytes"), [Turn("user", "Hi"), Turn("assistant", "Yo")]
    vicuna = decode(turns * 2, "vicuna")
    assert vicuna.startswith("<s>A chat between a curious user and an artificial intelligence assistant. The assistant")
    assert vicuna.endswith(" user's questions. USER: Hi ASSISTANT:⟦ Yo</s>⟧USER: Hi ASSISTANT:⟦ Yo</s>⟧")
    below = "<s>Below is an instruction that describes a task"
    (with_input,), (without,) = (FORMATS["alpaca"](record) for record in (
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "input": "", "output": "La"},
    ))  # fmt: skip
    assert decode(with_input, "alpaca") == (
        f"{below}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:⟦3</s>⟧"
    )
    assert decode(without, "alpaca") == (
        f"{below}. Write a response that appropriately completes the request.\n\n### Instruction:\nSing.\n\n"
        "### Response:⟦La</s>⟧"
    )
    assert decode(without, "alpaca-lf") == decode(without, "alpaca").replace("Response:", "Response:\n")
    system = [Turn("system", "Be kind.")]
    assert decode(system + turns * 2, "llama2-chat") == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]⟦ Yo </s>⟧<s>[INST] Hi [/INST]⟦ Yo </s>⟧"
    )
    assert decode(system + turns * 2, "chatml") == (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo</s>⟧\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo</s>⟧"
    )


# ---- order ----


def test_turns_of_one_role_are_merged():
    turns = [("system", " "), ("user", " a "), ("user", "b"), ("assistant", "c"), ("assistant", "d\n")]
    assert in_order([Turn(*turn) for turn in turns]) == [Turn("user", "a\n\nb"), Turn("assistant", "c\n\nd")]


@pytest.mark.parametrize("roles, message", [
    ("a u a", "turn 1 is the assistant's, at the beginning"),
    ("u a s u a", "turn 3 is the system's, right after the assistant's"),
    ("s a", "turn 2 is the assistant's, right after the system's"),
    ("u e", "turn 2, the assistant's, is empty"),
    ("u a u", "the last turn is the user's"),
    ("s", "it has no turns of a user"),
    ("", "it has no turns of a user"),
])  # fmt: skip
def test_a_role_out_of_order_is_named(roles, message):
    role = {"u": "user", "a": "assistant", "s": "system", "e": "assistant"}
    turns = [Turn(role[letter], " " if letter == "e" else letter) for letter in roles.split()]
    with pytest.raises(ValueError, match=message):
        render(turns, "plain", Tokenizer("bytes"))


def test_a_prompt_must_end_with_a_question():
    with pytest.raises(ValueError, match="the last turn is the assistant's"):
        render_prompt(TALK, "plain", Tokenizer("bytes"))


# ---- readers ----

HUMAN = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in SAID)
MESSAGES = [{"role": role, "content": text} for role, text in TALK]
RECORDS = {
    "sharegpt": sharegpt(TALK),
    "openai": {"messages": MESSAGES, "label": True, "tools": None},
    "alpaca": {"instruction": SAID[0][0], "input": "", "output": SAID[0][1]},
    "dolly": {"instruction": SAID[0][0], "context": "", "response": SAID[0][1], "category": "qa"},
    "oasst": {"text": " ".join(f"### Human: {question} ### Assistant: {answer}" for question, answer in SAID)},
    "hh-rlhf": {"chosen": HUMAN, "rejected": HUMAN + " not"},
    "pairs": {"conversations": sharegpt(TALK[:-1])["conversations"], "chosen": {"from": "gpt", "value": SAID[2][1]},
              "rejected": {"from": "gpt", "value": SAID[2][1] + " not"}},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("format", RECORDS)
def test_every_format_is_known_by_its_fields(format, suffix, tmp_path):
    path = write_json(tmp_path / f"a{suffix}", [RECORDS[format], RECORDS[format]])
    told, found = (list(read_conversations(path, name)) for name in (format, "auto"))
    assert told == found and [record.place for record in found] == [f"{path}:1", f"{path}:2"]
    sides = [in_order(turns) for turns in found[0].sides]
    assert sides[0] == in_order(TALK[:2] if format in ("alpaca", "dolly") else TALK)
    for turns in sides:
        for template in WRITTEN:
            ids, mask = render(turns, template, Tokenizer("bytes"))
            check_answers(ids, mask, [turn.text for turn in turns[1::2]], template, Tokenizer("bytes"))
    assert len(sides) == 1 or sides[1] == [*sides[0][:-1], Turn("assistant", SAID[2][1] + " not")]


@pytest.mark.parametrize("record, expected", [
    ({"input": "### Human: a### Assistant: b### Human: c", "output": "d"}, "a b c d"),
    ({"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}, "s a b c d"),
    ({"instruction": "c", "context": "", "input": "more", "output": "d"}, "c ### Input: more d"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a b | a c"),
    ({"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
      "rejected": [{"role": "assistant", "content": "c"}]}, "a b | a c"),
])  # fmt: skip
def test_what_stands_beside_the_usual_fields_is_read(record, expected, tmp_path):
    (read,) = read_conversations(write_json(tmp_path / "a.jsonl", [record]))
    said = " | ".join(" ".join(turn.text for turn in side) for side in read.sides)
    assert not read.problem and " ".join(said.split()) == expected


def test_an_answer_in_a_field_of_its_own_and_a_system_beside_the_turns_are_read(tmp_path):
    oasst = {"input": "### Human: a ### Assistant: b ### Human: c ### Assistant:", "output": "d ### Human: e"}
    beside = {"system": "Be kind."} | sharegpt(TALK[:2])
    first, second = read_conversations(write_json(tmp_path / "a.json", [oasst, beside]))
    assert [turn.text.strip() for turn in first.sides[0]] == ["a", "b", "c", "d ### Human: e"]
    assert second.sides == ([Turn("system", "Be kind."), *TALK[:2]],)


@pytest.mark.parametrize("record, problem", [
    ({"question": "x", "id": 1}, "no known format has the fields question, id"),
    ({"instruction": "x"}, "no field `output`"),
    ({"instruction": "x", "output": ["y"]}, "field `output` is list, not str"),
    ({"instruction": "x", "output": ""}, "turn 2, the assistant's, is empty"),
    ({"messages": "x"}, "field `messages` is str, not list"),
    ({"messages": ["x"]}, "no field `from`"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 is of a tool; give --tools render or --tools drop"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last turn is not an answer"),
    ({"messages": []}, "the last turn is not an answer"),
    ({"messages": MESSAGES, "label": False}, "its label is false"),
    ({"text": "Hello ### Human: x"}, "it begins with 'Hello', not with a name"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "differ before the last"),
    ({"chosen": HUMAN, "rejected": HUMAN + "\n"}, "chosen and rejected are the same"),
    ({"instruction": "\ud800", "output": "x"}, "half of a surrogate pair"),
    (["x"], "a list, not an object"),
])  # fmt: skip
def test_a_bad_record_is_reported_with_its_place_and_reason(record, problem, tmp_path):
    bad, counts = [], Counter()
    good = RECORDS["hh-rlhf" if "chosen" in record else "sharegpt"]
    path = write_json(tmp_path / "a.jsonl", [good, record, good])
    assert len(list(usable(read_conversations(path), "", as_it_is, counts, bad))) == 2 and counts["records"] == 3
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: ") and re.search(problem, bad[0])


def test_a_format_that_is_told_is_not_looked_for(tmp_path):
    path = write_json(tmp_path / "a.json", [{"text": "", "output": "x"}, RECORDS["openai"]])
    assert [record.sides for record in read_conversations(path, "oasst")] == [([],), ()]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b'[{"instruction": 1},\n{]', "a.json:2: not JSON"),
    ("a.json", b'["caf\xe9"]', "a.json:1: not UTF-8"),
    ("a.jsonl.gz", b"plain", "a.jsonl.gz is damaged"),
    ("a.jsonl", b"{}\n{\n", "2 of 2 records are bad, .*a.jsonl:1: no known format .*; .*a.jsonl:2: not JSON"),
    ("a.txt", b"text", "a.txt must end in one of .json, "),
])  # fmt: skip
def test_a_bad_file_of_conversations_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare_chats((str(tmp_path / name),), tmp_path / "out", "bytes", "plain", workers=1)
    assert not (tmp_path / "out").exists()


def test_more_bad_records_than_allowed_stop(tmp_path, capsys):
    source = write_json(tmp_path / "a.json", [sharegpt(talk(i, 5)) for i in range(97)] + [{"instruction": "x"}] * 3)
    make = lambda name, **allow: prepare_chats((str(source),), tmp_path / name, "bytes", "plain", workers=1, **allow)
    with pytest.raises(ValueError, match="3 of 100 records are bad, more than --allow_bad 0.01 .*a.json:98: no field"):
        make("strict")
    meta = make("lax", allow_bad=0.03)
    assert meta["counts"]["bad"] == 3 and meta["counts"]["conversations"] == 97
    assert "left out" in (said := capsys.readouterr().err) and f"{source}:100: no field `output`" in said


def test_the_real_files_are_read(shared):
    expected = {
        "alpaca/alpaca_5000.json": (4998, 2),
        "alpaca/alpaca_random_9k.json": (9225, 4),
        "alpaca/alpaca_claude_t45.json": (5301, 4),
        "alpaca/alpaca_helpfulness_t45.json": (2021, 1),
        "dolly/dolly_3k.json": (2996, 0),
        "chat/fastchat_dummy_conversation.json": (500, 0),
        "chat/llamafactory_alpaca_en_demo.json": (999, 0),
        "chat/llamafactory_dpo_en_demo.json": (300, 0),
        "chat/llamafactory_glaive_toolcall_en_demo.json": (147, 153),
        "chat/llamafactory_identity.json": (91, 0),
        "chat/llamafactory_kto_en_demo.json": (150, 150),
        "chat/oasst_valid_questions.jsonl": (953, 0),
        "chat/lima_1030_questions.jsonl": (0, 1030),
        "hh_rlhf/harmless-base_test.jsonl.gz": (2308, 4),
    }
    for name, (num_good, num_bad) in expected.items():
        bad = []
        sides = list(usable(read_conversations(shared(name)), "", as_it_is, Counter(), bad))
        assert (len(sides), len(bad)) == (num_good, num_bad), name
        assert all(len(each) == 1 + (name[:2] == "hh" or "dpo" in name) for each in sides)


# ---- sets ----


def test_rows_hold_whole_conversations_and_only_answers_are_targets(tmp_path):
    """Traps 6 and 10: as rendered, each once, the targets by position."""
    talks = [talk(i, *[n + i % 3 for n in range(5, 50, 7 + i % 11)]) for i in range(200)]
    for template in ("plain", "llama2-chat"):
        data = Dataset(chat_set(tmp_path, talks, 400, template), "train", 400)
        found, (tokens, targets, bounds, _) = Counter(), data.batch(range(len(data)))
        for begin, end in zip(bounds, bounds[1:]):
            row, begin, end = begin // 400, begin % 400, (end - 1) % 400 + 1
            last = np.flatnonzero(targets[row, begin:end] != IGNORE)
            if len(last):
                ids = (*tokens[row, begin : begin + last[-1] + 1], targets[row, begin + last[-1]])
                found[ids, (0, *(targets[row, begin : begin + last[-1] + 1] != IGNORE))] += 1
        rendered = (render(each, template, Tokenizer("bytes")) for each in talks)
        expected = {(tuple(ids), tuple(mask)) for ids, mask in rendered}
        assert set(found) <= expected and set(found.values()) == {1}
        splits = data.meta["splits"]
        assert len(found) == splits["train"]["documents"] == 200 - splits["val"]["documents"]
        assert (targets != IGNORE).sum() == splits["train"]["targets"]
        for index in (0, len(data) - 1):
            for file, start, _ in data.pieces(index):
                assert data.document(file, start) == 1 + np.searchsorted(data.bounds[file], start)
                assert f"tokens {start}-" in data.place(index)


@pytest.mark.parametrize("template", WRITTEN)
def test_a_long_conversation_is_split_between_exchanges(template, tmp_path):
    """Traps 2 and 3: pieces fit, begin with the system's text and a question, and lose nothing but what cannot fit."""
    turns = [Turn("system", "Be kind."), *talk(0, *[100] * 9, 3000, *[100] * 9)]
    turns = [Turn(role, f"{number} {text}") for number, (role, text) in enumerate(turns)]
    short = [talk(i, 9) for i in range(60)]
    folder = chat_set(tmp_path, [turns, *short], 900, template, val_fraction=0.1)
    data = [Dataset(folder, split, 900) for split in ("train", "val")]
    holders = [part for part in data if b"0 Be kind." in bytes(part.files[0].astype(np.uint8))]
    assert len(holders) == 1  # all pieces are in one split
    (part,) = holders
    tokenizer, pieces = Tokenizer("bytes"), []
    for begin, end in zip(part.bounds[0], part.bounds[0][1:]):
        ids, mask = part.files[0][begin:end].tolist(), part.masks[0][begin:end].tolist()
        assert len(ids) <= 900 and ids[0] == 256 and all(run[-1] == 257 for run in runs(ids, mask))
        if "0 Be kind." in (text := tokenizer.decode(ids)):
            pieces.append([tokenizer.decode(run).strip() for run in runs(ids, mask)])
            assert text.index("0 Be kind.") < text.index("Q0")
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert sum(pieces, []) == answers[:9] + answers[10:] and len(pieces) >= 4
    counts = part.meta["counts"]
    assert (counts["split"], counts["exchanges_too_long"]) == (1, 1)


def test_an_exchange_fills_a_piece_to_its_last_token_and_no_further():
    turns, tokenizer = talk(0, 20, 20), Tokenizer("bytes")
    both, one = (len(render(some, "plain", tokenizer)[0]) for some in (turns, turns[:2]))
    for max_len, pieces, dropped in ((both, 1, 0), (both - 1, 2, 0), (one, 2, 0), (one - 1, 0, 2)):
        made, left_out = split_to_fit(turns, "plain", tokenizer, max_len)
        assert (len(made), left_out) == (pieces, dropped)


def test_where_nothing_fits_that_is_said_and_where_half_does_a_run_ends(tmp_path, tiny_run):
    """Trap 2."""
    with pytest.raises(ValueError, match="nothing is left of the records at --max_len 64: .*40 exchanges too long"):
        chat_set(tmp_path, [talk(i, 100) for i in range(40)], 64)
    folder = chat_set(tmp_path, [talk(i, 10 if i % 2 else 100) for i in range(200)], 64)
    rows = len(Dataset(folder, "train", 64))
    run = tiny_run(data=folder, seq_len=64, steps=rows // 2, batch_size=4)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "targets" in line]
    assert steps[-1]["epochs"][folder] == pytest.approx(4 * (rows // 2) / rows, abs=1e-3)
    targets = Mixture((folder,), "train", 64).batch(range(4 * len(steps)), 0).targets
    assert sum(line["targets"] for line in steps) == (targets != IGNORE).sum()
    scores = next(line for line in reversed(lines) if "val_loss" in line)
    each = Mixture((folder,), "val", 64).parts[0].bytes_per_target
    assert each == 10 / 11  # ten characters and EOS
    assert scores["val_bits_per_byte"] == pytest.approx(scores["val_loss"] / math.log(2) / each)
    assert json.loads((run / "run.json").read_text())["dataset"][0]["template"] == "plain"


def test_a_set_for_longer_rows_and_one_without_its_mask_are_refused(tmp_path):
    folder = chat_set(tmp_path, [talk(i, 200) for i in range(60)], 300, val_fraction=0.2)
    with pytest.raises(ValueError, match="a conversation has 2.. tokens, more than --seq_len 100; .*--max_len 100"):
        Mixture((folder,), "train", 100)
    for suffix in (".mask", ".bounds"):
        path = Path(folder, "train_00000").with_suffix(suffix)
        kept = path.read_bytes()
        path.write_bytes(kept[:-8])
        with pytest.raises(ValueError, match=f"{suffix} has {len(kept) - 8} bytes, meta.json says {len(kept)}"):
            Dataset(folder, "train", 300)
        path.write_bytes(kept)


def test_conversations_are_cleaned_before_they_are_rendered(tmp_path):
    """What went is in removed.jsonl, the counts in cleaning.txt, the flags in the command."""
    refusals = [[Turn("user", f"Q{i}"), Turn("assistant", "I'm sorry, but I cannot help with that.")] for i in range(9)]
    talks = [talk(i // 2, 9) for i in range(200)] + refusals
    folder = Path(chat_set(tmp_path, talks, cleaning=Cleaning(drop_refusals=True, near_duplicates=0)))
    meta = json.loads((folder / "meta.json").read_text())
    counts = [meta["counts"][name] for name in ("records", "cleaned_away", "conversations")]
    assert counts == [209, 109, 100] and "--drop_refusals --near_duplicates 0" in meta["command"]
    removed = [json.loads(line) for line in open(folder / "removed.jsonl")]
    assert Counter(row["step"] for row in removed) == {"copies": 100, "refusals": 9}
    assert removed[-1]["where"] == f"{tmp_path / 'talks.jsonl'}:209" and len(removed[-1]["turns"]) == 2
    (line,) = re.findall("^refusals +(.*)", (folder / "cleaning.txt").read_text(), re.MULTILINE)
    num_bytes = 9 * len("Q0" + "I'm sorry, but I cannot help with that.")
    assert line.split() == ["9", "18", str(num_bytes), str(num_bytes)]  # dropped, turns, characters, tokens


# ---- preference pairs ----


@pytest.fixture
def pair_set(tmp_path) -> str:
    """Pairs of one question or two, with answers of many lengths."""
    text = lambda i: "".join(f"\n\nHuman: Q{i}\n\nAssistant: {'a' * (i % 7)}." for _ in range(i % 2))
    records = [
        {"chosen": f"{text(i)}\n\nHuman: {i}?\n\nAssistant: {'c' * (1 + i % 90)}",
         "rejected": f"{text(i)}\n\nHuman: {i}?\n\nAssistant: {'r' * (1 + i % 50 + {9: 500, 12: 320}.get(i, 0))}"}
        for i in range(120)
    ]  # fmt: skip
    source = write_json(tmp_path / "pairs.jsonl.gz", records)
    prepare_chats((str(source),), tmp_path / "pairs", "bytes", "chatml", 400, val_fraction=0.2, workers=1)
    return str(tmp_path / "pairs")


def test_a_pair_is_two_rows_whose_targets_are_the_last_answers(pair_set):
    data = Mixture((pair_set,), "train", 400)
    (part,) = data.parts
    assert data.kind == "preference" and isinstance(part.layout, Pairs) and not data.packed
    counts, split = part.meta["counts"], part.meta["splits"]["train"]
    assert counts["pairs"] == 120 and counts["pairs_too_long"] == 1 and 2 * len(part) == split["documents"]
    tokenizer, targets_seen = Tokenizer("bytes"), 0
    for index in range(len(part)):
        tokens, targets, bounds, _ = part.batch([index])
        width = tokens.shape[1]
        assert bounds is None and tokens.shape == targets.shape == (2, width) and (width % 64 == 0 or width == 400)
        chosen, rejected = (row[row != IGNORE].tolist() for row in targets)
        assert set(tokenizer.decode(chosen)) == {"c"} and set(tokenizer.decode(rejected)) == {"r"}
        assert chosen[-1] == rejected[-1] == 257
        first = [np.flatnonzero(row != IGNORE)[0] for row in targets]
        assert first[0] == first[1] and (tokens[0, : first[0] + 1] == tokens[1, : first[1] + 1]).all()
        inside = (targets[:, :-1] != IGNORE) & (targets[:, 1:] != IGNORE)
        assert (targets[:, :-1][inside] == tokens[:, 1:][inside]).all()
        targets_seen += len(chosen) + len(rejected)
    assert targets_seen == split["targets"]
    assert data.place(0, 3).count("document") == 2


def test_a_batch_of_pairs_is_as_wide_as_its_longest_and_any_number_of_ranks_reads_the_same(pair_set):
    data = Mixture((pair_set,), "train", 400)
    whole = data.batch(data.numbers(3, 24), 5)
    used = (whole.targets != IGNORE).any(0).nonzero()[0].max() + 1
    assert whole.tokens.shape == (48, min(400, -(-used // 64) * 64)) and whole.documents is None
    apart = [data.batch([number], 5).targets for number in data.numbers(3, 24)]
    assert (whole.targets != IGNORE).sum() == sum((targets != IGNORE).sum() for targets in apart)
    for world in (2, 3, 8):
        parts = [data.batch(data.numbers(3, 24, rank, world), 5) for rank in range(world)]
        row = 0
        for part in parts:
            width = part.tokens.shape[1]
            for ours, theirs in zip(part[:2], whole[:2]):
                assert (ours == theirs[row : row + len(ours), :width]).all()
            row += len(part.tokens)
    assert Mixture((pair_set,), "train", 399).batch(range(len(data.parts[0])), 0).tokens.shape[1] == 399
    with pytest.raises(ValueError, match="tokens, more than --seq_len 64; give --seq_len 388, or prepare it with"):
        Mixture((pair_set,), "train", 64)


def test_what_does_not_go_together_is_refused(tmp_path, pair_set, tiny_data):
    chats = [chat_set(tmp_path, [talk(i, 9) for i in range(60)], template=name) for name in ("plain", "vicuna")]
    for sources, found in ((chats, "plain, vicuna"), ((tiny_data, pair_set), "preference, text")):
        with pytest.raises(ValueError, match=f"these do not go together .{found}"):
            Mixture(tuple(map(str, sources)), "train", 512)
    mixed = Mixture((str(tiny_data), chats[0]), "train", 512)
    assert mixed.kind == "chat" and mixed.packed and type(mixed.parts[0].layout) is Packed
    batch = mixed.batch(range(40), 0)
    assert batch.positions().shape == batch.tokens.shape == (40, 512)
    read = eval.PROTOCOLS["perplexity"]["windows"].questions
    with pytest.raises(ValueError, match="holds conversations; perplexity is that of text"):
        next(read(eval.Config("", "perplexity", chats[0]), Tokenizer("bytes"), 64))
    both = write_json(tmp_path / "both.json", [RECORDS["openai"], RECORDS["pairs"]])
    with pytest.raises(ValueError, match="both.json:2: preference pairs and conversations are mixed"):
        prepare_chats((str(both),), tmp_path / "both", "bytes", "plain", workers=1)


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_set_in_many_files_made_by_many_workers_holds_the_same(kind, tmp_path, monkeypatch):
    records = [sharegpt(talk(i, 9, 20)) for i in range(90)]
    if kind == "preference":
        records = [{name: f"\n\nHuman: {i}\n\nAssistant: {name}" for name in ("chosen", "rejected")} for i in range(90)]
    source = write_json(tmp_path / "a.json", records)
    make = lambda out, workers: prepare_chats(
        (str(source),), tmp_path / out, "bytes", "plain", val_fraction=0.2, workers=workers
    )
    make("one", 1)
    monkeypatch.setattr("lib.shards.TASK_CHARS", 200)
    monkeypatch.setattr("lib.shards.SHARD_TOKENS", 300)
    meta = make("many", 2)
    assert len(meta["splits"]["train"]["files"]) > 2
    one, many = (Mixture((str(tmp_path / out),), "train", 100).parts[0] for out in ("one", "many"))
    for of_one, of_many in ((one.files, many.files), (one.masks, many.masks)):
        assert (np.concatenate(of_one) == np.concatenate(of_many)).all()
    sizes = [np.concatenate([np.diff(bounds) for bounds in part.bounds]) for part in (one, many)]
    assert (sizes[0] == sizes[1]).all()
    if kind == "preference":
        for ours, theirs in zip(one.batch(range(len(one)))[:2], many.batch(range(len(many)))[:2]):
            assert (ours == theirs).all()


# ---- the command ----


def test_the_command_shows_what_the_loss_counts(tmp_path, pair_set):
    source = write_json(tmp_path / "a.json", [
        sharegpt([Turn("user", f"{i}: {TALK[0].text}"), *TALK[1:4], *talk(i, 9)]) for i in range(60)
    ])
    words = ("--source", str(source), "--out", str(tmp_path / "set"), "--tokenizer", "bytes", "--template", "chatml")
    done = command("data.py", *words)
    first = "<|im_start|>assistant\n⟦A program.</s>⟧\n<|im_start|>user\nAnd\n\nthen? {0}<|im_end|>"
    assert first in done.stdout and "60 records" in done.stdout and "0 exchanges too long" in done.stdout
    more = command("data.py", "--show", str(tmp_path / "set"), "--n", "4").stdout
    assert more.count("⟦A program.</s>⟧") == 4 and first in more
    pair = show(pair_set, 2)
    assert pair.startswith("--- 0 chosen: ") and "--- 0 rejected: " in pair and pair.count("⟦") == 2


@pytest.mark.parametrize("words, message", [
    (["--template", "alpcaa"], "--template alpcaa is not one of llama2-chat, vicuna, alpaca, chatml, plain"),
    (["--template", "plain", "--format", "csv"], "--format csv is not one of auto, sharegpt"),
    (["--template", "plain", "--tokenizer", "train:400"], "needs the --tokenizer of the model"),
    (["--template", "plain", "--tokenizer", "bytes"], "--source stdlib is text without conversations"),
    (["--source", "alpaca", "--tokenizer", "bytes"], "--source alpaca is conversations; give a --template"),
    (["--template", "plain", "--max_len", "1"], "--max_len 1 must be at least 2"),
    (["--show", "TEXTS"], "a dataset of text"),
])  # fmt: skip
def test_a_wrong_flag_for_conversations_is_named(words, message, tmp_path, tiny_data):
    words = [str(tiny_data) if word == "TEXTS" else word for word in words]
    done = command("data.py", *words, "--out", str(tmp_path / "set"), check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---- size and speed ----


@pytest.fixture(scope="session")
def alpaca(shared, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("alpaca") / "set"
    sources = tuple(str(path) for path in sorted(shared("alpaca").glob("alpaca_*.json")))
    prepare_chats(sources, folder, str(shared(FILES["llama2"])), "alpaca")
    return str(folder)


@pytest.mark.slow
def test_alpaca_is_packed_with_less_than_2_percent_padding(alpaca):
    data = Dataset(alpaca, "train", 2048)
    padding = 1 - data.layout.table[:, 2].sum() / (len(data) * 2048)
    print(f"padding {padding:.2%} of {len(data)} rows")
    assert padding < 0.02


@pytest.mark.slow
def test_packing_alpaca_trains_faster_than_padding_it(alpaca):
    """Targets a second of one core, of 2 packed rows against 32 conversations padded to the longest of them, at random;
    15M on a CPU, in turn."""
    import torch

    from model import SIZES, Transformer

    model = Transformer(dataclasses.replace(SIZES["15M"], max_seq_len=2048))
    model.init_weights(0)
    data, draw, ratios = Dataset(alpaca, "train", 2048), np.random.default_rng(0), []
    for _ in range(9):
        packed = data.batch(draw.integers(len(data), size=2))
        pieces = [[piece] for piece in data.layout.table[draw.integers(len(data.layout.table), size=32)].tolist()]
        width, padded = max(size for ((*_, size),) in pieces), fill([(data, row) for row in pieces])
        padded = Batch(padded.tokens[:, :width].copy(), padded.targets[:, :width].copy())
        speeds = []
        for batch in (packed, padded):
            tokens, targets, documents, _ = batch.to(torch.device("cpu"))
            started = time.process_time()
            model.loss(tokens, targets, documents).backward()
            speeds.append((targets != IGNORE).sum().item() / (time.process_time() - started))
        print(f"{padded.tokens.shape[1]} tokens at most: {speeds[0]:.0f} and {speeds[1]:.0f} targets/s")
        ratios.append(speeds[0] / speeds[1])
    print(f"median of {len(ratios)} rounds: {statistics.median(ratios):.2f}, of {min(ratios):.2f} to {max(ratios):.2f}")
    assert statistics.median(ratios) > 1.5


def test_texts_are_prepared_and_read_as_before(tmp_path):
    """Without a template nothing of a dataset is about masks."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.md").write_text(f"text {i} " * 9)
    meta = prepare((str(tmp_path / "in"),), tmp_path / "d", "bytes", 0.2, workers=1)
    assert not {"kind", "template"} & meta.keys() and "targets" not in meta["splits"]["train"]
    assert {path.suffix for path in (tmp_path / "d").iterdir()} == {".bin", ".json", ".bytes"}
    data = Mixture((str(tmp_path / "d"),), "train", 16)
    assert data.kind == "text" and not data.packed and data.batch([0], 0).documents is None
