"""Tokenizers, preparation, and the batch of a step."""

import base64
import gzip
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from conftest import ROOT, command, flags, prepare
from data import IGNORE, Dataset, Mixture, Tokenizer, shuffled
from lib.documents import PIECE_CHARS, read_documents, split_documents
from lib.record_files import SUFFIXES as CHAT_SUFFIXES
from lib.shards import ShardWriter, token_dtype
from lib.sources import CORPORA, SUFFIXES, Corpus, Flags, download, find_files
from lib.tokenizer_training import train_tokenizer

TYPED = "Hi </s> <s>[INST] <<SYS>> ### Assistant: <|endoftext|> <unk> <0x0A> [/INST]"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Tokenizer:
    """A tokenizer of 512 pieces trained on this folder's tests."""

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer((file.read_text() for file in sorted((ROOT / "tests").glob("*.py"))), 512, path)
    return Tokenizer(path)


@pytest.fixture(params=["bytes", "trained", "llama2", "gpt2", "cl100k"])
def tokenizer(request, shared) -> Tokenizer:
    if request.param == "trained":
        return request.getfixturevalue("trained")
    files = {
        "llama2": "llama2_tokenizer/tokenizer.model",
        "gpt2": "gpt2_bpe/r50k_base.tiktoken",
        "cl100k": "gpt2_bpe/cl100k_base.tiktoken",
    }
    return Tokenizer(shared(files[request.param]) if request.param in files else request.param)


# ---- tokenizers ----


def test_the_llama2_tokenizer_gives_the_known_ids(shared):
    tokenizer = Tokenizer(shared("llama2_tokenizer/tokenizer.model"))
    for case in json.loads(shared("llama2_tokenizer/encode_cases.json").read_text()):
        assert tokenizer.encode(case["text"], bos=True) == case["ids_with_bos"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32_000)


def test_tiktoken_files_give_the_known_ids(shared):
    tiktoken = pytest.importorskip("tiktoken")
    gpt2, cl100k = (Tokenizer(shared(f"gpt2_bpe/{name}.tiktoken")) for name in ("r50k_base", "cl100k_base"))
    assert gpt2.encode("Hello world") == [15496, 995] and cl100k.encode("Hello world") == [9906, 1917]
    assert (gpt2.eos_id, gpt2.vocab_size, cl100k.eos_id, cl100k.vocab_size) == (50_256, 50_257, 100_257, 100_277)
    assert tiktoken.__version__


def test_typed_text_never_becomes_a_control_token(tokenizer):
    """Trap 8."""
    ids = tokenizer.encode(TYPED)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == TYPED
    assert tokenizer.encode(TYPED, bos=True, eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.encode_prompt(TYPED).count(tokenizer.bos_id) == 1
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == TYPED


def any_text(draw: random.Random) -> str:
    ranges = [(0, 127), (0, 0x10FFFF), (0x2580, 0x2590), (0x300, 0x36F), (9, 13), (32, 32), (0x1F600, 0x1F64F)]
    codes = (draw.randint(*draw.choice(ranges)) for _ in range(draw.randrange(60)))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("tokenizer", ["bytes", "trained", "gpt2", "cl100k"], indirect=True)
def test_any_unicode_text_comes_back(tokenizer):
    draw = random.Random(0)
    texts = [any_text(draw) for _ in range(1500)] + [
        "",
        " ",
        "  a",
        "\0",
        "▁",
        " ▁ ▁▁x",
        "\r\n\t\v",
        "\u2028",
        "🙂" * 3,
        "a\u0301",
        "<0xE2>",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_trained_tokenizer_suits_code(trained):
    ids = trained.encode("def f(x):\n    return x\n\n\ndef g(x):\n        return x\n")
    assert len(ids) < 30
    assert trained.decode(ids[-1:]).endswith("\n")


def test_a_blank_at_the_end_of_a_prompt_is_left_off(shared, trained):
    """Trap 9: it belongs to the word that follows."""
    llama = Tokenizer(shared("llama2_tokenizer/tokenizer.model"))
    assert llama.encode("A") == [319] and llama.encode("Answer: A") == [673, 29901, 319]
    assert llama.encode("Answer: ") == [673, 29901, 29871]
    assert llama.encode_prompt("Answer: ") == llama.encode_prompt("Answer:") == [1, 673, 29901]
    assert trained.encode_prompt("return  ") == trained.encode_prompt("return")
    assert Tokenizer("bytes").encode_prompt("a ") == [256, 97, 32]


def test_a_tokenizer_file_is_the_same_after_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256 and again.encode(TYPED) == tokenizer.encode(TYPED)


@pytest.mark.parametrize("spec", ["nothing.model", "gpt3", "folder", "text.model", "text.tiktoken"])
def test_what_is_no_tokenizer_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.model").write_text("just text")
    (tmp_path / "text.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0\n")
    with pytest.raises(ValueError, match="no tokenizer|is not a tokenizer file|has 1 ranks"):
        Tokenizer(spec)


def test_a_tiktoken_name_without_a_network_says_what_to_do(tmp_path):
    done = command("data.py", "--tokenizer", "gpt2", "--out", str(tmp_path / "d"), check=False,
                   env={"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"})  # fmt: skip
    assert (
        done.returncode == 2
        and "give --tokenizer the path of a .tiktoken file" in done.stderr
        and "Traceback" not in done.stderr
    )


# ---- documents ----


def test_every_kind_of_file_is_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    records = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one\n", "two ü"))
    (tmp_path / "a.jsonl").write_text(records + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    parquet.write_table(pyarrow.table({"text": ["one\n", None, "two ü"]}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert list(read_documents(tmp_path / name)) == ["one\n", "two ü"]
    for name in ("d.py", "e.md"):
        (tmp_path / name).write_bytes(b"x = 1\r\n\n\n# end")
        assert list(read_documents(tmp_path / name)) == ["x = 1\r\n\n\n# end"]
    (tmp_path / "f.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>three")
    assert list(read_documents(tmp_path / "f.txt")) == ["one", "two", "three"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_long_text_is_cut_without_losing_a_character(separator, tmp_path):
    text = separator.join(f"word {i} ü" for i in range(30_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_documents(tmp_path / "a.txt"))
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(PIECE_CHARS <= len(piece) <= PIECE_CHARS + 100 for piece in pieces[:-1])
    assert separator == " " or all(piece.endswith(separator) for piece in pieces[:-1])


def test_a_long_document_is_whole_where_there_are_separators_and_a_very_long_one_is_cut(tmp_path, monkeypatch):
    long = "line of text\n" * 9_000
    (tmp_path / "a.txt").write_text(f"{long}<|endoftext|>short<|endoftext|>{long}end")
    assert list(read_documents(tmp_path / "a.txt")) == [long.strip(), "short", f"{long}end"]
    monkeypatch.setattr("lib.documents.DOCUMENT_CHARS", 10_000)
    (tmp_path / "b.md").write_text("".join(f"{i} line of text\n" for i in range(9_000)))
    pieces = [text for _, text in split_documents([tmp_path / "b.md"], Flags(), tmp_path / "seen.db")]
    assert "".join(pieces) == (tmp_path / "b.md").read_text() and max(map(len, pieces)) < 11_000


def test_the_end_of_a_text_is_for_validation_to_the_character(tmp_path):
    """And a tokenizer is trained on the rest alone."""
    lines = [f"line {i} of {'some' if i < 1850 else 'zzz'} text, {i**3}\n" for i in range(2000)]
    text = "".join(lines)
    (tmp_path / "a.txt").write_text(text)
    for spec in ("bytes", "train:310"):
        out = tmp_path / spec.replace(":", "_")
        words = dict(source=tmp_path / "a.txt", out=out, tokenizer=spec, val_fraction=0.1, workers=1)
        command("data.py", *flags(words), "--val_last")
        tokenizer, found, border = Tokenizer(out), {}, int(0.9 * len(text))
        for split in ("train", "val"):
            ids = np.fromfile(out / f"{split}_00000.bin", np.uint16).tolist()
            found[split] = tokenizer.decode([i for i in ids if i not in (tokenizer.bos_id, tokenizer.eos_id)])
        assert found == {"train": text[:border], "val": text[border:]}
        assert "--val_last" in json.loads((out / "meta.json").read_text())["command"]
    assert len(tokenizer.encode("zzz")) > len(tokenizer.encode("text"))


def test_a_separator_is_found_wherever_a_block_ends(tmp_path):
    for length in range(PIECE_CHARS - 14, PIECE_CHARS + 2):
        (tmp_path / "a.txt").write_text("x" * length + "<|endoftext|>" + "y" * 9)
        assert list(read_documents(tmp_path / "a.txt")) == ["x" * length, "y" * 9]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"fine\nfine\n\xff\xfe\n", "a.txt:3: not UTF-8"),
    ("a.py", b"x = 1\n# caf\xe9\n", "a.py:2: not UTF-8"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "fine"}\n{"content": "x"}\n', "a.jsonl:2: no field `text`"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field `text` is int"),
    ("a.jsonl", b'["text"]\n', "a.jsonl:1: no field `text`"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: .*surrogate"),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl:1: not UTF-8"),
])  # fmt: skip
def test_a_bad_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare((str(tmp_path / name),), tmp_path / "out", "bytes", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "train:400"])
def test_a_damaged_file_is_named(tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    whole = gzip.compress(b'{"text": "a text"}\n' * 9)
    contents = {"a.jsonl.gz": whole[:-20], "b.jsonl.gz": b"plain", "c.parquet": b"plain", "d.md": b"\xff"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged|d.md:1: not UTF-8") as error:
            prepare((str(tmp_path / name),), tmp_path / "out", tokenizer, workers=1)
        assert "\n" not in str(error.value)


def test_nothing_to_train_a_tokenizer_on_is_said(tmp_path):
    (tmp_path / "a.md").write_text(" \n")
    with pytest.raises(ValueError, match="--tokenizer train:400: there is no text to train on"):
        prepare((str(tmp_path / "a.md"),), tmp_path / "out", "train:400", workers=1)


def test_parquet_without_a_text_column_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column `text`"):
        list(read_documents(tmp_path / "a.parquet"))


# ---- downloads, from a server on this machine ----


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served; the first answer for a path that holds "broken" stops half way."""
    (tmp_path / "served").mkdir()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path.startswith("/moved/")
            data = (tmp_path / "served" / self.path.split("/")[-1]).read_bytes()
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            requests.append((self.path, start))
            self.send_response(302 if moved else 416 if start and start >= len(data) else 206 if start else 200)
            if moved:  # as Hugging Face does
                self.send_header("Location", "/" + self.path.split("/")[-1])
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", str(0 if moved else max(0, len(data) - start)))
            self.end_headers()
            if moved:
                return
            stop = len(data) // 2 if "broken" in self.path and len(requests) == 1 else len(data)
            self.wfile.write(data[start:stop])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served", requests
        server.shutdown()


def test_a_broken_download_is_continued(server, tmp_path):
    address, served, requests = server
    (served / "broken.txt").write_bytes(os.urandom(3_000_000))
    corpus = Corpus((f"{address}/broken.txt",), ".txt", "none")
    with pytest.raises(ValueError, match="broke off at 1500000 of 3000000|could not be fetched"):
        download(corpus.urls[0], tmp_path / "got", corpus)
    assert not (tmp_path / "got" / "broken.txt").exists()
    path = download(corpus.urls[0], tmp_path / "got", corpus)
    assert path.read_bytes() == (served / "broken.txt").read_bytes()
    assert [start for _, start in requests] == [0, 1_500_000]
    assert download(corpus.urls[0], tmp_path / "got", corpus) == path and len(requests) == 2


def test_a_download_that_was_complete_but_for_its_name_is_finished(server, tmp_path):
    address, served, _ = server
    (served / "a.txt").write_bytes(b"all of it")
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "a.txt.part").write_bytes(b"all of it")
    assert download(f"{address}/a.txt", tmp_path / "got", Corpus((), ".txt", "none")).read_bytes() == b"all of it"


@pytest.mark.parametrize("part", [b"none of it", b"all of it, really, and more"])
def test_a_download_is_checked_against_what_a_redirection_names(part, server, tmp_path):
    address, served, _ = server
    (served / "a.txt").write_bytes(b"all of it, really")
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "a.txt.part").write_bytes(part)
    with pytest.raises(ValueError, match="deleted"):
        download(f"{address}/moved/a.txt", tmp_path / "got", Corpus((), ".txt", "none"))
    assert list((tmp_path / "got").iterdir()) == []
    assert download(f"{address}/moved/a.txt", tmp_path / "got", Corpus((), ".txt", "none")).exists()


def test_a_download_with_another_checksum_is_deleted(server, tmp_path):
    address, served, _ = server
    (served / "a.txt").write_bytes(b"not what was expected")
    with pytest.raises(ValueError, match="expected 21 with " + "0" * 64):
        download(f"{address}/a.txt", tmp_path / "got", Corpus((), ".txt", "none", "0" * 64))
    assert list((tmp_path / "got").iterdir()) == []


def test_without_a_network_a_download_names_the_local_way(tmp_path):
    words = flags({"source": "tinystories", "out": tmp_path / "d", "tokenizer": "bytes"})
    done = command("data.py", *words, check=False,
                   env={"HTTPS_PROXY": "http://127.0.0.1:9"})  # fmt: skip
    assert (
        done.returncode == 2
        and "give --source a local file or folder" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_every_named_corpus_has_an_address_a_format_and_a_licence():
    for corpus in CORPORA.values():
        assert corpus.urls and corpus.licence and all(url.startswith("https://") for url in corpus.urls)
        assert corpus.suffix in (CHAT_SUFFIXES if corpus.chats else SUFFIXES)


def test_the_files_of_a_corpus_do_not_take_each_others_place(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.sources._fetch", lambda url, part: part.write_text(url) and (None, ""))
    monkeypatch.setitem(CORPORA, "tinyshakespeare", Corpus(CORPORA["tinyshakespeare"].urls, ".txt", "public domain"))
    files = find_files(tuple(CORPORA), tmp_path)
    assert len(set(files)) == sum(len(corpus.urls) for corpus in CORPORA.values())
    assert all(path.name.endswith(SUFFIXES + CHAT_SUFFIXES) for path in files)


# ---- preparation ----


def write_texts(folder, numbers):
    folder.mkdir(exist_ok=True)
    for i in numbers:
        words = hashlib.sha256(b"%d" % i).hexdigest()
        (folder / f"{i:04d}.md").write_text(f"{i} " * (i % 50) + " ".join(words[j : j + 3] for j in range(60)))


def documents(folder, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    meta, tokenizer = json.loads((folder / "meta.json").read_text()), Tokenizer(folder)
    tokens = np.concatenate(
        [
            np.fromfile(folder / entry["file"], "<u2" if meta["dtype"] == "uint16" else "<u4")
            for entry in meta["splits"][split]["files"]
        ]
    )
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert (
        len(starts) == len(ends)
        and starts[0] == 0
        and ends[-1] == len(tokens) - 1
        and (starts[1:] == ends[:-1] + 1).all()
    )
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends)]


def test_a_dataset_holds_every_document_once_and_meta_counts_them(tmp_path):
    """Traps 8 and 11: one BOS and one EOS a document, and meta.json says what the files hold."""
    write_texts(tmp_path / "in", range(200))
    (tmp_path / "in" / "0003.md").write_text("Grüße 안녕 " * 20)
    (tmp_path / "in" / "copy.md").write_text((tmp_path / "in" / "0007.md").read_text())
    (tmp_path / "in" / "empty.md").write_text(" \n")
    (tmp_path / "in" / "notes.xyz").write_text("not read")
    meta = prepare((str(tmp_path / "in"),), tmp_path / "d", "bytes", 0.2, workers=2)
    found = {split: documents(tmp_path / "d", split) for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(
        (tmp_path / "in" / f"{i:04d}.md").read_text() for i in range(200)
    )
    assert (meta["duplicate_documents"], meta["empty_documents"]) == (1, 1)
    assert meta["tokenizer"]["sha256"] == Tokenizer("bytes").sha256 and meta["vocab_size"] == 258
    for split, texts in found.items():
        counts = meta["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] == counts["bytes"] + 2 * len(texts) == sum(entry["tokens"] for entry in counts["files"])
    assert 20 <= len(found["val"]) <= 60


def test_adding_data_moves_no_document_from_validation_to_training(tmp_path):
    write_texts(tmp_path / "in", range(101, 200))
    prepare((str(tmp_path / "in"),), tmp_path / "a", "bytes", 0.2, workers=1)
    write_texts(tmp_path / "in", [*range(101), *range(200, 300)])
    prepare((str(tmp_path / "in"),), tmp_path / "b", "bytes", 0.2, workers=1)
    assert set(documents(tmp_path / "a", "val")) <= set(documents(tmp_path / "b", "val"))
    assert set(documents(tmp_path / "a", "train")) <= set(documents(tmp_path / "b", "train"))


def test_the_hash_of_a_text_says_whether_it_is_for_validation(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare((str(tmp_path / "a.jsonl"),), tmp_path / "d", "bytes", 0.2, workers=1)
    hashes = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in texts]
    expected = [text for text, number in zip(texts, hashes) if number < 0.2 * 2**64]
    assert documents(tmp_path / "d", "val") == expected and 10 < len(expected) < 30


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.shards.TASK_CHARS", 2_000)
    write_texts(tmp_path / "in", range(300))
    for workers in (1, 2, 3):
        prepare((str(tmp_path / "in"),), tmp_path / f"d{workers}", "train:400", 0.1, workers)
    for path in (tmp_path / "d1").iterdir():
        if path.name != "meta.json":
            assert (
                path.read_bytes()
                == (tmp_path / "d2" / path.name).read_bytes()
                == (tmp_path / "d3" / path.name).read_bytes()
            )


def test_token_files_are_divided_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.shards.SHARD_TOKENS", 1_000)
    monkeypatch.setattr("lib.shards.TASK_CHARS", 500)
    write_texts(tmp_path / "in", range(200))
    meta = prepare((str(tmp_path / "in"),), tmp_path / "d", "bytes", 0.2, workers=1)
    files = meta["splits"]["train"]["files"]
    assert len(files) > 5 and [entry["file"] for entry in files[:2]] == ["train_00000.bin", "train_00001.bin"]
    data = Dataset(tmp_path / "d", "train", 16)
    assert len(data) == sum((entry["tokens"] - 1) // 16 for entry in files)
    assert data.batch(range(len(data))).tokens.shape == (len(data), 16)


def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path):
    """Killed at random moments, then run again."""

    write_texts(tmp_path / "in", range(2000))
    words = [
        sys.executable,
        str(ROOT / "data.py"),
        *flags({"source": tmp_path / "in", "out": tmp_path / "d", "tokenizer": "train:400", "workers": 2}),
    ]
    draw = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(0.2, 1.2))
        if process.poll() is None:
            assert not (tmp_path / "d").exists() or (tmp_path / "d" / "meta.json").exists()
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "d").exists():
            break
    if not (tmp_path / "d").exists():
        subprocess.run(words, check=True, capture_output=True)
    assert len(documents(tmp_path / "d", "train") + documents(tmp_path / "d", "val")) == 2000


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for processes in /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    write_texts(tmp_path / "in", range(3000))
    options = {"source": tmp_path / "in", "out": tmp_path / "d", "tokenizer": "bytes", "workers": 2}
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), *flags(options)], stderr=subprocess.DEVNULL)
    children = []
    while len(children) < 3 and process.poll() is None:  # two workers and the tracker of their resources
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = file.read().split()
    process.kill()
    process.wait()

    def alive() -> bool:
        states = []
        for child in children:
            try:
                states.append(open(f"/proc/{child}/stat").read().split(") ")[1][0])
            except FileNotFoundError:
                pass
        return any(state != "Z" for state in states)

    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children and not alive()


def test_ids_above_65535_are_stored_in_four_bytes(tmp_path, shared):
    """Trap 11."""
    assert token_dtype(65_536) == np.dtype("<u2") and token_dtype(65_537) == np.dtype("<u4")
    with pytest.raises(ValueError, match="token id 70000 does not fit in uint16"):
        ShardWriter(tmp_path, np.dtype("<u2")).write("train", np.array([70_000]), 1, 1)
    write_texts(tmp_path / "in", range(100))
    (tmp_path / "in" / "z.md").write_text("안녕하세요 " * 20)
    prepare((str(tmp_path / "in"),), tmp_path / "d", str(shared("gpt2_bpe/cl100k_base.tiktoken")), 0.1, workers=1)
    data = Dataset(tmp_path / "d", "train", 8)
    assert data.meta["dtype"] == "uint32" and data.batch(range(len(data))).tokens.max() > 65_535


def refused(*words: str) -> str:
    done = command("data.py", *words, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_bad_input_is_one_sentence_and_nothing_is_written_over(tmp_path):
    (tmp_path / "empty").mkdir()
    write_texts(tmp_path / "in", range(3))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("keep me")
    good = {"source": tmp_path / "in", "out": tmp_path / "d", "tokenizer": "bytes"}
    for change, message in (
        ({"source": tmp_path / "none"}, "is neither a file, a folder"),
        ({"source": tmp_path / "empty"}, "holds no files that end in"),
        ({"out": tmp_path / "taken"}, "taken exists; choose another folder"),
        ({"val_fraction": 1.5}, "--val_fraction 1.5 must lie between 0 and 1"),
        ({"val_fraction": 0.0001}, "none of the 3 documents went to val"),
        ({"tokenizer": "train:12"}, "vocabulary size above 300"),
        ({"tokenizer": "train:90000"}, "--tokenizer train:90000"),
        ({"tokenizer": "words"}, "no tokenizer words"),
        ({"workers": -1}, "--workers -1 must be at least 1"),
        ({"out": tmp_path / "in" / "0000.md" / "d"}, "Not a directory"),
    ):
        assert message in refused(*flags(good | change))
    assert "--val_last divides text, not" in refused(*flags(good), "--template", "plain", "--val_last")
    assert (tmp_path / "taken" / "x").read_text() == "keep me" and not (tmp_path / "d").exists()
    assert "--val_fraction" in command("data.py", "--val_fractoin", "0.1", check=False).stderr  # a suggestion


# ---- batches ----


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 1000])
def test_shuffled_is_a_permutation_that_differs_by_epoch(size):
    orders = [[shuffled(i, size, (0, epoch)) for i in range(size)] for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
        moved = [abs(a - i) for i, a in enumerate(orders[0])]
        assert sum(moved) / size > size / 5  # a random permutation moves an item by a third of the size


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_goes_through_the_data_in_another_order(packed, tiny_data):
    data = Dataset(tiny_data, "train", 48, packed)
    size = len(data)
    epochs = [(0, 7), (1, 7), (2, 7), (0, 8)]  # with their seeds
    orders = [[data.index(epoch * size + i, seed) for i in range(size)] for epoch, seed in epochs]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(set(map(tuple, orders))) == 4 and size > 100


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_ranks_together_read_each_window_once_an_epoch(world, tiny_data):
    """Trap 12: also where the length of the data does not divide by anything."""
    batch_size, drawn = 24, []
    data = next(
        data
        for data in (Mixture((str(tiny_data),), "train", n).parts[0] for n in range(50, 99))
        if world == 1 or len(data) % world
    )
    mixture = Mixture((str(tiny_data),), "train", data.seq_len)
    for step in range(3 * len(data) // batch_size):
        per_rank = [list(mixture.numbers(step, batch_size, rank, world)) for rank in range(world)]
        assert sum(per_rank, []) == list(mixture.numbers(step, batch_size))
        drawn += [mixture.draw(number, 7)[1] for number in sum(per_rank, [])]
    for epoch in range(2):
        counts = Counter(drawn[epoch * len(data) : (epoch + 1) * len(data)])
        assert set(counts) == set(range(len(data))) and set(counts.values()) == {1}


def test_windows_are_the_tokens_and_no_more(tiny_data):
    """Trap 11: no token past the count is ever returned."""
    data = Dataset(tiny_data, "train", 10)
    flat = np.fromfile(tiny_data / "train_00000.bin", "<u2")
    assert len(data) == (len(flat) - 1) // 10
    tokens, targets, *_ = data.batch(range(len(data)))
    assert (tokens.ravel() == flat[: len(data) * 10]).all() and (targets.ravel() == flat[1 : len(data) * 10 + 1]).all()
    assert data.spread_indices(4) == [i * len(data) // 4 for i in range(4)]
    assert data.spread_indices(10**9) == list(range(len(data)))


def test_a_damaged_dataset_is_refused(tiny_data, tmp_path):
    import shutil

    def damaged(change):
        folder = tmp_path / change.__name__
        shutil.copytree(tiny_data, folder)
        change(folder)
        with pytest.raises(ValueError) as error:
            Dataset(folder, "train", 10).batch([0])
        return str(error.value)

    def truncated(folder):
        os.truncate(folder / "train_00000.bin", 1001)

    def without_file(folder):
        (folder / "train_00000.bin").unlink()

    def without_meta(folder):
        (folder / "meta.json").unlink()

    def other_tokenizer(folder):
        (folder / "tokenizer.bytes").write_text("something else")

    def without_tokenizer(folder):
        (folder / "tokenizer.bytes").unlink()

    def with_other_tokens(folder):
        (folder / "train_00000.bin").write_bytes(b"\xff" * (folder / "train_00000.bin").stat().st_size)

    def with_half_a_meta(folder):
        os.truncate(folder / "meta.json", 100)

    assert "has a token 65535, its vocabulary only 258" in damaged(with_other_tokens)
    assert "meta.json is not JSON" in damaged(with_half_a_meta)
    assert "train_00000.bin has 1001 bytes, meta.json says" in damaged(truncated)
    assert "has 0 bytes" in damaged(without_file)
    assert "holds no dataset (no meta.json); make one: python data.py" in damaged(without_meta)
    assert "the dataset was made with" in damaged(other_tokenizer)
    assert "holds no tokenizer" in damaged(without_tokenizer)
    with pytest.raises(ValueError, match="no val file has 1000001 tokens"):
        Dataset(tiny_data, "val", 1_000_000)


@pytest.mark.parametrize("packed", [False, True])
def test_an_id_outside_the_vocabulary_is_refused(packed, tiny_data, tmp_path):
    import shutil

    shutil.copytree(tiny_data, tmp_path / "d")
    tokens = np.memmap(tmp_path / "d" / "train_00000.bin", "<u2", "r+")
    tokens[5] = 258  # ids go from 0 to 257
    data = Dataset(tmp_path / "d", "train", 10, packed)
    with pytest.raises(ValueError, match="has a token 258, its vocabulary only 258"):
        data.batch(range(len(data)))


# ---- size and speed ----

MEASURE = """
import os, re, resource, sys, time
sys.path.insert(0, {root!r})
from data import Config, main
if __name__ == "__main__":
    started = time.perf_counter()
    main(Config(({source!r},), {out!r}, {tokenizer!r}, workers={workers}))
    # ru_maxrss of this process counts what started it as well
    mine = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print(time.perf_counter() - started, max(int(mine), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
"""


def prepare_100_mb(shared, tmp_path, workers: int) -> tuple[float, float]:
    """Seconds and the largest peak of resident memory of any process, in bytes."""

    if not (tmp_path / "big.txt").exists():
        texts = [path.read_text() for path in sorted(shared("text/gutenberg").glob("*.txt"))]
        with open(tmp_path / "big.txt", "w") as file:
            counter = 0
            while file.tell() < 100_000_000:
                counter += 1
                file.writelines(
                    text.replace("\n\n", f"\n\n{counter} ") for text in texts
                )  # no piece a copy of one before
    script = tmp_path / "measure.py"
    tokenizer, out = str(shared("llama2_tokenizer/tokenizer.model")), str(tmp_path / f"out{workers}")
    values = dict(root=str(ROOT), source=str(tmp_path / "big.txt"), out=out, tokenizer=tokenizer, workers=workers)
    script.write_text(MEASURE.format(**values))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()[-2:]))


@pytest.mark.slow
def test_preparing_100_mb_stays_under_1_gb(shared, tmp_path):
    seconds, peak = prepare_100_mb(shared, tmp_path, 2)
    meta = json.loads((tmp_path / "out2" / "meta.json").read_text())
    assert sum(split["bytes"] for split in meta["splits"].values()) > 60_000_000
    assert peak < 1e9, f"{peak / 1e6:.0f} MB"


@pytest.mark.slow
def test_two_workers_are_at_least_1_7_times_one(shared, tmp_path):
    (one, _), (two, _) = (prepare_100_mb(shared, tmp_path, workers) for workers in (1, 2))
    assert one / two >= 1.7, f"{one:.1f} s and {two:.1f} s"


# ---- packed rows and mixtures ----


def test_rows_are_filled_with_whole_documents(tmp_path):
    """Each document is there once, cut only where it is longer than a row; targets are the inputs one later."""
    texts = [f"{'x' * n} {i}" for i, n in enumerate([3, 90, 20, 61, 62, 63, 64, 200, 5, 40] * 20)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:03}.md").write_text(text)
    prepare((str(tmp_path / "in"),), tmp_path / "d", "bytes", 0.05, workers=1)
    data = Dataset(tmp_path / "d", "train", 64, packed=True)
    flat = np.fromfile(tmp_path / "d" / "train_00000.bin", "<u2")
    documents = [tuple(part) for part in np.split(flat, np.flatnonzero(flat == 256)[1:])]
    pieces, used = Counter(), 0
    for index in range(len(data)):
        tokens, targets, bounds, _ = data.batch([index])
        positions = data.batch([index]).positions()
        assert bounds[0] == 0 and bounds[-1] == 64 and (np.diff(bounds) > 0).all()
        for begin, end in zip(bounds, bounds[1:]):
            assert (positions[0, begin:end] == np.arange(end - begin)).all()
            if (targets[0, begin:end] != IGNORE).any():
                pieces[(*tokens[0, begin:end], targets[0, end - 1])] += 1
                assert (targets[0, begin : end - 1] == tokens[0, begin + 1 : end]).all()
                used += end - begin
    expected = Counter(piece for d in documents for piece in (d[i : i + 65] for i in range(0, len(d) - 1, 64)))
    assert pieces == expected and used == len(flat) - len(documents)
    assert used / (len(data) * 64) > 0.97


def test_a_dataset_whose_documents_begin_and_end_alike_is_packed_too(tmp_path, shared):
    """GPT-2's tokenizer has one token for both."""
    write_texts(tmp_path / "in", range(60))
    prepare((str(tmp_path / "in"),), tmp_path / "d", str(shared("gpt2_bpe/r50k_base.tiktoken")), 0.1, workers=1)
    data = Dataset(tmp_path / "d", "train", 512, packed=True)
    tokens, targets, bounds, _ = data.batch(range(len(data)))
    inside = np.split(tokens.ravel(), bounds[1:-1])
    ends = np.split(targets.ravel(), bounds[1:-1])
    whole = [(a, b) for a, b in zip(inside, ends) if b[0] != IGNORE]
    assert len(whole) == data.meta["splits"]["train"]["documents"]
    assert all(a[0] == 50256 and b[-1] == 50256 and (a[1:] != 50256).all() for a, b in whole)


def mixture(tiny_data, tmp_path, *weights: float) -> Mixture:
    """Sources of different lengths."""
    folders = [str(tiny_data)]
    for i in range(1, len(weights)):
        write_texts(tmp_path / f"in{i}", range(40 * i))
        prepare((str(tmp_path / f"in{i}"),), tmp_path / f"d{i}", "bytes", 0.1, workers=1)
        folders.append(str(tmp_path / f"d{i}"))
    return Mixture(tuple(f"{folder}:{weight}" for folder, weight in zip(folders, weights)), "train", 16)


def test_a_mixture_has_exactly_its_proportions_and_each_source_its_own_epochs(tiny_data, tmp_path):
    data = mixture(tiny_data, tmp_path, 6, 3, 1)
    drawn = [data.draw(number, 5) for number in range(12_000)]
    for block in range(12):
        assert Counter(source for source, _ in drawn[block * 1000 : (block + 1) * 1000]) == {0: 600, 1: 300, 2: 100}
    first = [source for source, _ in drawn[:60]]
    assert first != sorted(first) and len(set(first)) == 3
    for source, part in enumerate(data.parts):
        indices = [index for other, index in drawn if other == source]
        for epoch in range(len(indices) // len(part)):
            assert sorted(indices[epoch * len(part) : (epoch + 1) * len(part)]) == list(range(len(part)))
        share = (0.6, 0.3, 0.1)[source]
        assert data.epochs(12_000)[part.folder] == pytest.approx(12_000 * share / len(part), abs=1e-3)
    assert [data.draw(number, 6) for number in range(50)] != drawn[:50]


def test_all_ranks_together_read_the_mixture_that_one_reads(tiny_data, tmp_path):
    data = mixture(tiny_data, tmp_path, 2, 1)
    whole = data.batch(data.numbers(7, 24), 3).tokens
    for world in (1, 2, 3, 8):
        parts = [data.batch(data.numbers(7, 24, rank, world), 3).tokens for rank in range(world)]
        assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("sources, message", [
    (("DATA:0.5", "DATA:zero"), "DATA:zero: zero is no number; write FOLDER or FOLDER:WEIGHT"),
    (("DATA:-1",), "DATA:-1: the weight must be above 0"),
    (("DATA:1", "COPY:1e-5"), "its share is below 1 in 1000"),
    (("DATA", "OTHER"), "OTHER was made with another tokenizer than"),
])  # fmt: skip
def test_an_impossible_mixture_is_refused(sources, message, tiny_data, tmp_path):
    write_texts(tmp_path / "in", range(60))
    prepare((str(tmp_path / "in"),), tmp_path / "other", "train:400", 0.1, workers=1)
    shutil.copytree(tiny_data, tmp_path / "copy")
    places = {"DATA": str(tiny_data), "OTHER": str(tmp_path / "other"), "COPY": str(tmp_path / "copy")}
    for name, place in places.items():
        sources, message = tuple(source.replace(name, place) for source in sources), message.replace(name, place)
    with pytest.raises(ValueError, match=message):
        Mixture(sources, "train", 16)


def test_a_target_that_does_not_count_is_called_the_same_everywhere():
    import model

    assert IGNORE == model.IGNORE
