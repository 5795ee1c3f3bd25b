"""Text to tokens on disk, and tokens on disk to the batch of a step.

    python data.py --source stdlib --out data/stdlib --tokenizer train:4096

The way of a corpus:
1. `read_documents` streams the documents of the source: files, folders, Python's standard library, a download.
2. An exact duplicate of an earlier document is dropped and counted.
3. The hash of a document decides whether it is for validation, so adding data never moves one.
4. All cores turn documents into tokens, BOS before and EOS after each.
5. The tokens are written to flat files `{train,val}_{00000…}.bin`, described by meta.json, in a folder
   that gets its name only when it is complete.

Conversations go another way, with `--template`: `read_conversations` understands the usual formats, `Cleaner` cleans
what it reads, `render` turns a conversation into tokens and a mask of those that the loss counts, and beside each file
lie its `.mask` and `.bounds`.

A dataset is read by `TokenDataset` as windows of its text, by `PackedDataset` as rows of whole documents, by
`ChatDataset` as rows of whole conversations, or by `PreferenceDataset` as pairs; `Mixture` draws from several. Which
sequences a step trains on is a pure function of (seed, step).
"""

import base64
import bisect
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import sqlite3
import sys
import sysconfig
import threading
import urllib.error
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.cli import run_command
from lib.files import new_folder
from lib.records import read_json
from lib.refusals import is_refusal

IGNORE = -100                  # a target that does not count, as in model.py
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
CHAT_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
SEPARATOR = "<|endoftext|>"    # divides the documents of a .txt file that has it
PIECE_CHARS = 16_384           # a .txt file without it is cut at the first blank line after this many characters
DOCUMENT_CHARS = 1_000_000     # any longer document is cut likewise, so that memory stays bounded
TASK_CHARS = 1_000_000         # about so much text goes to a worker at a time
TOKENIZER_CHARS = 16_000_000   # a tokenizer is trained on about so much text
SHARD_TOKENS = 100_000_000     # a token file is closed when it holds this many
MIXTURE_BLOCK = 1000           # sequences in which a mixture has exactly its proportions
HTML_ANSWER = re.compile(r"<(?:p|div|ol|ul|pre|h[1-6]|blockquote)\b.*>", re.DOTALL)
ABOUT_HTML = re.compile(r"\b(?:html|css|xml|svg|jsx|markup|tags?|web ?(?:page|site))\b|<\w", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """A public corpus that `--source NAME` downloads."""

    urls: tuple[str, ...]
    suffix: str
    licence: str
    sha256: str = ""           # of the only file; where it is empty, the server's own checksum is used
    chats: bool = False        # conversations or pairs, for --template


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
    "alpaca": Corpus(
        ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",),
        ".json",
        "CC BY-NC 4.0",
        chats=True,
    ),
    "dolly": Corpus(
        ("https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",),
        ".jsonl",
        "CC BY-SA 3.0",
        chats=True,
    ),
    "oasst": Corpus(  # its best answers
        (
            "https://huggingface.co/datasets/timdettmers/openassistant-guanaco/resolve/main/"
            "openassistant_best_replies_train.jsonl",
        ),
        ".jsonl",
        "Apache-2.0",
        chats=True,
    ),
    "hh-rlhf": Corpus(
        ("https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz",),
        ".jsonl.gz",
        "MIT",
        chats=True,
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
    _lead = ""  # a character that no piece has together with others, where text must be kept from beginning anew

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
        else:
            self._lead = "\x01"

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

    def encode_after(self, text: str) -> list[int]:
        """The ids of text that goes on after other text. sentencepiece's encoder begins any text with a blank more."""
        return self._encode(self._lead + text)[len(self._encode(self._lead)) :]

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


def find_files(source: tuple[str, ...], download_folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
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
            inside = [path for path in sorted(Path(item).rglob("*")) if path.name.endswith(suffixes)]
            found = [path for path in inside if path.is_file() and not path.name.startswith(".")]
            if not found:
                raise ValueError(f"{item} holds no files that end in {', '.join(suffixes)}")
            files += found
        elif Path(item).is_file():
            if not item.endswith(suffixes):
                raise ValueError(f"{item} must end in one of {', '.join(suffixes)}")
            files.append(Path(item))
        else:
            raise ValueError(f"--source {item} is neither a file, a folder, stdlib nor one of {', '.join(CORPORA)}")
    return files


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order, holding one in memory at a time. Raises ValueError naming file and line.

    A .py or .md file is one document, a line of .jsonl and a row of .parquet another (their field `text`). A .txt
    file is divided at `<|endoftext|>`; one without it, a book or a play, is cut into pieces at blank lines.
    """
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    with open_text(path) as file:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path, file)
        elif path.name.endswith(".txt"):
            yield from _split_text(file)
        else:
            yield file.read()


@contextlib.contextmanager
def open_text(path: Path):
    """A text file, packed with gzip or not. Raises ValueError naming the line that is not UTF-8, and for damage."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
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
    """("train" or "val", text) of every document that is neither empty nor a copy of an earlier one."""

    def texts() -> Iterator[str]:
        for text in (piece for path in files for document in read_documents(path) for piece in cut_document(document)):
            if text.strip():
                yield text
            else:
                counts["empty"] += 1

    return split(texts(), str.encode, val_fraction, database, counts)


def split(
    items: Iterator, content: Callable[..., bytes], val_fraction: float, database: Path, counts: Counter
) -> Iterator[tuple[str, object]]:
    """("train" or "val", item) of every item whose content differs from that of all before.

    The first 8 bytes of the content's SHA-256, as a fraction of 2^64, lie under val_fraction for validation. The
    hashes seen so far are kept in a database file, so that memory does not grow with the corpus.
    """
    seen = sqlite3.connect(database, isolation_level=None)
    seen.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF")  # nobody needs the database after a crash
    seen.executescript("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN")
    for item in items:
        digest = hashlib.sha256(content(item)).digest()
        if not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount:
            counts["duplicates"] += 1
            continue
        yield "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train", item
    seen.close()
    database.unlink()


def cut_document(text: str) -> Iterable[str]:
    return cut([text], DOCUMENT_CHARS) if len(text) > DOCUMENT_CHARS else [text]


def _tasks(documents: Iterator[tuple[str, object]], size: Callable[..., int] = len) -> Iterator[tuple[str, list]]:
    """Group documents of one split into tasks of about TASK_CHARS characters."""
    waiting, sizes = {"train": [], "val": []}, Counter()
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += size(text)
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
    """Writes `{split}_{00000…}.bin` and keeps what meta.json says of each file.

    With a mask, also the `.mask` beside it, a byte a token, 1 where the loss counts it as a target, and the `.bounds`,
    little-endian uint64: where each document begins, and the number of tokens.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype, self.files, self.hashes = folder, dtype, {"train": [], "val": []}, {}

    def write(
        self, split: str, tokens: np.ndarray, documents: int, num_bytes: int, mask: np.ndarray | None = None, sizes=()
    ):
        """Append documents; those of a mask have these sizes."""
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
        if mask is not None:
            self._write_mask(self.folder / files[-1]["file"], mask, files[-1]["tokens"] + np.cumsum(sizes))
            files[-1]["targets"] = files[-1].get("targets", 0) + int(mask.sum())
        for name, number in (("tokens", len(tokens)), ("documents", documents), ("bytes", num_bytes)):
            files[-1][name] += number

    def _write_mask(self, path: Path, mask: np.ndarray, ends: np.ndarray):
        with open(path.with_suffix(".mask"), "ab") as masks, open(path.with_suffix(".bounds"), "ab") as bounds:
            masks.write(mask.astype(np.uint8).tobytes())
            bounds.write((ends if bounds.tell() else np.concatenate(([0], ends))).astype("<u8").tobytes())

    def splits(self) -> dict:
        """For each split the sums over its files, and the files."""
        names = ("tokens", "documents", "bytes", "targets")
        return {
            split: {name: sum(file[name] for file in files) for name in names if all(name in file for file in files)}
            | {"files": files}
            for split, files in self.files.items()
        }


def prepare(
    source: tuple[str, ...], out: str | Path, tokenizer: str, val_fraction: float = 0.05, workers: int | None = None
) -> dict:
    """Make the dataset folder out and return its meta.json. The result does not depend on the number of workers.

    Raises ValueError for bad input; out appears only when everything in it is complete.
    """
    trained = tokenizer.removeprefix("train:") if tokenizer.startswith("train:") else None
    if trained is not None and not (trained.isdigit() and int(trained) > 300):
        raise ValueError(f"--tokenizer {tokenizer}: give a vocabulary size above 300, such as train:4096")
    if trained is None:
        Tokenizer(tokenizer)  # before anything is downloaded
    for item in source:
        if item in CORPORA and CORPORA[item].chats:
            raise ValueError(f"--source {item} is conversations; give a --template, such as llama2-chat")
    flags = {"source": source, "out": out, "tokenizer": tokenizer, "val_fraction": val_fraction}
    return _prepare(functools.partial(_write_dataset, tokenizer=tokenizer), SUFFIXES, flags, workers)


def _prepare(write: Callable[..., dict], suffixes: tuple[str, ...], flags: dict, workers: int | None) -> dict:
    """Let write(folder, files, val_fraction, workers) make a dataset under another name, then give it its own."""
    out, workers, val_fraction = Path(flags["out"]), workers or os.cpu_count(), flags["val_fraction"]
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1, or 0 for all cores")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another folder or delete it")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    files = find_files(flags["source"], out.parent / "downloads", suffixes)
    with new_folder(out) as aside:
        meta = write(aside, files, val_fraction=val_fraction, workers=workers)
        words = [word for name, value in flags.items() for word in _as_flag(name, value)]
        meta["command"] = shlex.join(["python", "data.py", *words])
        (aside / "meta.json").write_text(json.dumps(meta, indent=2))
    return meta


def _as_flag(name: str, value) -> list[str]:
    """What to type for it, as ["--bos"], ["--no_bos"] or ["--source", "a", "b"]."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]


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

    about = {"empty_documents": counts["empty"], "duplicate_documents": counts["duplicates"]}
    return _describe(chosen, writer, val_fraction, {"documents_are": "BOS, text, EOS"} | about)


def _describe(tokenizer: Tokenizer, writer: ShardWriter, val_fraction: float, about: dict) -> dict:
    """meta.json. Raises ValueError where a split has no documents."""
    meta = {
        "format": "plainllama tokens 1",
        "tokenizer": {"name": tokenizer.name, "file": tokenizer.file, "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "dtype": writer.dtype.name,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "val_fraction": val_fraction,
        **about,
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


# ---- chats ----


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str  # "system", "user" or "assistant"
    text: str


class Record(NamedTuple):
    """A conversation, or the two of a preference pair, chosen and rejected; for a bad record, what is wrong with it."""

    place: str  # file:line, or file:number for a record of a .json file
    sides: tuple[list[Turn], ...] = ()
    problem: str = ""


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
INPUT = "\n\n### Input:\n"     # stands between the instruction and the input of an Alpaca record


def read_conversations(path: Path, format: str = "auto") -> Iterator[Record]:
    """The records of a .json or .jsonl file, bad ones with their problem; auto goes by the fields of each record.

    Raises ValueError where the file itself cannot be read.
    """
    with open_text(path) as file:
        lines = ".jsonl" in path.suffixes
        for number, item in enumerate(file if lines else _load_list(path, file), 1):
            place = f"{path}:{number}"
            if lines and not item.strip():
                continue
            try:
                record = json.loads(item) if lines else item
                if not isinstance(record, dict):
                    raise ValueError(f"a {type(record).__name__}, not an object")
                record = {name: value for name, value in record.items() if value is not None}
                sides = FORMATS[detect(record) if format == "auto" else format](record)
                "".join(turn.text for side in sides for turn in side).encode()
            except UnicodeEncodeError:
                yield Record(place, problem="half of a surrogate pair, not Unicode text")
            except json.JSONDecodeError as error:
                yield Record(place, problem=f"not JSON ({error.msg})")
            except ValueError as error:
                yield Record(place, problem=str(error))
            else:
                yield Record(place, sides)


def _load_list(path: Path, file) -> list:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read (nested too deeply)") from None
    return records if isinstance(records, list) else [records]


def detect(record: dict) -> str:
    """The format of a record, by its fields. Raises ValueError for an unknown one."""
    if {"chosen", "rejected"} <= record.keys():
        return "hh-rlhf" if isinstance(record["chosen"], str) and "prompt" not in record else "pairs"
    if "conversations" in record or "messages" in record:
        return "sharegpt" if "conversations" in record else "openai"
    if "instruction" in record:
        return "dolly" if {"category", "context", "response"} & record.keys() else "alpaca"
    if any("### Human:" in str(record.get(name)) for name in ("input", "text")):
        return "oasst"
    raise ValueError(f"no known format has the fields {', '.join(record)}")


def _field(record, *names: str, kind: type = str):
    """The first of these fields that is there. Raises ValueError without one, and for another type."""
    name = next((name for name in names if isinstance(record, dict) and name in record), None)
    if name is None:
        raise ValueError(f"no field `{names[0]}`")
    if not isinstance(record[name], kind):
        raise ValueError(f"field `{name}` is {type(record[name]).__name__}, not {kind.__name__}")
    return record[name]


def _messages(record: dict) -> tuple[list[Turn]]:
    """ShareGPT and OpenAI; an answer whose label is false was marked as a bad one."""
    if record.get("label") is False:
        raise ValueError("its label is false: answers not to learn from")
    items = _field(record, "conversations", "messages", kind=list)
    turns = [Turn("system", record["system"])] if isinstance(record.get("system"), str) else []
    for number, item in enumerate(items, 1):
        role = _field(item, "from", "role")
        if role not in ROLES:
            raise ValueError(f"turn {number} is from {role!r}, neither system nor user nor assistant")
        if item.get("weight", 1) == 0:
            raise ValueError(f"turn {number} has weight 0: an answer not to learn from")
        turns.append(Turn(ROLES[role], _field(item, "value", "content")))
    return (turns,)


def _instruction(record: dict) -> tuple[list[Turn]]:
    """Alpaca and Dolly; the input becomes a paragraph below the instruction, under INPUT. Exchanges may go before."""
    more = next((record[name] for name in ("context", "input") if record.get(name)), "")
    if not isinstance(more, str):
        raise ValueError(f"the input is {type(more).__name__}, not str")
    question = _field(record, "instruction") + (INPUT + more if more.strip() else "")
    turns = [Turn("system", _field(record, "system"))] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise ValueError("field `history` is not pairs of a question and its answer")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return ([*turns, Turn("user", question), Turn("assistant", _field(record, "output", "response"))],)


def _dialogue(text: str, names: str) -> list[Turn]:
    start, *parts = re.split(names, text)
    if start.strip():
        raise ValueError(f"it begins with {start.strip()[:20]!r}, not with a name")
    return [Turn(ROLES[name.lower()], said) for name, said in zip(parts[::2], parts[1::2])]


def _oasst(record: dict) -> tuple[list[Turn]]:
    """`### Human:` and `### Assistant:` in one text, the last answer perhaps in a field of its own."""
    turns = _dialogue(_field(record, "input", "text"), r"### (Human|Assistant):")
    if turns and "output" in record:
        begun = turns.pop().text if turns[-1].role == "assistant" else ""
        turns.append(Turn("assistant", begun + _field(record, "output")))
    return (turns,)


def _hh(record: dict) -> tuple[list[Turn], list[Turn]]:
    return tuple(_dialogue(_field(record, name), r"\n\n(Human|Assistant):") for name in ("chosen", "rejected"))


def _pairs(record: dict) -> tuple[list[Turn], list[Turn]]:
    """ShareGPT with two answers; or a prompt and two answers, each a text, a message, or all messages of its side."""
    prompt = record.get("prompt", [])
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = next((record[name] for name in ("conversations", "messages") if name in record), asked)
    sides = []
    for answer in (record["chosen"], record["rejected"]):
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": answer} if isinstance(answer, str) else answer]
        whole = answer if len(answer) > 1 else [*asked, *answer]
        sides.append(_messages(record | {"conversations": whole})[0])
    return tuple(sides)


FORMATS = {
    "sharegpt": _messages,
    "openai": _messages,
    "alpaca": _instruction,
    "dolly": _instruction,
    "oasst": _oasst,
    "hh-rlhf": _hh,
    "pairs": _pairs,
}


def in_order(turns: list[Turn]) -> list[Turn]:
    """The turns without blanks around them, neighbours of one role merged: perhaps a system's, then user and assistant.

    Raises ValueError naming the first turn, counted from 1, that is empty or out of order.
    """
    ordered = []
    for number, (role, text) in enumerate(turns, 1):
        text, before = text.strip(), ordered[-1].role if ordered else ""
        if role == before:
            ordered[-1] = Turn(role, f"{ordered[-1].text}\n\n{text}".strip())
        elif role not in FOLLOWS[before]:
            place = f"right after the {before}'s" if before else "at the beginning"
            raise ValueError(f"turn {number} is the {role}'s, {place}")
        elif text or role != "system":
            ordered.append(Turn(role, text))
        if not text and role != "system":
            raise ValueError(f"turn {number}, the {role}'s, is empty")
    return ordered


def exchanges(turns: list[Turn]) -> tuple[str, list[tuple[str, str | None]]]:
    """The system's text, "" without one, and each question with its answer, None where the last has none yet.

    Raises ValueError for turns out of order.
    """
    turns = in_order(turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    if not turns:
        raise ValueError("it has no turns of a user")
    texts = [turn.text for turn in turns] + [None] * (len(turns) % 2)
    return system, list(zip(texts[::2], texts[1::2]))


class Template(NamedTuple):
    """How conversations are written. BOS comes first and EOS ends every answer; a template has no other special token,
    so that `<|im_start|>` or `[INST]` are ordinary text, also where a user types them."""

    question: str                # first the system's text or, from the second question on, `later`; then what is asked
    answer: str = "{}"           # a blank before the answer belongs to the first token of it
    system: str = "{}\n\n"
    later: str = ""
    every_bos: bool = False      # BOS before every question, not only the first
    default: Callable[[str], str] = lambda question: ""  # the system's text where there is none


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.",
)
TEMPLATES = {
    "llama2-chat": Template("[INST] {}{} [/INST]", " {} ", "<<SYS>>\n{}\n<</SYS>>\n\n", every_bos=True),
    "vicuna": Template("{}USER: {} ASSISTANT:", " {}", "{} ", default=lambda question: VICUNA),
    "alpaca": Template(
        "{}### Instruction:\n{}\n\n### Response:\n", later="\n\n", default=lambda question: ALPACA[INPUT in question]
    ),
    "chatml": Template(
        "{}<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        later="\n",
    ),
    "plain": Template("{}{}\n", later="\n"),
}


def render(turns: list[Turn], template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and a mask of them: 1 for those of an answer and its EOS, which the loss counts.

    Raises ValueError for turns out of order, and where the last question has no answer.
    """
    return _render(turns, template, tokenizer, answered=True)


def render_prompt(turns: list[Turn], template: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens up to where the answer to the last turn, a user's, begins; render puts the same before that answer."""
    return _render(turns, template, tokenizer, answered=False)[0]


def _render(turns: list[Turn], template: str, tokenizer: Tokenizer, answered: bool) -> tuple[list[int], list[int]]:
    system, pairs = exchanges(turns)
    if (pairs[-1][1] is not None) != answered:
        raise ValueError(f"the last turn is the {'user' if answered else 'assistant'}'s")
    ids, mask = [], []
    for number, pair in enumerate(pairs):
        for whole, part in zip((ids, mask), _render_exchange(pair, system, template, tokenizer, number == 0)):
            whole += part
    return ids, mask


def _render_exchange(
    pair: tuple[str, str | None], system: str, template: str, tokenizer: Tokenizer, first: bool
) -> tuple[list[int], list[int]]:
    """A question and its answer. They are encoded apart, and so alike in training and before there is an answer."""
    (question, answer), form = pair, TEMPLATES[template]
    system = system or form.default(question)
    before = (form.system.format(system) if system else "") if first else form.later
    ids = tokenizer.encode(form.question.format(before, question), bos=first or form.every_bos)
    said = [] if answer is None else [*tokenizer.encode_after(form.answer.format(answer)), tokenizer.eos_id]
    return ids + said, [0] * len(ids) + [1] * len(said)


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]
    num_bytes: int  # of the answers that the mask holds, in UTF-8


def fit(turns: list[Turn], template: str, tokenizer: Tokenizer, max_len: int) -> tuple[list[Rendered], int]:
    """A conversation as pieces of at most max_len tokens, and how many exchanges did not fit alone and are left out.

    Each piece holds as many exchanges as it can and begins with the system's text, as a conversation of its own.
    """
    system, pairs = exchanges(turns)
    pieces, dropped = [], 0
    room = 0  # in the last piece
    for pair in pairs:
        ids, mask = _render_exchange(pair, system, template, tokenizer, first=False)
        if len(ids) <= room:
            pieces[-1] = Rendered(*(a + b for a, b in zip(pieces[-1], (ids, mask, len(pair[1].encode())))))
        else:
            ids, mask = _render_exchange(pair, system, template, tokenizer, first=True)
            if len(ids) > max_len:
                dropped, room = dropped + 1, 0
                continue
            pieces.append(Rendered(ids, mask, len(pair[1].encode())))
        room = max_len - len(pieces[-1].ids)
    return pieces, dropped


def render_pair(sides: tuple[list[Turn], list[Turn]], template: str, tokenizer: Tokenizer) -> list[Rendered]:
    """Both conversations of a preference pair; the masks hold only the last answers and their EOS."""
    rendered = []
    for turns in sides:
        ids, mask = render(turns, template, tokenizer)
        end_of_question = len(mask) - mask[::-1].index(0)
        mask[:end_of_question] = [0] * end_of_question
        rendered.append(Rendered(ids, mask, len(turns[-1].text.encode())))
    return rendered


def usable(
    files: list[Path], format: str, clean: Callable[[list[Turn], str], list[Turn] | None], counts: Counter, bad: list
) -> Iterator[tuple[list[Turn], ...]]:
    """The sides of every good record, cleaned and in order; what is wrong with the others goes to bad."""
    for record in (record for path in files for record in read_conversations(path, format)):
        counts["records"] += 1
        sides = record.sides
        try:
            if record.problem:
                raise ValueError(record.problem)
            if len(sides) == 1:
                cleaned = clean(sides[0], record.place)
                if cleaned is None:
                    counts["cleaned_away"] += 1
                    continue
                sides = (cleaned,)
            sides = tuple(in_order(turns) for turns in sides)
            _check_sides(sides)
        except ValueError as error:
            bad.append(f"{record.place}: {error}")
            continue
        counts["pairs" if len(sides) == 2 else "conversations"] += 1
        if counts["pairs"] and counts["conversations"]:
            raise ValueError(f"{record.place}: preference pairs and conversations are mixed; prepare them apart")
        yield sides


def _check_sides(sides: tuple[list[Turn], ...]):
    if not all(side and side[-1].role == "assistant" for side in sides):
        raise ValueError("the last turn is not an answer")
    if len(sides) == 2 and sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected differ before the last answer")
    if len(sides) == 2 and sides[0] == sides[1]:
        raise ValueError("chosen and rejected are the same")


def _render_task(task: tuple[str, list], tokenizer_path: str, template: str, max_len: int):
    """In a worker: (split, tokens and mask of all conversations, their sizes, bytes of answers, what was counted)."""
    split, records = task
    tokenizer = _worker_tokenizer(tokenizer_path)
    documents, counts = [], Counter()
    for sides in records:
        if len(sides) == 1:
            pieces, dropped = fit(sides[0], template, tokenizer, max_len)
            counts["exchanges_too_long"] += dropped
            counts["split"] += len(pieces) > 1
        else:
            pieces = render_pair(sides, template, tokenizer)
            if max(len(piece.ids) for piece in pieces) > max_len:
                counts["pairs_too_long"] += 1
                continue
        documents += pieces
    ids, mask = (np.array([value for piece in documents for value in piece[i]], np.uint32) for i in range(2))
    sizes, num_bytes = [len(piece.ids) for piece in documents], sum(piece.num_bytes for piece in documents)
    return split, ids, mask, sizes, num_bytes, counts


def prepare_chats(
    source: tuple[str, ...],
    out: str | Path,
    tokenizer: str,
    template: str,
    max_len: int = 2048,
    format: str = "auto",
    val_fraction: float = 0.05,
    allow_bad: float = 0.01,
    workers: int | None = None,
    cleaning: "Cleaning | None" = None,
) -> dict:
    """Make a fine-tuning set, or from pairs a preference set, and return its meta.json.

    Conversations, not pairs, are cleaned first; what that takes out goes to removed.jsonl, a report to cleaning.txt.
    What is longer than max_len is split between exchanges; an exchange or pair that does not fit is left out, counted.
    Raises ValueError for bad input, and where more than the fraction allow_bad of the records is bad.
    """
    for flag, value, known in (("template", template, TEMPLATES), ("format", format, ["auto", *FORMATS])):
        if value not in known:
            raise ValueError(f"--{flag} {value} is not one of {', '.join(known)}")
    if max_len < 2 or not 0 <= allow_bad <= 1:
        raise ValueError(f"--max_len {max_len} must be at least 2, --allow_bad {allow_bad} lie between 0 and 1")
    if tokenizer.startswith("train:"):
        raise ValueError(f"--template {template} needs the --tokenizer of the model that will be trained")
    for item in source:
        if item == "stdlib" or item in CORPORA and not CORPORA[item].chats:
            raise ValueError(f"--source {item} is text without conversations; leave --template out")
    Tokenizer(tokenizer)  # before anything is read
    options = dict(template=template, max_len=max_len, format=format, allow_bad=allow_bad)
    flags = dict(source=source, out=out, tokenizer=tokenizer, **options, val_fraction=val_fraction)
    cleaning = cleaning or Cleaning()
    flags |= {name: value for name, value in asdict(cleaning).items() if value != getattr(Cleaning, name)}
    write = functools.partial(_write_chats, tokenizer=tokenizer, cleaning=cleaning, **options)
    return _prepare(write, CHAT_SUFFIXES, flags, workers)


def _write_chats(
    aside: Path, files: list[Path], tokenizer, template, max_len, format, allow_bad, cleaning, val_fraction, workers
) -> dict:
    from tqdm import tqdm

    chosen = Tokenizer(tokenizer)
    chosen.save(aside)
    counts, bad = Counter(records=0, duplicates=0), []
    writer = ShardWriter(aside, token_dtype(chosen.vocab_size))
    cleaner = Cleaner(cleaning, aside / "removed.jsonl", chosen)
    sides = usable(files, format, cleaner, counts, bad)
    items = split(sides, lambda sides: json.dumps(sides).encode(), val_fraction, aside / "seen.db", counts)
    tasks = _tasks(items, lambda sides: sum(len(turn.text) for side in sides for turn in side))
    work = functools.partial(_render_task, tokenizer_path=str(aside / chosen.file), template=template, max_len=max_len)
    with tqdm(unit=" documents", desc="tokenizing", file=sys.stderr) as bar:
        for name, ids, mask, sizes, num_bytes, counted in _map_in_order(work, tasks, workers):
            counts.update(counted)
            if sizes:
                writer.write(name, ids, len(sizes), num_bytes, mask, sizes)
            bar.update(len(sizes))
    counts["bad"] = len(bad)
    if len(bad) > allow_bad * counts["records"]:
        share = f"{len(bad)} of {counts['records']} records are bad, more than --allow_bad {allow_bad} of them"
        raise ValueError(f"{share}: {'; '.join(bad[:3])}")
    for problem in bad:
        print(f"left out {problem}", file=sys.stderr)
    if not any(writer.files.values()):
        raise ValueError(f"nothing is left of the records at --max_len {max_len}: {counted_as(counts)}")
    kind = "preference" if counts["pairs"] else "chat"
    if kind == "preference" and cleaning != Cleaning():
        raise ValueError("preference pairs are not cleaned; leave the flags of cleaning out")
    about = {"documents_are": "BOS, turns, EOS", "kind": kind, "template": template, "max_len": max_len}
    if kind == "chat":
        (aside / "cleaning.txt").write_text(cleaner.report() + "\n")
    return _describe(chosen, writer, val_fraction, about | {"counts": dict(counts)})


def counted_as(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def show(folder: str | Path, num: int) -> str:
    """The first training examples of a fine-tuning or preference set, the tokens that the loss counts in ⟦brackets⟧."""
    meta = read_meta(folder)
    if meta.get("kind", "text") == "text":
        raise ValueError(f"--show {folder}: a dataset of text; only those made with --template have a mask to show")
    data, tokenizer = KINDS[meta["kind"]](folder, "train", meta["max_len"]), Tokenizer(folder)
    shown, bounds = [], data.bounds[0]
    for number, (begin, end) in enumerate(zip(bounds[:num], bounds[1:])):
        name = f"{number // 2} {'rejected' if number % 2 else 'chosen'}" if meta["kind"] == "preference" else number
        text = bracketed(data.files[0][begin:end].tolist(), data.masks[0][begin:end].tolist(), tokenizer)
        shown.append(f"--- {name}: {end - begin} tokens, {data.masks[0][begin:end].sum()} of them targets\n{text}")
    return "\n".join(shown)


def bracketed(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, ⟦ ⟧ around those of the mask, BOS and EOS spelled out.

    >>> bracketed([256, 104, 105, 33, 257], [0, 0, 0, 1, 1], Tokenizer("bytes"))
    '<s>hi⟦!</s>⟧'
    """
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    text, inside = "", 0
    for (counts, special), group in itertools.groupby(zip(ids, mask), lambda pair: (pair[1], names.get(pair[0]))):
        part = [i for i, _ in group]
        text += ("⟦" if counts else "⟧") * (counts != inside)
        text += special * len(part) if special else tokenizer.decode(part)
        inside = counts
    return text + "⟧" * inside


# ---- cleaning ----


@dataclass
class Cleaning:
    """What is done to conversations before they are rendered, beyond what is always done: exact copies and empty
    turns are dropped, control characters removed, turns out of order mended."""

    html: bool = True               # answers that are HTML become markdown
    language: str = ""              # keep only conversations in this language, such as en
    min_answer_chars: int = 0       # drop a conversation with a shorter answer
    max_chars: int = 0              # drop a longer conversation; 0: no bound
    drop_refusals: bool = False     # cut a conversation before the first question whose answer refuses
    near_duplicates: float = 0.8    # drop a conversation that shares this much (Jaccard) with an earlier one; 0: none


class Cleaner:
    """Cleans conversations one after the other and counts what each step did.

    A step is a function from turns to turns; it leaves none of a conversation that it drops. What was cut off or
    dropped goes to the file `removed`, one JSON a line: step, where, turns; its tokens are counted by a tokenizer.
    """

    def __init__(
        self, options: Cleaning, removed: str | Path | None = None, tokenizer: Tokenizer | None = None
    ):
        steps = {
            "html": options.html and html_to_markdown,
            "characters": tidy_characters,
            "empty": drop_empty,
            "roles": mend_roles,
            "language": options.language and in_language(options.language),
            "refusals": options.drop_refusals and cut_refusals,
            "short": options.min_answer_chars and drop_short(options.min_answer_chars),
            "long": options.max_chars and drop_long(options.max_chars),
            "copies": drop_copies(),
            "near copies": options.near_duplicates and drop_near_copies(options.near_duplicates),
        }
        self.steps = {name: step for name, step in steps.items() if step}
        self.removed, self.tokenizer = removed, tokenizer
        self.counts = {name: Counter() for name in ("read", *self.steps, "kept")}
        self.examples = {}

    def __call__(self, turns: list[Turn], where: str = "") -> list[Turn] | None:
        """The cleaned conversation, or None where a step dropped it; where says in the report which one it was."""
        self._count("read", "conversations", turns, [])
        for name, step in self.steps.items():
            before, turns = turns, step(turns)
            if turns != before:
                self._count(name, "changed" if turns else "dropped", before, turns)
                self._keep_what_went(name, before, turns, where)
            if not turns:
                return None
        self._count("kept", "conversations", turns, [])
        return turns

    def _count(self, name: str, effect: str, before: list[Turn], after: list[Turn]):
        chars = sum(len(turn.text) for turn in before) - sum(len(turn.text) for turn in after)
        self.counts[name].update({effect: 1, "turns": len(before) - len(after), "characters": chars})

    def _keep_what_went(self, name: str, before: list[Turn], after: list[Turn], where: str):
        """What was cut off in the file `removed`, and the first of each step's doings as examples."""
        left = "".join(turn.text for turn in after)
        cut = [turn for turn in before if turn.text not in left] if len(after) < len(before) else []
        if self.tokenizer:
            self.counts[name]["tokens"] += sum(len(self.tokenizer.encode(turn.text)) for turn in cut)
        if cut and self.removed:
            row = {"step": name, "where": where, "turns": [turn._asdict() for turn in cut]}
            with open(self.removed, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        examples = self.examples.setdefault(name, [])
        if len(examples) < 3:
            examples.append(f"{where} {_difference(before, after, cut)}".strip())

    def report(self) -> str:
        """A table of how many conversations each step changed or dropped and what it took from them, and examples."""
        columns = ("conversations", "changed", "dropped", "turns", "characters", "tokens")
        lines = [f"{'':12}" + "".join(f"{column:>14}" for column in columns)]
        for name, counts in self.counts.items():
            cells = (f"{counts[column]:,}" if counts[column] else "" for column in columns)
            lines.append(f"{name:12}" + "".join(f"{cell:>14}" for cell in cells))
        shown = [f"{name}: {example}" for name, examples in self.examples.items() for example in examples]
        return "\n".join(line.rstrip() for line in [*lines, *shown])


def _difference(before: list[Turn], after: list[Turn], cut: list[Turn]) -> str:
    """The first answer that was cut off, or else the first turn that changed from where it did."""
    if cut:
        return repr(next((turn.text for turn in cut if turn.role == "assistant"), cut[0].text)[:120])
    old, new = next((old.text, new.text) for old, new in zip(before, after) if old != new)
    start = max(0, len(os.path.commonprefix([old, new])) - 20)
    return f"{old[start : start + 60]!r} became {new[start : start + 60]!r}"


def _library(name: str, flag: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--{flag} needs {name}: pip install {name}") from None


def html_to_markdown(turns: list[Turn]) -> list[Turn]:
    """Turn the answers that are HTML, as an exported web page has them, into markdown, code into fenced blocks.

    An answer is HTML when it begins with the tag of a block of text and ends with a tag, and its question does not
    speak of markup, for which HTML itself is the answer. Anything else, `a < b` and `&amp;` in it, stays as it is.
    """
    asked = ["", *(turn.text for turn in turns)]
    is_html = [
        turn.role == "assistant"
        and HTML_ANSWER.fullmatch(turn.text.strip())
        and ('<div class="markdown' in turn.text or not ABOUT_HTML.search(question))
        for turn, question in zip(turns, asked)
    ]
    return [turn._replace(text=_markdown(turn.text)) if html else turn for turn, html in zip(turns, is_html)]


def _markdown(html: str) -> str:
    soup = _library("bs4", "html").BeautifulSoup(html, "html.parser")
    for block in soup.find_all("pre"):
        if block.code:
            block.contents = [block.code]  # beside the code there may be a bar with its language and a button
    language = lambda block: (re.findall(r'class="[^"]*language-(\w+)', str(block)) or [""])[0]
    options = {f"escape_{what}": False for what in ("asterisks", "underscores", "misc")}
    options |= {"heading_style": "ATX", "bullets": "-", "code_language_callback": language}
    return _library("markdownify", "html").MarkdownConverter(**options).convert_soup(soup).strip()


def tidy_characters(turns: list[Turn]) -> list[Turn]:
    """Line ends become \\n and odd blanks ordinary ones; control and invisible characters go, and blanks at the ends
    of a text and more than two blank lines on end. Indentation stays."""
    return [turn._replace(text=_tidy(turn.text)) for turn in turns]


def _tidy(text: str) -> str:
    text = re.sub("\r\n?|[\u2028\u2029]", "\n", text)
    text = re.sub("[\u00a0\u202f\u3000]", " ", text)
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff]", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return re.sub(r"\A(?:[ \t]*\n)+|\A (?=\S)|\s+\Z", "", text)


def drop_empty(turns: list[Turn]) -> list[Turn]:
    """Leave out empty turns, and a conversation in which one side says nothing."""
    said = [turn for turn in turns if turn.text.strip()]
    return said if {"user", "assistant"} <= {turn.role for turn in said} else []


def mend_roles(turns: list[Turn]) -> list[Turn]:
    """At most one system turn at the start, then user and assistant in turn, an answer at the end.

    Turns of one role that follow each other are joined; answers before the first question and questions after the last
    answer are left out; a conversation with a system turn further on or with another role is dropped.
    """
    joined = []
    for role, group in itertools.groupby(turns, key=lambda turn: turn.role):
        joined.append(Turn(role, "\n\n".join(turn.text for turn in group)))
    system, rest = (joined[:1], joined[1:]) if joined[0].role == "system" else ([], joined)
    if not {turn.role for turn in rest} <= {"user", "assistant"}:
        return []
    rest = rest[rest[0].role == "assistant" :]
    rest = rest[: len(rest) // 2 * 2]
    return system + rest if rest else []


def in_language(language: str):
    """A step that drops conversations surely in another language; code and texts under 40 letters tell none."""
    langid = _library("py3langid.langid", "language")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        raise ValueError(f"--language {language} is none of {', '.join(sorted(identifier.labels))}")

    def step(turns: list[Turn]) -> list[Turn]:
        text = re.sub(r"```.*?```", " ", "\n".join(turn.text for turn in turns), flags=re.DOTALL)[:5000]
        found, probability = identifier.classify(text)
        other = found != language and probability > 0.95 and sum(map(str.isalpha, text)) >= 40
        return [] if other else turns

    return step


def cut_refusals(turns: list[Turn]) -> list[Turn]:
    """Cut a conversation before the first question whose answer refuses.

    All after it goes too, since people answer a refusal; what is left is the beginning of a real conversation.
    """
    refused = (i for i, turn in enumerate(turns) if turn.role == "assistant" and is_refusal(turn.text))
    kept = turns[: next(refused, len(turns) + 1) - 1]
    return kept if kept and kept[-1].role == "assistant" else []


def drop_short(chars: int):
    return lambda turns: [] if any(turn.role == "assistant" and len(turn.text) < chars for turn in turns) else turns


def drop_long(chars: int):
    return lambda turns: [] if sum(len(turn.text) for turn in turns) > chars else turns


def drop_copies():
    """A step that drops a conversation it has seen before; about 110 bytes of memory for each."""
    seen = set()

    def step(turns: list[Turn]) -> list[Turn]:
        digest = hashlib.sha256(json.dumps(turns).encode()).digest()[:16]
        known = digest in seen
        seen.add(digest)
        return [] if known else turns

    return step


def drop_near_copies(threshold: float):
    """A step that drops a conversation whose set of runs of 5 words is like an earlier one's: Jaccard similarity
    threshold or more, as 128 minimal hashes estimate it (Broder 1997), of questions and answers together and of the
    answers alone, since many questions may share a passage. About 8 kB of memory for each that is kept."""
    if not 0 < threshold <= 1:
        raise ValueError(f"--near_duplicates {threshold} must be from 0 to 1")
    datasketch = _library("datasketch", "near_duplicates")
    index, sketches = datasketch.MinHashLSH(threshold, num_perm=128), []

    def sketch(turns: list[Turn], *roles: str):
        words = " ".join(turn.text for turn in turns if turn.role in roles).lower().split()
        runs = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        made = datasketch.MinHash(128)
        made.update_batch(runs)
        return made

    def step(turns: list[Turn]) -> list[Turn]:
        mine = sketch(turns, "user", "assistant"), sketch(turns, "assistant")
        for other in index.query(mine[0]):
            if all(a.jaccard(b) >= threshold for a, b in zip(mine, sketches[other])):
                return []
        index.insert(len(sketches), mine[0])
        sketches.append(mine)
        return turns

    return step


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
        counts = self.meta["splits"][split]
        self.bytes_per_target = counts["bytes"] / counts.get("targets", counts["tokens"])
        self.arrange(split)

    def arrange(self, split: str):
        """Find out which sequences there are."""
        seq_len = self.seq_len
        self.counts = [max(0, (len(tokens) - 1) // seq_len) for tokens in self.files]
        if not sum(self.counts):
            raise ValueError(f"{self.folder}: no {split} file has {seq_len + 1} tokens, one of --seq_len {seq_len}")

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
        return self.fill([self.pieces(int(index)) for index in indices], self.seq_len)

    def fill(self, rows: list[list[tuple[int, int, int]]], width: int) -> Batch:
        """Rows of so many tokens that hold these pieces."""
        tokens = np.zeros((len(rows), width), np.int64)
        targets = np.full_like(tokens, IGNORE)
        bounds = []
        for row, pieces in enumerate(rows):
            used = 0
            for file, start, size in pieces:
                bounds.append(row * width + used)
                tokens[row, used : used + size] = self.files[file][start : start + size]
                targets[row, used : used + size] = self.targets(file, start + 1, start + size + 1)
                used += size
            if used < width:  # what is left over is as another document, without targets
                bounds.append(row * width + used)
        if (largest := max(tokens.max(), targets.max())) >= self.meta["vocab_size"]:
            raise ValueError(f"{self.folder} has a token {largest}, its vocabulary only {self.meta['vocab_size']}")
        return Batch(tokens, targets, np.array([*bounds, tokens.size]))

    def targets(self, file: int, begin: int, end: int) -> np.ndarray:
        """A file's tokens as targets."""
        return self.files[file][begin:end]

    def index(self, number: int, seed: int) -> int:
        """The index of the sequence that is drawn as number `number`: an epoch is each once, shuffled anew."""
        return shuffled(number % len(self), len(self), (seed, number // len(self)))

    def place(self, index: int) -> str:
        """Where a sequence comes from: file, tokens, and which documents of the file they belong to."""
        names = []
        for file, start, size in self.pieces(index):
            begun, ended = self.document(file, start), self.document(file, start + size - 1)
            documents = f"document {begun}" if begun == ended else f"documents {begun}-{ended}"
            names.append(f"{Path(self.files[file].filename).name} tokens {start}-{start + size} ({documents})")
        return f"{self.folder}: {', '.join(names)}"

    def document(self, file: int, token: int) -> int:
        """Which document of a file a token belongs to; the first is 1."""
        return np.count_nonzero(self.files[file][: token + 1] == self.meta["bos"])

    def spread_indices(self, count: int) -> list[int]:
        """At most count sequences spaced evenly over the split, always the same."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]


class PackedDataset(TokenDataset):
    """One split as rows filled with whole documents, padded at the end; a document that is longer than a row is cut.

    Rows are packed by best fit over the whole split, the longest pieces first; 20 bytes of memory a document.
    """

    def arrange(self, split: str):
        pieces = np.concatenate([self._cut(file) for file in range(len(self.files))])
        row_of = pack(pieces[:, 2], self.seq_len)
        self.table = pieces[np.argsort(row_of, kind="stable")]
        self.first = np.concatenate(([0], np.cumsum(np.bincount(row_of))))

    def _cut(self, file: int) -> np.ndarray:
        """The pieces of a file's documents, as in `pieces`; EOS has no target and is no input."""
        starts = self.starts(file)
        inputs = np.diff(starts, append=len(self.files[file])) - 1
        per_document = -(-inputs // self.seq_len)
        number = np.arange(per_document.sum()) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        offset = number * self.seq_len
        sizes = np.minimum(self.seq_len, np.repeat(inputs, per_document) - offset)
        return np.stack((np.full_like(sizes, file), np.repeat(starts, per_document) + offset, sizes), 1)

    def starts(self, file: int) -> np.ndarray:
        """Where the documents of a file begin."""
        starts = np.flatnonzero(self.files[file] == self.meta["bos"])
        # GPT-2's tokenizer has one token for both
        return starts[::2] if self.meta["bos"] == self.meta["eos"] else starts

    def __len__(self) -> int:
        return len(self.first) - 1

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        return [tuple(piece) for piece in self.table[self.first[index] : self.first[index + 1]].tolist()]


class ChatDataset(PackedDataset):
    """One split of a fine-tuning set as rows filled with whole conversations, of which only the answers are targets.

    Raises ValueError for a conversation that is longer than a row, and for files that do not belong together.
    """

    def arrange(self, split: str):
        self.read_masks(split)
        super().arrange(split)

    def read_masks(self, split: str):
        self.masks, self.bounds = [], []
        for entry, tokens in zip(self.meta["splits"][split]["files"], self.files):
            path = Path(self.folder) / entry["file"]
            for suffix, size in ((".mask", len(tokens)), (".bounds", 8 * entry["documents"] + 8)):
                found = path.with_suffix(suffix).stat().st_size if path.with_suffix(suffix).exists() else 0
                if found != size:
                    name = path.with_suffix(suffix)
                    raise ValueError(f"{name} has {found} bytes, meta.json says {size}; prepare the dataset again")
            self.masks.append(np.memmap(path.with_suffix(".mask"), np.uint8, "r"))
            self.bounds.append(np.fromfile(path.with_suffix(".bounds"), "<u8").astype(np.int64))
        longest = max(int(np.diff(bounds).max()) for bounds in self.bounds)
        if longest > self.seq_len + 1:
            problem = f"a conversation has {longest} tokens, more than --seq_len {self.seq_len}"
            raise ValueError(f"{self.folder}: {problem}; prepare it with --max_len {self.seq_len}")

    def targets(self, file: int, begin: int, end: int) -> np.ndarray:
        return np.where(self.masks[file][begin:end], super().targets(file, begin, end).astype(np.int64), IGNORE)

    def starts(self, file: int) -> np.ndarray:
        return self.bounds[file][:-1]

    def document(self, file: int, token: int) -> int:
        return int(np.searchsorted(self.bounds[file], token, "right"))


class PreferenceDataset(ChatDataset):
    """One split of preference pairs: an index is a pair, its batch two rows, the chosen conversation first.

    Rows are padded at the end to the longest of the batch, rounded up to a multiple of ROUND.
    """

    ROUND = 64

    def arrange(self, split: str):
        self.read_masks(split)
        self.ends = np.cumsum([(len(bounds) - 1) // 2 for bounds in self.bounds])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        file = int(np.searchsorted(self.ends, index, "right"))
        first = 2 * (index - (int(self.ends[file - 1]) if file else 0))
        begin, middle, end = self.bounds[file][first : first + 3].tolist()
        return [(file, begin, middle - begin - 1), (file, middle, end - middle - 1)]

    def batch(self, indices) -> Batch:
        """tokens and targets (2 n, T) of n pairs."""
        rows = [[piece] for index in indices for piece in self.pieces(int(index))]
        longest = max(size for ((_, _, size),) in rows)
        return self.fill(rows, min(self.seq_len, -(-longest // self.ROUND) * self.ROUND))._replace(bounds=None)


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
    each source goes through its own epochs. Conversations are always packed, and texts that are drawn with them too.
    Raises ValueError for a bad weight, and for sources of different tokenizers or templates, or pairs among others.
    """

    def __init__(self, sources: tuple[str, ...], split: str, seq_len: int, packed: bool = False):
        self.folders, self.weights = mixture_weights(sources)
        metas = [read_meta(folder) for folder in self.folders]
        kinds = [meta.get("kind", "text") for meta in metas]
        templates = {meta["template"] for meta in metas if "template" in meta}
        if len(templates) > 1 or set(kinds) > {"preference"}:
            found = ", ".join(sorted(templates if len(templates) > 1 else set(kinds)))
            raise ValueError(f"--data {' '.join(self.folders)}: these do not go together ({found})")
        self.kind = max(kinds, key=list(KINDS).index)
        self.packed = self.kind == "chat" or self.kind == "text" and packed
        opener = KINDS | ({"text": PackedDataset} if self.packed else {})
        self.parts = [opener[kind](folder, split, seq_len) for kind, folder in zip(kinds, self.folders)]
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


KINDS = {"text": TokenDataset, "chat": ChatDataset, "preference": PreferenceDataset}


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


@dataclass
class Config:
    """Prepare a dataset folder from text."""

    source: tuple[str, ...] = ("stdlib",)
    """stdlib, files or folders, or a public corpus: tinyshakespeare, tinystories, fineweb-edu (its first 16 files), c4
    (its first 8); with --template alpaca, dolly, oasst, hh-rlhf. Downloads go to a folder `downloads` beside --out"""
    out: str = "data/stdlib"            # the folder to make
    tokenizer: str = "train:4096"       # a file or a model's folder, gpt2, cl100k_base, bytes, or train:SIZE
    val_fraction: float = 0.05          # of the documents, chosen by their hash
    workers: int = 0                    # processes; 0 takes all cores
    # conversations and preference pairs, from .json and .jsonl
    template: str = ""                  # llama2-chat, vicuna, alpaca, chatml or plain makes a set to fine-tune on
    max_len: int = 2048                 # tokens; what is longer is split between exchanges
    format: str = "auto"
    """by a record's fields, or sharegpt, openai, alpaca, dolly, oasst, hh-rlhf, pairs (ShareGPT's chosen, rejected)"""
    allow_bad: float = 0.01             # fraction of the records that may be bad, and are left out
    cleaning: Cleaning = field(default_factory=Cleaning)
    show: str = ""                      # instead print examples of this folder, what the loss counts in brackets
    n: int = 3                          # so many


def main(config: Config):
    if config.show:
        print(show(config.show, config.n))
        return
    if config.template:
        options = (config.template, config.max_len, config.format, config.val_fraction, config.allow_bad)
        meta = prepare_chats(config.source, config.out, config.tokenizer, *options, config.workers, config.cleaning)
        if meta["kind"] == "chat":
            print((Path(config.out) / "cleaning.txt").read_text())
        print(show(config.out, 1))
    else:
        meta = prepare(config.source, config.out, config.tokenizer, config.val_fraction, config.workers)
    report(meta)
    print(f"wrote {config.out}")


def report(meta: dict):
    """Print what is in a dataset and what was left out."""
    for split, numbers in meta["splits"].items():
        documents, num_bytes, tokens = (f"{numbers[name]:,}" for name in ("documents", "bytes", "tokens"))
        per_token = numbers["bytes"] / numbers.get("targets", numbers["tokens"])
        if "targets" in numbers:
            targets = f"{numbers['targets']:,} targets of {num_bytes} bytes"
            print(f"{split:5}  {documents} documents  {tokens} tokens, {targets}, {per_token:.2f} each")
        else:
            print(f"{split:5}  {documents} documents  {num_bytes} bytes  {tokens} tokens, {per_token:.2f} bytes each")
    if "counts" in meta:
        print(counted_as(meta["counts"]))
    else:
        duplicates, empty = meta["duplicate_documents"], meta["empty_documents"]
        print(f"dropped {duplicates:,} exact duplicates and {empty:,} empty documents")


if __name__ == "__main__":
    run_command(main, Config)
