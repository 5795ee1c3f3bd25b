"""Text to tokens on disk, and tokens on disk to the batch of a step.

    python data.py --source stdlib --out data/stdlib --tokenizer train:4096

The way of a corpus:
1. `read_documents` streams the documents of the source: files, folders, Python's standard library, a download.
2. An exact duplicate of an earlier document is dropped and counted.
3. The hash of a document decides whether it is for validation, so adding data never moves one.
4. All cores turn documents into tokens, BOS before and EOS after each.
5. The tokens are written to flat files `{train,val}_{00000…}.bin`, described by meta.json, in a folder
   that gets its name only when it is complete.

A dataset is read by `TokenDataset` as windows of its text, or by `PackedDataset` as rows of whole documents; `Mixture`
draws from several. Which sequences a step trains on is a pure function of (seed, step).
"""

import base64
import bisect
import functools
import gzip
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import traceback
import urllib.error
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

IGNORE = -100                  # a target that does not count, as in model.py
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
SEPARATOR = "<|endoftext|>"    # divides the documents of a .txt file that has it
PIECE_CHARS = 16_384           # a .txt file without it is cut at the first blank line after this many characters
DOCUMENT_CHARS = 1_000_000     # any longer document is cut likewise, so that memory stays bounded
TASK_CHARS = 1_000_000         # about so much text goes to a worker at a time
TOKENIZER_CHARS = 16_000_000   # a tokenizer is trained on about so much text
SHARD_TOKENS = 100_000_000     # a token file is closed when it holds this many
MIXTURE_BLOCK = 1000           # sequences in which a mixture has exactly its proportions


@dataclass(frozen=True)
class Corpus:
    """A public corpus that `--source NAME` downloads."""

    urls: tuple[str, ...]
    suffix: str
    licence: str
    sha256: str = ""           # of the only file; where it is empty, the server's own checksum is used


CORPORA = {
    "tinyshakespeare": Corpus(
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        ".txt",
        "public domain",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": Corpus(
        ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",),
        ".txt",
        "CDLA-Sharing-1.0",
    ),
    "fineweb-edu": Corpus(
        tuple(
            f"https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_{i:05d}.parquet"
            for i in range(16)
        ),
        ".parquet",
        "ODC-By 1.0",
    ),
    "c4": Corpus(
        tuple(
            f"https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{i:05d}-of-01024.json.gz"
            for i in range(8)
        ),
        ".jsonl.gz",
        "ODC-By 1.0",
    ),
}


# ---- tokenizers ----


class Tokenizer:
    """Text to ids and back; the special ids come only from bos_id and eos_id, never from text.

    spec is a sentencepiece model (`tokenizer.model`), a tiktoken ranks file (`*.tiktoken`), a folder that holds
    one of them, or a name: `gpt2`, `cl100k_base`, `bytes`. Raises ValueError for anything else.

    >>> Tokenizer("bytes").encode("né", bos=True)
    [256, 110, 195, 169]
    """

    FILES = ("tokenizer.model", "tokenizer.tiktoken", "tokenizer.bytes")

    def __init__(self, spec: str | Path):
        path = Path(spec)
        if str(spec) in ("gpt2", "cl100k_base"):
            self.name, self.file, self.data = str(spec), "tokenizer.tiktoken", _download_ranks(str(spec))
        elif str(spec) == "bytes":
            self.name, self.file, self.data = "bytes", "tokenizer.bytes", b"ids 0 to 255 are bytes\n"
        elif path.is_dir():
            found = [path / name for name in self.FILES if (path / name).exists()]
            if not found:
                raise ValueError(f"{path} holds no tokenizer (looked for {', '.join(self.FILES)})")
            self.__init__(found[0])
            return
        elif path.name == "tokenizer.bytes" and path.is_file():
            self.name, self.file, self.data = "bytes", "tokenizer.bytes", path.read_bytes()
        elif path.is_file():
            self.name, self.data = path.name, path.read_bytes()
            self.file = "tokenizer.tiktoken" if path.suffix == ".tiktoken" else "tokenizer.model"
        else:
            raise ValueError(f"no tokenizer {spec}: neither a file nor one of gpt2, cl100k_base, bytes")
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        try:
            dict(zip(self.FILES, (self._sentencepiece, self._tiktoken, self._bytes)))[self.file]()
        except RuntimeError as error:
            raise ValueError(f"{spec} is not a tokenizer file: neither sentencepiece's nor *.tiktoken") from error
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{spec} has no BOS or no EOS (ids {self.bos_id} and {self.eos_id})")

    def _bytes(self):
        self.bos_id, self.eos_id, self.vocab_size = 256, 257, 258
        self._encode = lambda text: list(text.encode())
        self._decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")

    def _sentencepiece(self):
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=self.data)
        self.bos_id, self.eos_id, self.vocab_size = model.bos_id(), model.eos_id(), model.vocab_size()
        self._encode, self._decode = model.encode, model.decode
        if not model.encode_as_pieces("a")[0].startswith("▁"):
            # Made by train_tokenizer: nothing is added or normalised, so that only U+2581, which sentencepiece
            # uses for the blank, would not come back. It is spelled out in bytes.
            block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

            def encode(text: str) -> list[int]:
                first, *rest = map(model.encode, text.split("▁"))
                return first + [i for part in rest for i in block + part]

            self._encode = encode

    def _tiktoken(self):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self.data.splitlines())}
        except ValueError:
            raise ValueError(f"{self.name} is not a tiktoken ranks file (lines of base64 and a number)") from None
        # the split pattern is not in the file; how many ranks it has tells which of OpenAI's encodings it is
        cl100k = (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
            r"|\s*[\r\n]|\s+(?!\S)|\s"
        )
        known = {50_256: (r50k_pat_str, 50_256, 50_257), 100_256: (cl100k, 100_257, 100_277)}
        if len(ranks) not in known:
            raise ValueError(f"{self.name} has {len(ranks)} ranks; gpt2 has 50256 and cl100k_base 100256")
        pattern, end_of_text, self.vocab_size = known[len(ranks)]
        self.bos_id = self.eos_id = end_of_text
        model = tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end_of_text}
        )
        self._encode = model.encode_ordinary
        self._decode = lambda ids: model.decode([i for i in ids if i < len(ranks)])

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text as ordinary text: `<s>` or `[INST]` typed in it are characters like any other."""
        return [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the ids of a text to be continued.

        Blanks at its end are left off, because a vocabulary of words holds them with the word that follows
        (LLaMA-2: "Answer: A" ends in the id of " A", "Answer: " in a lone blank that never precedes a word).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r} is not Unicode text") from None
        return self.encode(text if self.name == "bytes" else text.rstrip(" "), bos=True)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids give nothing, broken UTF-8 gives U+FFFD."""
        return self._decode([int(i) for i in ids])

    def save(self, folder: str | Path):
        (Path(folder) / self.file).write_bytes(self.data)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer file of a model: in its folder, or for a checkpoint in its run's folder; None without one."""
    places = [folder / name for folder in (Path(path), Path(path).parent) for name in Tokenizer.FILES]
    return next(filter(Path.is_file, places), None)


def _download_ranks(name: str) -> bytes:
    import tiktoken

    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except OSError as error:
        raise ValueError(
            f"{name} has to be downloaded once and that failed ({type(error).__name__}); "
            f"without a network give --tokenizer the path of a .tiktoken file"
        ) from None
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path):
    """Train a byte-pair encoding on texts: whitespace kept, pieces may span blanks and line ends, every Unicode
    text comes back exactly. Raises ValueError when the texts have too few different pairs for vocab_size."""
    from sentencepiece import SentencePieceTrainer

    failed = []  # what reading the texts raised; the trainer would hand it on as a text of its own

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except BaseException as error:  # Ctrl-C too
            failed.append(error)

    try:
        with open(path, "wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=sentences(),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_by_whitespace=False,
                split_digits=True,
                max_sentence_length=8192,
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1] or "there is no text to train on"
        raise (failed or [ValueError(f"--tokenizer train:{vocab_size}: {reason}")])[0] from None
    if failed:
        raise failed[0]


def _sentences(texts: Iterator[str], size: int = 2048) -> Iterator[str]:
    """Runs of whole lines of at most size characters, which is what the trainer takes as a sentence."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + size) + 1 if start + size < len(text) else len(text)
            end = end or min(start + size, len(text))
            yield text[start:end]
            start = end


# ---- documents ----


def find_files(source: tuple[str, ...], download_folder: Path) -> list[Path]:
    """The files of `stdlib`, of named corpora (downloaded here), and of local paths, in a fixed order."""
    files = []
    for item in source:
        if item == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
            paths = sorted(root.rglob("*.py"))
            files += [path for path in paths if not skip.intersection(path.relative_to(root).parts)]
        elif item in CORPORA:
            print(f"{item}: {len(CORPORA[item].urls)} file(s), licence {CORPORA[item].licence}", file=sys.stderr)
            files += [download(url, download_folder / item, CORPORA[item]) for url in CORPORA[item].urls]
        elif Path(item).is_dir():
            inside = [path for path in sorted(Path(item).rglob("*")) if path.name.endswith(SUFFIXES)]
            found = [path for path in inside if path.is_file() and not path.name.startswith(".")]
            if not found:
                raise ValueError(f"{item} holds no files that end in {', '.join(SUFFIXES)}")
            files += found
        elif Path(item).is_file():
            if not item.endswith(SUFFIXES):
                raise ValueError(f"{item} must end in one of {', '.join(SUFFIXES)}")
            files.append(Path(item))
        else:
            raise ValueError(f"--source {item} is neither a file, a folder, stdlib nor one of {', '.join(CORPORA)}")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order, holding one in memory at a time. Raises ValueError naming file and line.

    A .py or .md file is one document, a line of .jsonl and a row of .parquet another (their field `text`). A .txt
    file is divided at `<|endoftext|>`; one without it, a book or a play, is cut into pieces at blank lines.
    """
    try:
        yield from _read_parquet(path) if path.name.endswith(".parquet") else _read_text(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _read_text(path: Path) -> Iterator[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _read_jsonl(path, file)
            elif path.name.endswith(".txt"):
                yield from _split_text(file)
            else:
                yield file.read()
    except UnicodeDecodeError as error:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        raise


def _read_jsonl(path: Path, file) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
        except (KeyError, TypeError):
            raise ValueError(f"{path}:{number}: no field `text`") from None
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: field `text` is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}:{number}: field `text` has half of a surrogate pair, not Unicode text") from None
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"{path}: no column `text` (it has {', '.join(table.schema_arrow.names)})")
    for batch in table.iter_batches(256, columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _split_text(file) -> Iterator[str]:
    blocks = lambda: iter(lambda: file.read(PIECE_CHARS), "")
    tail, separated = "", False
    for block in blocks():
        separated = SEPARATOR in tail + block
        if separated:
            break
        tail = block[-len(SEPARATOR) :]
    file.seek(0)
    if not separated:
        yield from cut(blocks(), PIECE_CHARS)
        return
    parts, tail = [], ""  # the document so far, and its last characters, where a separator may have begun
    for block in blocks():
        *documents, rest = (tail + block).split(SEPARATOR)
        for document in documents:
            yield "".join([*parts, document]).strip()
            parts = []
        tail = rest[-len(SEPARATOR) :]
        parts.append(rest[: len(rest) - len(tail)])
    yield "".join([*parts, tail]).strip()


def cut(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text that comes in blocks into pieces of about size characters, without losing one: after the first
    blank line past size; where there is none up to 4 * size after a line, and without a line right there."""
    buffer = ""
    for block in itertools.chain(blocks, [""]):
        buffer += block
        while len(buffer) > (4 if block else 1) * size:  # far enough ahead to choose; at the end, the rest
            ends = (buffer.find(mark, size, 4 * size) + len(mark) for mark in ("\n\n", "\n"))
            end = next((end for end in ends if end >= size), size)
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def download(url: str, folder: Path, corpus: Corpus) -> Path:
    """Fetch url into folder, continuing where an earlier attempt stopped; checked by size and SHA-256.

    Raises ValueError without a network, and when size or checksum differ (the file is then deleted).
    """
    path = folder / (url.rsplit("/", 1)[1].removesuffix(".json.gz").removesuffix(corpus.suffix) + corpus.suffix)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        size, checksum = _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{url} could not be fetched ({getattr(error, 'reason', error)}); without a network, give --source a local "
            f"file or folder; typed again, the command continues the download"
        ) from None
    checksum = corpus.sha256 or checksum
    have = part.stat().st_size
    if size is not None and have < size:
        raise ValueError(f"{url} broke off at {have} of {size} bytes; type the command again to continue")
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if (size is not None and have > size) or (len(checksum) == 64 and found != checksum):
        part.unlink()
        expected = f"expected {size} with {checksum or 'any'}"
        raise ValueError(f"{url}: {have} bytes with SHA-256 {found}, {expected}; deleted")
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path) -> tuple[int | None, str]:
    """Append to part what it lacks of url; returns the size and the SHA-256 that the server names, where it does.

    Hugging Face names the checksum, as X-Linked-ETag, in the answer that redirects to the file.
    """
    from tqdm import tqdm

    answers = []

    class Remember(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, message, headers, new_url):
            answers.append(headers)
            return super().redirect_request(request, file, code, message, headers, new_url)

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    size = None
    try:
        with urllib.request.build_opener(Remember).open(request, timeout=60) as response:
            answers.append(response.headers)
            have = have if response.status == 206 else 0
            if length := response.headers["Content-Length"]:
                size = have + int(length)
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr)
            with open(part, "ab" if have else "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left after the bytes that part has
            raise
        answers.append(error.headers)
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else None
    checksums = [headers["X-Linked-ETag"].strip('"') for headers in answers if headers["X-Linked-ETag"]]
    return size, (checksums or [""])[0]


# ---- preparation ----


def split_documents(
    files: list[Path], val_fraction: float, database: Path, counts: Counter
) -> Iterator[tuple[str, str]]:
    """("train" or "val", text) of every document that is neither empty nor a copy of an earlier one.

    The first 8 bytes of a document's SHA-256, as a fraction of 2^64, lie under val_fraction for validation. The
    hashes seen so far are kept in a database file, so that memory does not grow with the corpus.
    """
    seen = sqlite3.connect(database, isolation_level=None)
    seen.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF")  # nobody needs the database after a crash
    seen.executescript("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN")
    for path in files:
        for text in (piece for document in read_documents(path) for piece in cut_document(document)):
            if not text.strip():
                counts["empty"] += 1
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount:
                counts["duplicates"] += 1
                continue
            yield "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train", text
    seen.close()
    database.unlink()


def cut_document(text: str) -> Iterable[str]:
    return cut([text], DOCUMENT_CHARS) if len(text) > DOCUMENT_CHARS else [text]


def _tasks(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Group documents of one split into tasks of about TASK_CHARS characters."""
    waiting, sizes = {"train": [], "val": []}, Counter()
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= TASK_CHARS:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)


def _end_with_parent():
    """In a worker: end as soon as the main process does, even when that was killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def _worker_tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)


def _tokenize(task: tuple[str, list[str]], tokenizer_path: str) -> tuple[str, np.ndarray, int, int]:
    """In a worker: (split, tokens of all documents with BOS and EOS, number of documents, their UTF-8 bytes)."""
    split, texts = task
    tokenizer = _worker_tokenizer(tokenizer_path)
    ids = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype=np.uint32) for text in texts]
    return split, np.concatenate(ids), len(texts), sum(len(text.encode()) for text in texts)


def _map_in_order(function, tasks, workers: int) -> Iterator:
    """function over tasks in other processes: results in order, and never more than 3 tasks a worker in memory."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        running = deque()
        for task in tasks:
            running.append(pool.submit(function, task))
            if len(running) >= 3 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class ShardWriter:
    """Writes `{split}_{00000…}.bin` and keeps what meta.json says of each file."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype, self.files, self.hashes = folder, dtype, {"train": [], "val": []}, {}

    def write(self, split: str, tokens: np.ndarray, documents: int, num_bytes: int):
        files = self.files[split]
        if not files or files[-1]["tokens"] >= SHARD_TOKENS:
            files.append({"file": f"{split}_{len(files):05d}.bin", "tokens": 0, "documents": 0, "bytes": 0})
            self.hashes[split] = hashlib.sha256()
        if tokens.max() > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {tokens.max()} does not fit in {self.dtype}")
        data = tokens.astype(self.dtype).tobytes()
        with open(self.folder / files[-1]["file"], "ab") as file:
            file.write(data)
        self.hashes[split].update(data)
        files[-1]["sha256"] = self.hashes[split].hexdigest()
        for name, number in (("tokens", len(tokens)), ("documents", documents), ("bytes", num_bytes)):
            files[-1][name] += number

    def splits(self) -> dict:
        """For each split the sums over its files, and the files."""
        return {
            split: {name: sum(file[name] for file in files) for name in ("tokens", "documents", "bytes")}
            | {"files": files}
            for split, files in self.files.items()
        }


def prepare(
    source: tuple[str, ...], out: str | Path, tokenizer: str, val_fraction: float = 0.05, workers: int | None = None
) -> dict:
    """Make the dataset folder out and return its meta.json. The result does not depend on the number of workers.

    Raises ValueError for bad input; out appears only when everything in it is complete.
    """
    out, workers = Path(out), workers or os.cpu_count()
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1, or 0 for all cores")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another folder or delete it")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    trained = tokenizer.removeprefix("train:") if tokenizer.startswith("train:") else None
    if trained is not None and not (trained.isdigit() and int(trained) > 300):
        raise ValueError(f"--tokenizer {tokenizer}: give a vocabulary size above 300, such as train:4096")
    if trained is None:
        Tokenizer(tokenizer)  # before anything is downloaded
    files = find_files(source, out.parent / "downloads")
    aside = out.with_name(out.name + ".unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        meta = _write_dataset(aside, files, tokenizer, val_fraction, workers)
    except BaseException:
        shutil.rmtree(aside)
        raise
    words = ["python", "data.py", "--source", *source, "--out", str(out), "--tokenizer", tokenizer]
    meta["command"] = shlex.join([*words, "--val_fraction", str(val_fraction)])
    (aside / "meta.json").write_text(json.dumps(meta, indent=2))
    os.replace(aside, out)
    return meta


def _write_dataset(aside: Path, files: list[Path], tokenizer: str, val_fraction: float, workers: int) -> dict:
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in files)
    path = tokenizer
    if tokenizer.startswith("train:"):
        path = aside / "tokenizer.model"
        megabytes = min(total, TOKENIZER_CHARS) / 1e6
        print(f"training a tokenizer of {tokenizer[6:]} pieces on {megabytes:.1f} MB", file=sys.stderr)
        texts = _tokenizer_texts(files, val_fraction, aside / "seen.db", total)
        train_tokenizer(texts, int(tokenizer[6:]), path)
    chosen = Tokenizer(path)
    chosen.save(aside)

    counts = Counter()
    writer = ShardWriter(aside, token_dtype(chosen.vocab_size))
    tasks = _tasks(split_documents(files, val_fraction, aside / "seen.db", counts))
    work = functools.partial(_tokenize, tokenizer_path=str(aside / chosen.file))
    expected = None if any(path.name.endswith((".gz", ".parquet")) for path in files) else total
    with tqdm(total=expected, unit="B", unit_scale=True, desc="tokenizing", file=sys.stderr) as bar:
        for split, tokens, documents, num_bytes in _map_in_order(work, tasks, workers):
            writer.write(split, tokens, documents, num_bytes)
            bar.update(num_bytes)

    meta = {
        "format": "plainllama tokens 1",
        "tokenizer": {"name": chosen.name, "file": chosen.file, "sha256": chosen.sha256},
        "vocab_size": chosen.vocab_size,
        "dtype": writer.dtype.name,
        "bos": chosen.bos_id,
        "eos": chosen.eos_id,
        "documents_are": "BOS, text, EOS",
        "val_fraction": val_fraction,
        "empty_documents": counts["empty"],
        "duplicate_documents": counts["duplicates"],
        "splits": writer.splits(),
        "python": sys.version.split()[0],
    }
    for split, numbers in meta["splits"].items():
        if not numbers["documents"]:
            found = sum(other["documents"] for other in meta["splits"].values())
            hint = f"give more text, or {'raise' if split == 'val' else 'lower'} --val_fraction {val_fraction}"
            raise ValueError(f"none of the {found} documents went to {split}; {hint}")
    return meta


def _tokenizer_texts(files: list[Path], val_fraction: float, database: Path, total: int) -> Iterator[str]:
    """Training documents for the tokenizer, about TOKENIZER_CHARS of them spread over the whole corpus."""
    read = kept = 0
    for split, text in split_documents(files, val_fraction, database, Counter()):
        read += len(text)
        if split == "train" and kept <= read * min(1.0, TOKENIZER_CHARS / total) and kept < TOKENIZER_CHARS:
            kept += len(text)
            yield text


# ---- reading ----


class Batch(NamedTuple):
    """Sequences (n, T) of int64: inputs, and the targets, which are the inputs one later."""

    tokens: np.ndarray
    targets: np.ndarray
    bounds: np.ndarray | None = None  # of packed rows laid end to end: where each document begins, and the end

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """For packed rows what model.Documents is made of: positions (n, T) in the document, and bounds as int32."""
        positions = np.arange(self.tokens.size) - np.repeat(self.bounds[:-1], np.diff(self.bounds))
        return positions.reshape(self.tokens.shape), self.bounds.astype(np.int32)


class TokenDataset:
    """One split of a dataset folder as windows of seq_len + 1 tokens: the inputs and, one later, the targets.

    Windows start every seq_len tokens, do not reach over the end of a file, and run over document boundaries.
    Raises ValueError when the folder is missing or incomplete, or its files are not what meta.json says.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int):
        self.meta = read_meta(folder)
        self.folder, self.seq_len, self.files = folder, seq_len, []
        for entry in self.meta["splits"][split]["files"]:
            path = Path(folder) / entry["file"]
            expected = entry["tokens"] * np.dtype(self.meta["dtype"]).itemsize
            found = path.stat().st_size if path.exists() else 0
            if found != expected:
                raise ValueError(f"{path} has {found} bytes, meta.json says {expected}; prepare the dataset again")
            self.files.append(np.memmap(path, np.dtype(self.meta["dtype"]).newbyteorder("<"), "r"))
        self.counts = [max(0, (len(tokens) - 1) // seq_len) for tokens in self.files]
        if not sum(self.counts):
            raise ValueError(f"{folder}: no {split} file has {seq_len + 1} tokens, one window of --seq_len {seq_len}")

    def __len__(self) -> int:
        return sum(self.counts)

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The stretches of text in a sequence: (file, first token, number of inputs)."""
        for file, count in enumerate(self.counts):
            if index < count:
                return [(file, index * self.seq_len, self.seq_len)]
            index -= count
        raise IndexError(index)

    def batch(self, indices) -> Batch:
        """The sequences of these indices. Raises ValueError for a token outside the vocabulary."""
        tokens = np.zeros((len(indices), self.seq_len), np.int64)
        targets = np.full_like(tokens, IGNORE)
        bounds = []
        for row, index in enumerate(indices):
            used = 0
            for file, start, size in self.pieces(int(index)):
                bounds.append(row * self.seq_len + used)
                tokens[row, used : used + size] = self.files[file][start : start + size]
                targets[row, used : used + size] = self.files[file][start + 1 : start + size + 1]
                used += size
            if used < self.seq_len:  # what is left over is as another document, without targets
                bounds.append(row * self.seq_len + used)
        if (largest := max(tokens.max(), targets.max())) >= self.meta["vocab_size"]:
            raise ValueError(f"{self.folder} has a token {largest}, its vocabulary only {self.meta['vocab_size']}")
        return Batch(tokens, targets, np.array([*bounds, tokens.size]))

    def index(self, number: int, seed: int) -> int:
        """The index of the sequence that is drawn as number `number`: an epoch is each once, shuffled anew."""
        return shuffled(number % len(self), len(self), (seed, number // len(self)))

    def place(self, index: int) -> str:
        """Where a sequence comes from: file, tokens, and which documents of the file they belong to."""
        names = []
        for file, start, size in self.pieces(index):
            begun = np.count_nonzero(self.files[file][: start + 1] == self.meta["bos"])
            ended = begun + np.count_nonzero(self.files[file][start + 1 : start + size] == self.meta["bos"])
            documents = f"document {begun}" if begun == ended else f"documents {begun}-{ended}"
            names.append(f"{Path(self.files[file].filename).name} tokens {start}-{start + size} ({documents})")
        return f"{self.folder}: {', '.join(names)}"

    def spread_indices(self, count: int) -> list[int]:
        """At most count sequences spaced evenly over the split, always the same."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]


class PreferenceDataset(TokenDataset):
    """One split of preference pairs: an index is a pair, its batch two rows, the chosen conversation first.

    Only the answer that is compared has targets. Rows are padded at the end to the longest of the batch, rounded up.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int):
        self.meta = read_meta(folder)
        self.folder, self.seq_len, self.files, self.masks, pairs = folder, seq_len, [], [], []
        for file, entry in enumerate(self.meta["splits"][split]["files"]):
            path = Path(folder) / entry["file"]
            self.files.append(np.memmap(path, np.dtype(self.meta["dtype"]).newbyteorder("<"), "r"))
            self.masks.append(np.fromfile(path.with_suffix(".mask"), np.uint8))
            bounds = np.fromfile(path.with_suffix(".bounds"), "<u8").astype(np.int64)
            pairs += [(file, *bounds[first : first + 3]) for first in range(0, len(bounds) - 1, 2)]
        self.pairs = np.array(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        file, begin, middle, end = self.pairs[index].tolist()
        return [(file, begin, middle - begin - 1), (file, middle, end - middle - 1)]

    def batch(self, indices) -> Batch:
        rows = [piece for index in indices for piece in self.pieces(int(index))]
        width = min(self.seq_len, -(-max(size for _, _, size in rows) // 64) * 64)
        tokens = np.zeros((len(rows), width), np.int64)
        targets = np.full_like(tokens, IGNORE)
        for row, (file, start, size) in enumerate(rows):
            tokens[row, :size] = self.files[file][start : start + size]
            later = slice(start + 1, start + size + 1)
            targets[row, :size] = np.where(self.masks[file][later], self.files[file][later].astype(np.int64), IGNORE)
        return Batch(tokens, targets)


class PackedDataset(TokenDataset):
    """One split as rows filled with whole documents, padded at the end; a document that is longer than a row is cut.

    Rows are packed by best fit over the whole split, the longest pieces first; 20 bytes of memory a document.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int):
        super().__init__(folder, split, seq_len)
        pieces = np.concatenate([self._cut(file) for file in range(len(self.files))])
        row_of = pack(pieces[:, 2], seq_len)
        self.table = pieces[np.argsort(row_of, kind="stable")]
        self.first = np.concatenate(([0], np.cumsum(np.bincount(row_of))))

    def _cut(self, file: int) -> np.ndarray:
        """The pieces of a file's documents, as in `pieces`; EOS has no target and is no input."""
        tokens = self.files[file]
        starts = np.flatnonzero(tokens == self.meta["bos"])
        if self.meta["bos"] == self.meta["eos"]:  # GPT-2's tokenizer has one token for both
            starts = starts[::2]
        inputs = np.diff(starts, append=len(tokens)) - 1
        per_document = -(-inputs // self.seq_len)
        number = np.arange(per_document.sum()) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        offset = number * self.seq_len
        sizes = np.minimum(self.seq_len, np.repeat(inputs, per_document) - offset)
        return np.stack((np.full_like(sizes, file), np.repeat(starts, per_document) + offset, sizes), 1)

    def __len__(self) -> int:
        return len(self.first) - 1

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        return [tuple(piece) for piece in self.table[self.first[index] : self.first[index + 1]].tolist()]


def pack(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece, when the longest goes first, always to the row that it fills best (best-fit decreasing).

    >>> pack(np.array([2, 7, 3, 5, 3]), 10).tolist()
    [1, 0, 0, 1, 1]
    """
    rows = np.empty(len(sizes), np.int64)
    by_room = [[] for _ in range(room + 1)]  # the rows that have this much room left
    some = 0  # bit r is set where by_room[r] is not empty
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if fitting := some >> size:
            left = size + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                some ^= 1 << left
        else:
            row, left, count = count, room, count + 1
        rows[piece] = row
        if left > size:
            by_room[left - size].append(row)
            some |= 1 << (left - size)
    return rows


def mixture_weights(sources: tuple[str, ...]) -> tuple[list[str], list[float]]:
    """The folders of sources `FOLDER` or `FOLDER:WEIGHT`, and their shares, which add up to 1. Raises ValueError.

    >>> mixture_weights(("data/a:3", "data/b"))
    (['data/a', 'data/b'], [0.75, 0.25])
    """
    folders, weights = [], []
    for source in sources:
        folder, colon, weight = source.rpartition(":")
        if not colon or Path(source).exists():
            folder, weight = source, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            raise ValueError(f"--data {source}: {weight} is no number; write FOLDER or FOLDER:WEIGHT") from None
        folders.append(folder)
        if not 0 < weights[-1] < math.inf:
            raise ValueError(f"--data {source}: the weight must be above 0")
    return folders, [weight / sum(weights) for weight in weights]


class Mixture:
    """Datasets drawn from together, each source `FOLDER` or `FOLDER:WEIGHT`.

    Every MIXTURE_BLOCK sequences have exactly the proportions of the weights, in an order shuffled anew for each block;
    each source goes through its own epochs. Raises ValueError for a bad weight and for sources of different tokenizers.
    """

    def __init__(self, sources: tuple[str, ...], split: str, seq_len: int, packed: bool = False):
        self.folders, self.weights = mixture_weights(sources)
        self.kind = read_meta(self.folders[0]).get("kind", "text")
        self.packed = packed and self.kind == "text"
        kinds = {"text": PackedDataset if packed else TokenDataset, "preference": PreferenceDataset}
        self.parts = [kinds[self.kind](folder, split, seq_len) for folder in self.folders]
        self.block = functools.lru_cache(maxsize=4)(self._block)
        for part in self.parts:
            if part.meta["tokenizer"]["sha256"] != self.parts[0].meta["tokenizer"]["sha256"]:
                raise ValueError(f"--data {part.folder} was made with another tokenizer than {self.folders[0]}")
        self.ends = [round(end * MIXTURE_BLOCK) for end in itertools.accumulate(self.weights)]
        for source, begin, end in zip(sources, [0, *self.ends], self.ends):
            if begin == end:
                raise ValueError(f"--data {source}: its share is below 1 in {MIXTURE_BLOCK}")

    def __len__(self) -> int:
        """How many sequences the sources have together: an epoch."""
        return sum(map(len, self.parts))

    def draw(self, number: int, seed: int) -> tuple[int, int]:
        """(source, index) of the sequence that is drawn as number `number` of the run."""
        if len(self.parts) == 1:
            return 0, self.parts[0].index(number, seed)
        block, place = divmod(number, MIXTURE_BLOCK)
        source, drawn = self.block(block, seed)[place]
        return source, self.parts[source].index(drawn, seed)

    def _block(self, block: int, seed: int) -> list[tuple[int, int]]:
        """(source, how many were drawn from it before) of each sequence of a block."""
        order = [bisect.bisect(self.ends, shuffled(i, MIXTURE_BLOCK, (seed, block))) for i in range(MIXTURE_BLOCK)]
        drawn = [block * (end - begin) for begin, end in zip([0, *self.ends], self.ends)]
        pairs = []
        for source in order:
            pairs.append((source, drawn[source]))
            drawn[source] += 1
        return pairs

    def numbers(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
        """The sequences of this rank in optimizer step `step` (from 0), of the batch_size that all ranks read."""
        share = batch_size // world
        first = step * batch_size + rank * share
        return range(first, first + share)

    def batch(self, numbers, seed: int) -> Batch:
        drawn = [self.draw(number, seed) for number in numbers]
        rows = [self.parts[source].batch([index]) for source, index in drawn]
        width = max(row.tokens.shape[1] for row in rows)  # they differ only where rows are pairs
        wide = lambda values, fill: np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)
        tokens = np.concatenate([wide(row.tokens, 0) for row in rows])
        targets = np.concatenate([wide(row.targets, IGNORE) for row in rows])
        if not self.packed:
            return Batch(tokens, targets)
        starts = [row.bounds[:-1] + i * width for i, row in enumerate(rows)]
        return Batch(tokens, targets, np.array([*np.concatenate(starts), tokens.size]))

    def place(self, number: int, seed: int) -> str:
        source, index = self.draw(number, seed)
        return self.parts[source].place(index)

    def epochs(self, count: int) -> dict[str, float]:
        """How often each source has been gone through after count sequences."""
        shares = [(end - begin) / MIXTURE_BLOCK for begin, end in zip([0, *self.ends], self.ends)]
        return {
            folder: round(count * share / len(part), 4)
            for folder, share, part in zip(self.folders, shares, self.parts)
        }




def shuffled(index: int, size: int, key: tuple[int, int]) -> int:
    """Where index goes in a permutation of range(size) drawn by key: a Feistel network (Luby and Rackoff 1988).

    A pure function with no table, so that a corpus of any size needs no memory and no state. Four rounds permute
    numbers of an even number of bits; what falls outside the range is sent on until it falls inside.

    >>> sorted(shuffled(i, 10, (0, 0)) for i in range(10))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(b"%d %d %d %d" % (*key, turn, right), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < size:
            return index


def read_meta(folder: str | Path) -> dict:
    """meta.json of a dataset folder, its tokenizer file checked against the hash. Raises ValueError."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        made = f"python data.py --source PATH --out {folder}"
        raise ValueError(f"{folder} holds no dataset (no meta.json); make one: {made}")
    meta = read_json(folder / "meta.json", "tokenizer", "vocab_size", "dtype", "splits")
    found = Tokenizer(folder).sha256
    file, expected = meta["tokenizer"]["file"], meta["tokenizer"]["sha256"]
    if found != expected:
        raise ValueError(f"{folder}: {file} has SHA-256 {found[:12]}…, the dataset was made with {expected[:12]}…")
    return meta


# ---- command line ----


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file. Raises ValueError when it is missing, not JSON, or lacks one of keys."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        raise ValueError(f"{path} must be an object with {', '.join(keys)}")
    return values


def write_whole(path: Path, text: str):
    """Replace a small file so that a reader finds the old text or the new, never a part."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path):
    """Make sure that a file or folder is on the disk and not only in the memory of the system."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def git_commit() -> str:
    """The commit of this code, "-dirty" added where it was changed since; empty outside a repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def run_command(main, config_class, defaults=None):
    """Parse the flags and call main. Bad input ends with one sentence and exit code 2; a bug keeps its traceback.

    Bad input is a ValueError raised by one of this project's files, or an OSError about a file; from deeper down a
    ValueError is a bug. defaults turns a first reading of the flags into those that count where a flag is not typed.
    """
    import tyro

    parse = functools.partial(tyro.cli, config_class, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    try:
        config = parse()
        main(parse(default=defaults(config)) if defaults else config)
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        about_a_file = isinstance(error, OSError) and error.filename is not None
        if raised_in.parent != Path(__file__).parent and not about_a_file:
            raise
        text = f"{error.filename}: {error.strerror}" if about_a_file else str(error)
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass
class Config:
    """Prepare a dataset folder from text."""

    source: tuple[str, ...] = ("stdlib",)
    """stdlib, files or folders, or a public corpus: tinyshakespeare, tinystories, fineweb-edu (its first 16 files), c4
    (its first 8); downloads go to a folder `downloads` beside --out"""
    out: str = "data/stdlib"            # the folder to make
    tokenizer: str = "train:4096"       # a file or a model's folder, gpt2, cl100k_base, bytes, or train:SIZE
    val_fraction: float = 0.05          # of the documents, chosen by their hash
    workers: int = 0                    # processes; 0 takes all cores


def main(config: Config):
    meta = prepare(config.source, config.out, config.tokenizer, config.val_fraction, config.workers)
    for split, numbers in meta["splits"].items():
        documents, num_bytes, tokens = (numbers[name] for name in ("documents", "bytes", "tokens"))
        per_token = num_bytes / tokens
        print(f"{split:5}  {documents:,} documents  {num_bytes:,} bytes  {tokens:,} tokens, {per_token:.2f} bytes each")
    dropped = f"{meta['duplicate_documents']:,} exact duplicates and {meta['empty_documents']:,} empty documents"
    print(f"dropped {dropped}; wrote {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
