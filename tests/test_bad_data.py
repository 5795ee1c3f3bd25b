"""What bad data does to a preparation and to a dataset: it is counted or named in one sentence, and nothing is lost."""

import base64
import builtins
import copy
import errno
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import sqlite3
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval
import sample
from conftest import prepare, prepare_chats
from data import Config, Mixture, Tokenizer
from lib import cleaning_steps, documents, sources
from lib.chat_formats import FORMATS, Turn, read_conversations
from lib.chats import usable
from lib.cleaning import Cleaner, Cleaning
from lib.cli import run_command
from lib.errors import BadInput
from lib.meta import read_meta
from lib.peft import Adapter, adapter_settings, save_adapter
from lib.templates import render
from lib.tokenizer_training import train_tokenizer
from model import ModelConfig, Transformer, load, save


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Workers take seconds to start; here their work is done without them."""
    monkeypatch.setattr(data, "map_in_order", lambda function, tasks, workers: map(function, tasks))


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def messages(*texts: str) -> dict:
    """A conversation: a question, an answer, and so on."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def read(records: list, path: Path, format: str = "auto", removed: Path | None = None) -> tuple[list, list[str], dict]:
    """What is read and cleaned of records, what is said of the bad ones, and the counts."""
    counts, bad = Counter(), []
    cleaner = Cleaner(Cleaning(near_duplicates=0), removed)
    return list(usable(read_conversations(write_lines(path, records), format), "", cleaner, counts, bad)), bad, counts


def said_in_one_sentence(error: BaseException) -> bool:
    """Whether it ends with exit code 2, as bad input does."""
    return isinstance(error, BadInput) and "\n" not in str(error)


# ---- tokenizers ----


def tiktoken_file(path: Path, num_ranks: int, change=None) -> Path:
    """A file with as many ranks as gpt2's or cl100k_base's, of single bytes, pairs and threes."""
    pieces = (bytes(b) for size in (1, 2, 3) for b in itertools.product(range(256), repeat=size))
    rows = [[piece, rank] for rank, piece in enumerate(itertools.islice(pieces, num_ranks))]
    if change:
        change(rows)
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in rows))
    return path


def test_a_tiktoken_file_gives_no_typed_text_the_id_of_a_special_token(tmp_path):
    tokenizer = Tokenizer(tiktoken_file(tmp_path / "good.tiktoken", 50_256))
    assert tokenizer.decode(tokenizer.encode("Hi <|endoftext|>")) == "Hi <|endoftext|>"
    assert tokenizer.eos_id == 50_256 not in tokenizer.encode("Hi <|endoftext|>")
    for number, special in ((50_256, 50_256), (100_256, 100_257)):

        def hostile(rows, special=special):
            rows[-1][1] = special

        with pytest.raises(ValueError, match=f"ranks must be 0 to {number - 1}, each once, and one .* is {special}"):
            Tokenizer(tiktoken_file(tmp_path / "bad.tiktoken", number, hostile))


@pytest.mark.parametrize("row, piece, rank, message", [
    (-1, b"zzz", -1, "one of them is -1"),
    (-1, b"zzz", 7, "one of them is there twice"),
    (97, b"zzz", 97, "1 of the 256 single bytes are no pieces, the first is 97"),
])  # fmt: skip
def test_a_tiktoken_file_without_whole_ranks_is_refused(row, piece, rank, message, tmp_path):
    def change(rows):
        rows[row] = [piece, rank]

    with pytest.raises(ValueError, match=message):
        Tokenizer(tiktoken_file(tmp_path / "bad.tiktoken", 50_256, change))


def test_an_empty_piece_of_a_tiktoken_file_is_refused(tmp_path):
    path = tiktoken_file(tmp_path / "bad.tiktoken", 50_256)
    path.write_bytes(path.read_bytes().rsplit(b"\n", 2)[0] + b"\n==== 50255\n")
    with pytest.raises(ValueError, match="rank 50255 is of an empty piece"):
        Tokenizer(path)


def test_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path):
    train_tokenizer(iter(["A text of some words, and then of more.\n" * 40]), 310, tmp_path / "tokenizer.model")
    for tokenizer in (Tokenizer(tmp_path), Tokenizer("bytes")):
        ids = tokenizer.encode("some words")
        padded = [tokenizer.vocab_size, *ids[:3], tokenizer.vocab_size + 999, *ids[3:], 32_063]
        assert tokenizer.decode(padded) == tokenizer.decode(ids) == "some words"


def test_a_model_with_more_rows_than_its_tokenizer_is_sampled_from(tmp_path, capsys):
    train_tokenizer(iter(["A text of some words, and then of more.\n" * 40]), 310, tmp_path / "tokenizer.model")
    torch.manual_seed(0)
    save(Transformer(ModelConfig(32, 2, 4, 2, 64, vocab_size=4096)), tmp_path / "m", Tokenizer(tmp_path))
    sample.main(sample.Config(model=str(tmp_path / "m"), prompt=("some words",), max_new_tokens=20, temperature=3.0))
    assert capsys.readouterr().out.startswith("some words")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that cannot be read")
def test_a_tokenizer_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="tokenizer /proc/self/mem cannot be read"):
        Tokenizer("/proc/self/mem")


# ---- documents ----


def parquet_of(path: Path, **columns) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("value, kind", [(5, "int"), (1.5, "float"), (["a"], "list"), (b"a", "bytes"), (True, "bool")])
def test_a_parquet_column_of_other_things_than_text_is_named(value, kind, tmp_path):
    path = parquet_of(tmp_path / "a.parquet", text=[None, value])
    with pytest.raises(ValueError, match=f"a.parquet: row 2: field `text` is {kind}, not a string"):
        prepare((str(path),), tmp_path / "d", "bytes", workers=1)


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    broken = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, broken.buffers())
    path = parquet_of(tmp_path / "a.parquet", text=broken)
    with pytest.raises(ValueError, match="a.parquet: a text after row 0 is not UTF-8"):
        list(documents.read_documents(path))


def test_a_damaged_parquet_file_is_one_sentence_wherever_the_damage_is(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", text=[f"text {i} " * 9 for i in range(500)])
    whole, draw, said = path.read_bytes(), random.Random(0), []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            list(documents.read_documents(path))
        except Exception as error:
            assert said_in_one_sentence(error), repr(error)
            said.append(str(error))
    assert any("is damaged" in sentence for sentence in said)


@pytest.mark.parametrize("line, problem", [
    ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"text": "fine", "id": ' + "9" * 5000 + "}", "too many digits"),
], ids=["deep", "long"])  # fmt: skip
def test_a_line_of_text_that_python_cannot_read_is_named(line, problem, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, line])
    with pytest.raises(ValueError, match=f"a.jsonl:2: the line is not JSON that can be read .*{problem}"):
        list(documents.read_documents(path))


def test_an_empty_gz_file_is_damaged(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    for reader in (documents.read_documents, read_conversations):
        with pytest.raises(ValueError, match="a.jsonl.gz is damaged .it has 0 bytes"):
            list(reader(tmp_path / "a.jsonl.gz"))


class Counted:
    """A text that counts the characters copied from it."""

    copied = 0

    def __init__(self, text: str):
        self.text = text
        Counted.copied += len(text)

    def __len__(self):
        return len(self.text)

    def __radd__(self, other: str):
        return Counted(other + self.text)

    def __add__(self, other: str):
        return Counted(self.text + other) if other else self

    def __getitem__(self, places: slice):
        return self if places == slice(0, None) else Counted(self.text[places])

    def find(self, *args):
        return self.text.find(*args)


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_long_text_is_cut_in_linear_time(separator):
    copied = []
    for num in (400, 800):
        text, Counted.copied = separator.join(f"word {i} of a text" for i in range(num)), 0
        assert "".join(piece.text for piece in documents.cut([Counted(text)], 50)) == text
        copied.append(Counted.copied / len(text))
    assert copied[1] < 1.1 * copied[0] < 8


def test_a_text_is_cut_where_it_was_before():
    def cut_before(blocks, size):  # the rule of the docstring, with a copy of the rest for every piece
        buffer = ""
        for block in itertools.chain(blocks, [""]):
            buffer += block
            while len(buffer) > (4 if block else 1) * size:
                ends = (buffer.find(mark, size, 4 * size) + len(mark) for mark in ("\n\n", "\n"))
                end = next((end for end in ends if end >= size), size)
                yield buffer[:end]
                buffer = buffer[end:]
        if buffer:
            yield buffer

    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("abc \n") for _ in range(draw.randint(0, 400)))
        block = draw.randint(1, 120)
        blocks = [text[i : i + block] for i in range(0, len(text), block)]
        size = draw.randint(3, 40)
        assert list(documents.cut(blocks, size)) == list(cut_before(blocks, size))


# ---- conversations ----

NAMES = ("conversations", "from", "human", "gpt", "value"), ("messages", "role", "user", "assistant", "content")
TURNS = [[{who: (user, answer)[i % 2], text: f"said {i}"} for i in range(4)] for _, who, user, answer, text in NAMES]
GOOD = [
    {"conversations": TURNS[0], "system": "Be kind."},
    {"messages": [{"role": "system", "content": "Be kind.", "weight": 1}, *TURNS[1]], "label": True},
    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind.", "history": [["Hi", "Yo"]]},
    {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"},
    {"text": "### Human: a ### Assistant: b"},
    {"input": "### Human: a ### Assistant:", "output": "b"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": TURNS[1][:1], "chosen": TURNS[1][1:2], "rejected": [{"role": "assistant", "content": "c"}]},
    {"conversations": TURNS[0][:3], "chosen": TURNS[0][1], "rejected": {"from": "gpt", "value": "c"}},
]
WRONG = [
    None, True, False, 0, 5, -1, 1.5, 2**70, float("nan"), "", " ", "x", "\x00", "\ud800", "### Human:", [], [5], ["x"],
    [[]], [["a", "b", "c"]], {}, {"x": 5}, [{}], [{"from": "human", "value": "a"}],
    [{"role": "assistant", "content": "a"}], [[[[]]]],
]  # fmt: skip


def places(record, path=()):
    """The path of every field and item in a record."""
    inside = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for name, value in inside:
        yield (*path, name)
        yield from places(value, (*path, name))


def with_value(record, path: tuple, value):
    changed = copy.deepcopy(record)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_no_wrong_value_in_a_record_stops_a_set(number, tmp_path):
    """Every field of every format, replaced by every wrong value: the record is read, cleaned away or counted as bad.

    A value of None is a field left out.
    """
    good, of_pairs = GOOD[number], "chosen" in GOOD[number]
    records = [with_value(good, path, value) for path in places(good) for value in WRONG]
    kept = bad_ones = 0
    for format in ("auto", "pairs" if of_pairs else "alpaca"):
        sides, bad, counts = read([good, *records, good], tmp_path / "a.jsonl", format)
        assert len(sides) + len(bad) + counts["cleaned_away"] == counts["records"] == len(records) + 2
        assert all(re.match(rf"{tmp_path}/a.jsonl:\d+: \S.{{8}}", problem) and "\n" not in problem for problem in bad)
        for turns in itertools.chain.from_iterable(sides):
            render(turns, "plain", Tokenizer("bytes"))
        kept, bad_ones = max(kept, len(sides)), max(bad_ones, len(bad))
    assert bad_ones > 20 and kept


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_of_another_format_than_told_is_bad_and_stops_nothing(format, tmp_path):
    for record in GOOD:
        sides, bad, counts = read([record], tmp_path / "a.jsonl", format)
        assert len(sides) + len(bad) + counts["cleaned_away"] == 1
    _, bad, _ = read([messages("a", "b")], tmp_path / "a.jsonl", "pairs")
    assert bad[0].endswith("a.jsonl:1: no field `chosen`")


DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 5000
HTML = {"marked": "<p>a <![foo[x]]> b</p>", "nested": "<p>" + "<b>" * 2000 + "x" + "</b>" * 2000 + "</p>"}


@pytest.mark.parametrize("record, problem", [
    ('{"instruction": "a", "output": ' + DEEP + "}", "nested too deeply"),
    ('{"instruction": "a", "output": "b", "id": ' + LONG + "}", "too many digits"),
    (messages("a", HTML["marked"]), "an answer is HTML that cannot be read .*'foo' in marked section"),
    (messages("a", HTML["nested"]), "an answer is HTML that cannot be read .nested too deeply"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "what was asked is int, neither a text nor a list of messages"),
    ({"conversations": True, "prompt": "x", "chosen": "a", "rejected": "b"}, "what was asked is bool"),
    ({"instruction": "a", "output": "b", "history": 5}, "field `history` is int, not list"),
], ids=["deep", "long", "marked", "nested", "prompt", "conversations", "history"])  # fmt: skip
def test_one_bad_record_is_counted_with_its_place_and_reason(record, problem, tmp_path):
    good = GOOD[7] if "chosen" in record else messages("c", "d")
    _, bad, counts = read([good, record, good], tmp_path / "a.jsonl")
    assert counts["records"] == 3 and len(bad) == 1 and re.search(rf"a.jsonl:2: .*{problem}", bad[0])


def test_one_number_with_too_many_digits_costs_a_list_one_record(tmp_path):
    records = [json.dumps(messages("c", "d")), '{"instruction": "a", "output": "b", "more": [{"id": ' + LONG + "}]}"]
    (tmp_path / "a.json").write_text(f"[{', '.join([*records, records[0]])}]")
    problems = [record.problem for record in read_conversations(tmp_path / "a.json")]
    assert problems == ["", "not JSON that can be read (a number has too many digits)", ""]


@pytest.mark.parametrize("texts, kept, removed", [
    (["Continue", "Once", "Continue"], 2, ["Continue"]),
    (["Hi", "Hello", "And now?", ""], 2, ["", "And now?"]),
    (["Hi", "", "Hi", "Hello"], 2, [""]),
    (["", "Hello", "Hello", "Hello"], 2, ["", "Hello"]),
    (["ok", "ok", "ok", "ok", "ok"], 4, ["ok"]),
])  # fmt: skip
def test_a_last_turn_that_is_empty_or_was_said_before_is_told_in_removed_jsonl(texts, kept, removed, tmp_path):
    sides, bad, _ = read([messages(*texts)], tmp_path / "a.jsonl", removed=tmp_path / "removed.jsonl")
    assert not bad and len(sides[0][0]) == kept
    rows = map(json.loads, (tmp_path / "removed.jsonl").read_text().splitlines())
    assert [turn["text"] for row in rows for turn in row["turns"]] == removed


def test_turns_that_were_joined_do_not_count_as_removed(tmp_path):
    said = [("assistant", "Yes"), ("user", "a"), ("user", "b"), ("assistant", "Yes"), ("user", "a")]
    turns = [Turn(*turn) for turn in said]
    cleaner = Cleaner(Cleaning(near_duplicates=0), tmp_path / "removed.jsonl")
    assert cleaner(turns) == [Turn("user", "a\n\nb"), Turn("assistant", "Yes")]
    (row,) = map(json.loads, (tmp_path / "removed.jsonl").read_text().splitlines())
    assert row["turns"] == [turns[0]._asdict(), turns[-1]._asdict()]


def test_blanks_in_an_answer_take_no_time():
    """The square of their number would be many seconds of work, their number is milliseconds: far from the bound."""
    begun = time.process_time()
    assert cleaning_steps._tidy("a" + " " * 50_000 + "b") == "a" + " " * 50_000 + "b"
    assert time.process_time() - begun < 2
    turns = [Turn("user", "a"), Turn("assistant", "a" + " " * 200_000 + "b" + "\t" * 200_000)]
    (_, answer) = Cleaner(Cleaning(near_duplicates=0))(turns)
    assert len(answer.text) == 200_002 and time.process_time() - begun < 4


def test_blanks_are_left_off_as_a_regular_expression_would():
    draw, ends = random.Random(0), r"\A(?:[ \t]*\n)+|\A (?=\S)|\s+\Z"
    for _ in range(3000):
        text = "".join(draw.choice(" \n\tab\u1680\u2003\x85\u180e") for _ in range(draw.randint(0, 9)))
        tidied = re.sub(r"\n{4,}", "\n\n\n", text.replace("\x85", ""))
        assert cleaning_steps._tidy(text) == re.sub(ends, "", tidied)


def questions(folder: Path) -> dict[str, set]:
    """The questions in the files of each split of a set of bytes."""
    found = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}_00000.bin", "<u2")
        found[split] = set(re.findall(r"Q\d+\?", bytes(ids[ids < 256].tolist()).decode()))
    return found


@pytest.mark.parametrize("kind", ["pairs", "conversations"])
def test_a_question_is_for_training_or_validation_whatever_its_answers(kind, tmp_path):
    records = []
    for i, answer in itertools.product(range(100), range(3)):
        more = [f"More {answer}", "And so on."] * (answer > 1)
        said = messages(f"Q{i}?", f"answer {i * answer}", *more)["messages"]
        pair = {"prompt": said[:-1], "chosen": f"good {answer}", "rejected": f"bad {answer}"}
        records.append(pair if kind == "pairs" else {"messages": said})
    source = write_lines(tmp_path / "a.jsonl", records + records[:50])
    options = {"cleaning": Cleaning(near_duplicates=0)} if kind == "conversations" else {}
    meta = prepare_chats((str(source),), tmp_path / "d", "bytes", "plain", val_fraction=0.3, workers=1, **options)
    found = questions(tmp_path / "d")
    assert not found["train"] & found["val"] and len(found["train"] | found["val"]) == 100
    assert 15 < len(found["val"]) < 45
    dropped = meta["counts"]["duplicates"] + meta["counts"].get("cleaned_away", 0)
    assert dropped == (50 if kind == "pairs" else 51)  # the copies; and "answer 0" to the first question is there twice


def test_documents_go_where_their_hash_says(tmp_path):
    texts = [f"Document {i}." for i in range(200)]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    prepare((str(source),), tmp_path / "d", "bytes", 0.2, workers=1)
    for split in ("train", "val"):
        ids = np.fromfile(tmp_path / "d" / f"{split}_00000.bin", "<u2")
        stored = bytes(ids[ids < 256].tolist()).decode()
        for text in texts:
            under = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 0.2 * 2**64
            assert (text in stored) == (under == (split == "val"))


STANFORD = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


@pytest.mark.parametrize("template, end", [("alpaca", ""), ("alpaca-lf", "\n")])
def test_alpaca_is_the_prompt_of_its_authors_and_alpaca_lf_that_of_later_copies(template, end, shared):
    """As stanford_alpaca/train.py writes it, which encodes prompt and answer as one text, ended by EOS.

    Here they are encoded apart, so that the prompt is the same before there is an answer; the ids differ only where an
    answer begins with a sign that the vocabulary holds together with the colon (149 of these 4,998 records).
    """
    from sentencepiece import SentencePieceProcessor

    path = shared("llama2_tokenizer/tokenizer.model")
    theirs, ours = SentencePieceProcessor(str(path)), Tokenizer(path)
    records = json.loads(shared("alpaca/alpaca_5000.json").read_text())
    tidy = [record for record in records if all(text == text.strip() for text in record.values())]
    same = 0
    for record in tidy[:500]:
        prompt = STANFORD["prompt_input" if record["input"] else "prompt_no_input"].format_map(record) + end
        ids, mask = render(FORMATS["alpaca"](record)[0], template, ours)
        assert ids[: mask.index(1)] == [1, *theirs.encode(prompt)]
        assert theirs.decode(ids) == theirs.decode(theirs.encode(prompt + record["output"]))
        assert (whole := ids == [1, *theirs.encode(prompt + record["output"]), 2]) or not record["output"][0].isalnum()
        same += whole
    assert same > 470


# ---- meta.json ----


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A small set of each kind."""
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "map_in_order", lambda function, tasks, workers: map(function, tasks))
        texts = write_lines(folder / "texts.jsonl", [{"text": f"Document {i} of a set. " * 4} for i in range(40)])
        chats = write_lines(folder / "chats.jsonl", [messages(f"Q{i}?", f"Number {i}.") for i in range(40)] * 2)
        pairs = [{"prompt": f"Q{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(40)]
        pairs = write_lines(folder / "pairs.jsonl", pairs)
        prepare((str(texts),), folder / "text", "bytes", 0.3, workers=1)
        for name, source in (("chat", chats), ("preference", pairs)):
            cleaning = Cleaning(near_duplicates=0) if name == "chat" else None
            prepare_chats((str(source),), folder / name, "bytes", "plain", 64, "auto", 0.3, 0.0, 1, cleaning)
    return {name: folder / name for name in ("text", "chat", "preference")}


@pytest.fixture
def edited(sets, tmp_path):
    """A function that makes a copy of a set with another meta.json."""

    def edit(kind: str, meta) -> Path:
        folder = tmp_path / kind
        if not folder.exists():
            folder.mkdir()
            for path in sets[kind].iterdir():
                (folder / path.name).symlink_to(path)
        (folder / "meta.json").unlink()
        (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
        return folder

    return edit


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def use(folder: Path):
    """All that reads a set."""
    mixture = Mixture((str(folder),), "train", 64)
    mixture.batch(range(2), 0)
    mixture.parts[0].place(0)
    if mixture.kind != "text":
        data.show(folder, 1)
    else:
        read = eval.PROTOCOLS["perplexity"]["windows"].questions
        next(read(eval.Config("", "perplexity", str(folder)), Tokenizer("bytes"), 64))


@pytest.mark.parametrize("kind", ["text", "chat", "preference"])
def test_no_wrong_value_in_meta_json_is_a_traceback(kind, sets, edited):
    good, refused, tried = meta_of(sets[kind]), 0, 0
    values = [None, True, 0, -1, 1.5, 5, 2**31, 2**70, "x", "../x", "", [], [5], {}, {"x": 1}, "\ud800"]
    for path in places(good):
        for value in values:
            try:
                use(edited(kind, with_value(good, path, value)))
            except Exception as error:
                assert said_in_one_sentence(error), (path, value, repr(error))
                refused += 1
            tried += 1
    assert refused > tried / 2


@pytest.mark.parametrize("kind, path, value, message", [
    ("text", ("splits",), [], "field splits: Expected object, got array"),
    ("text", ("dtype",), "x", "field dtype: Invalid enum value 'x'"),
    ("text", ("tokenizer",), None, "field tokenizer: Expected object, got null"),
    ("text", ("splits", "train", "files"), [], "field splits.train.files: Expected array of length >= 1"),
    ("text", ("splits", "val", "tokens"), 0, "field splits.val.tokens: Expected int >= 1"),
    ("text", ("splits", "val", "bytes"), 7, "field splits.val.bytes is 7, its files have"),
    ("text", ("splits", "train", "files", 0, "file"), "../x.bin", r"field splits.train.files\[0\].file: Expected str"),
    ("text", ("vocab_size",), 999, "field vocab_size is 999, its tokenizer's is 258"),
    ("text", ("bos",), 5, "field bos is 5, its tokenizer's is 256"),
    ("text", ("format",), "plainllama tokens 2", "field format: Invalid enum value 'plainllama tokens 2'"),
    ("text", ("kind",), "chat", "it is of kind chat, and field template is missing"),
    ("text", ("template",), "plain", "it is of kind text, and field template does not belong there"),
    ("chat", ("kind",), "text", "it is of kind text, and field template does not belong there"),
    ("chat", ("max_len",), "64", "field max_len: Expected int, got str"),
    ("preference", ("splits", "train", "targets"), 1, "field splits.train.targets is 1, its files have"),
], ids=str)  # fmt: skip
def test_a_wrong_value_in_meta_json_is_named_with_its_field(kind, path, value, message, sets, edited):
    folder = edited(kind, with_value(meta_of(sets[kind]), path, value))
    with pytest.raises(ValueError, match=f"{folder}/meta.json: {message}"):
        use(folder)


def test_a_field_that_is_missing_in_meta_json_is_named_and_one_that_is_unknown_is_left_alone(sets, edited):
    good = meta_of(sets["text"])
    for name in ("tokenizer", "vocab_size", "dtype", "splits", "bos", "eos"):
        meta = {key: value for key, value in good.items() if key != name}
        with pytest.raises(ValueError, match=f"meta.json.*field `?{name}`?"):
            use(edited("text", meta))
    later = good | {"later": {"x": [1]}}
    later["splits"]["train"]["files"][0]["more"] = "x"
    folder = edited("text", later)
    use(folder)
    assert read_meta(folder) == later


@pytest.mark.parametrize("text, message", [
    ("[]", "must be an object"),
    ("{", "is not JSON"),
    ('{"splits": ' + DEEP + "}", "is not JSON that can be read .nested too deeply"),
    ('{"vocab_size": ' + LONG + "}", "is not JSON that can be read .a number has too many digits"),
    ("\ud800", "is not"),
], ids=["list", "cut", "deep", "long", "surrogate"])  # fmt: skip
def test_a_meta_json_that_is_no_record_is_one_sentence(text, message, sets, edited):
    folder = edited("text", "{}")
    (folder / "meta.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=f"meta.json {message}"):
        use(folder)


def test_a_set_prepared_by_an_earlier_version_is_read(sets, edited):
    """The fields that the first version wrote, and no others."""
    meta = meta_of(sets["text"])
    files = ("file", "tokens", "documents", "bytes", "sha256")
    for split in meta["splits"].values():
        split["files"] = [{name: file[name] for name in files} for file in split["files"]]
    names = ("format", "tokenizer", "vocab_size", "dtype", "bos", "eos", "documents_are", "val_fraction",
             "empty_documents", "duplicate_documents", "splits", "command", "python")  # fmt: skip
    use(edited("text", {name: meta[name] for name in names}))


# ---- flags ----


@pytest.mark.parametrize("flags, message", [
    (dict(tokenizer="train:²"), "--tokenizer train:²: give a vocabulary size above 300 and at most 1,000,000"),
    (dict(tokenizer="train:" + "9" * 5000), "--tokenizer train:9999.*: give a vocabulary size"),
    (dict(tokenizer="train:99999999"), "--tokenizer train:99999999: give a vocabulary size"),
    (dict(source=("",)), "--source names nothing"),
    (dict(source=()), "--source names nothing"),
    (dict(workers=10**20), "--workers 100000000000000000000 must be at least 1 and at most 1024, or 0"),
    (dict(cleaning=Cleaning(min_answer_chars=-1), template="plain"), "--min_answer_chars -1 must be at least 0"),
    (dict(cleaning=Cleaning(max_chars=-1), template="plain"), "--max_chars -1 must be at least 0"),
    (dict(show=""), '--show "" needs a folder'),
    (dict(show="SET", n=-1), "--n -1 must be at least 1"),
    (dict(show="SET", n=0), "--n 0 must be at least 1"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")  # fmt: skip
def test_a_flag_without_sense_is_named(flags, message, sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("A text.")
    source = (str(sets["chat"].parent / "chats.jsonl"),) if "template" in flags else ("a.md",)
    flags = dict(source=source, out="d", tokenizer="bytes") | flags
    flags |= {"show": str(sets["chat"])} if flags.get("show") == "SET" else {}
    with pytest.raises(ValueError, match=message) as error:
        data.main(Config(**flags))
    assert said_in_one_sentence(error.value) and len(str(error.value)) < 200
    assert not (tmp_path / "d").exists() and not (tmp_path / "data").exists()


# ---- folders that are being made ----


def test_of_two_preparations_into_one_folder_one_is_told_and_the_other_good(sets, tmp_path, monkeypatch):
    source, write, said = (str(sets["text"].parent / "texts.jsonl"),), data.write_dataset, []

    def another_begins(*args, **options):
        if not said:
            said.append("")
            with pytest.raises(ValueError) as error:
                prepare(source, tmp_path / "d", "bytes", workers=1)
            said.append(str(error.value))
        return write(*args, **options)

    monkeypatch.setattr(data, "write_dataset", another_begins)
    prepare(source, tmp_path / "d", "bytes", 0.3, workers=1)
    assert said[1] == f"{tmp_path / 'd'} is being written by another process right now; wait for it, or end it"
    use(tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def exporters(tmp_path: Path) -> dict:
    """What makes a folder: for each a function of its name."""
    config = ModelConfig(32, 1, 4, 2, 48, vocab_size=258, max_seq_len=64)
    base = tmp_path / "base"
    save(Transformer(config), base, Tokenizer("bytes"))
    tensors = {f"blocks.0.attention.query.lora_{part}": torch.ones(shape) for part, shape in
               (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    settings = adapter_settings(base, 2, 4.0, ["query"])
    save_adapter(Adapter(base, settings, tensors), tmp_path / "adapter", Tokenizer("bytes"))
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.md").write_text(f"Document {i}.")
    return {
        "data.py": lambda out: prepare((str(tmp_path / "in"),), out, "bytes", 0.3, workers=1),
        "--export": lambda out: sample.main(sample.Config(model=str(base), export=str(out))),
        "--export_adapter": lambda out: sample.main(
            sample.Config(model=str(tmp_path / "adapter"), export_adapter=str(out))
        ),
    }


@pytest.mark.parametrize("which", ["data.py", "--export", "--export_adapter"])
def test_a_folder_that_is_somebody_elses_is_neither_written_into_nor_deleted(which, tmp_path):
    make = exporters(tmp_path)[which]
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out.unfinished is in the way and not of this project's making"):
        make(tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "mine" and not (tmp_path / "out").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists; choose another folder or delete it"):
        make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "nowhere").exists()
    from lib.files import OURS, new_folder

    with new_folder(tmp_path / "busy"), pytest.raises(ValueError, match="busy is being written by another process"):
        make(tmp_path / "busy")
    (tmp_path / "killed.unfinished").mkdir()  # as a process that was killed leaves it
    (tmp_path / "killed.unfinished" / OURS).touch()
    (tmp_path / "killed.unfinished" / "half").write_text("half")
    make(tmp_path / "killed")
    assert not {"half", OURS} & {path.name for path in (tmp_path / "killed").iterdir()}


def test_a_folder_is_made_although_another_process_looks_whose_it_is(tmp_path, monkeypatch):
    from lib import files

    really, held = files.lock, [None]
    monkeypatch.setattr(files, "lock", lambda path: held.pop() if held else really(path))
    with files.new_folder(tmp_path / "d"):
        pass
    assert not held and (tmp_path / "d").is_dir()


def test_a_source_called_as_the_unfinished_folder_is_not_deleted(sets, tmp_path):
    source = tmp_path / "out.unfinished"
    source.mkdir()
    (source / "a.jsonl").write_bytes((sets["text"].parent / "texts.jsonl").read_bytes())
    with pytest.raises(ValueError, match="out.unfinished is in the way"):
        prepare((str(source),), tmp_path / "out", "bytes", 0.3, workers=1)
    assert (source / "a.jsonl").stat().st_size and not (tmp_path / "out").exists()


# ---- a full disk ----


@pytest.fixture
def no_room_for(monkeypatch):
    """A function: from now on there is no room for files of this name."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def fill(name: str):
        really = builtins.open

        def limited(path, mode="r", *args, **options):
            full = isinstance(path, str | os.PathLike) and Path(path).name == name and mode[0] in "wax"
            return really("/dev/full" if full else path, mode, *args, **options)

        monkeypatch.setattr(builtins, "open", limited)
        monkeypatch.setattr(io, "open", limited)

    return fill


def ends_with_one_sentence(main, config_class, words: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        run_command(main, config_class)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("kind, name", [
    ("texts", "tokenizer.bytes"), ("texts", "train_00000.bin"), ("texts", "meta.json"), ("texts", "tokenizer.model"),
    ("chats", "train_00000.bin"), ("chats", "train_00000.mask"), ("chats", "train_00000.bounds"),
    ("chats", "removed.jsonl"), ("chats", "cleaning.txt"),
])  # fmt: skip
def test_a_full_disk_names_the_file_of_a_preparation(kind, name, sets, tmp_path, monkeypatch, capsys, no_room_for):
    no_room_for(name)
    source, out = sets["text"].parent / f"{kind}.jsonl", tmp_path / "out"
    tokenizer = "train:310" if name == "tokenizer.model" else "bytes"
    words = ["data.py", "--source", str(source), "--out", str(out), "--tokenizer", tokenizer, "--workers", "1"]
    words += ["--template", "plain"] if kind == "chats" else []
    said = ends_with_one_sentence(data.main, Config, words, monkeypatch, capsys)
    assert said == f"data.py: {out}.unfinished/{name}: {os.strerror(errno.ENOSPC)}"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_database_of_what_was_seen(sets, tmp_path, monkeypatch, capsys):
    class Full:
        def executescript(self, script): ...

        def execute(self, *args):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: Full())
    out = tmp_path / "out"
    words = ["data.py", "--source", str(sets["text"].parent / "texts.jsonl"), "--out", str(out), "--tokenizer", "bytes"]
    said = ends_with_one_sentence(data.main, Config, words, monkeypatch, capsys)
    assert said == f"data.py: {out}.unfinished/seen.db: database or disk is full" and not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_download_without_blaming_the_network(tmp_path, monkeypatch):
    def full(url, part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources, "_fetch", full)
    with pytest.raises(OSError) as error:
        sources.download("http://x/a.txt", tmp_path, sources.CORPORA["tinyshakespeare"])
    assert error.value.filename == str(tmp_path / "a.txt.part") and error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("which, name", [
    ("--export", "model.safetensors"), ("--export", "config.json"), ("--export", "tokenizer.bytes"),
    ("--export_adapter", "adapter_model.safetensors"), ("--export_adapter", "adapter_config.json"),
])  # fmt: skip
def test_a_full_disk_names_the_file_of_an_export(which, name, tmp_path, monkeypatch, capsys, no_room_for):
    exporters(tmp_path)
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    model = tmp_path / ("base" if which == "--export" else "adapter")
    words = ["sample.py", "--model", str(model), which, str(out)]
    if name.endswith(".safetensors"):  # not written by Python
        monkeypatch.setattr(sample, "print", lambda *args: None, raising=False)
        limit = (model / name).stat().st_size // 2
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            said = ends_with_one_sentence(sample.main, sample.Config, words, monkeypatch, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert said.startswith(f"sample.py: {out}.unfinished/{name}: ") and "File too large" in said
    else:
        no_room_for(name)
        said = ends_with_one_sentence(sample.main, sample.Config, words, monkeypatch, capsys)
        assert said == f"sample.py: {out}.unfinished/{name}: {os.strerror(errno.ENOSPC)}"
    assert not out.exists() and not (tmp_path / "out.unfinished").exists()


def test_a_model_in_shards_that_finds_no_room_leaves_nothing(tmp_path, no_room_for):
    model = Transformer(ModelConfig(32, 1, 4, 2, 48, vocab_size=258, max_seq_len=64))
    no_room_for("model.safetensors.index.json")
    with pytest.raises(OSError) as error:
        save(model, tmp_path / "m", max_shard_bytes=20_000)
    assert error.value.filename.endswith("m.unfinished/model.safetensors.index.json") and not list(tmp_path.iterdir())
    save(model, tmp_path / "n", max_shard_bytes=20_000_000)
    assert load(tmp_path / "n").config == model.config
