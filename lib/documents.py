"""The documents of a corpus' files, and long ones in pieces."""

import contextlib
import gzip
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.records import parse_json
from lib.shards import Encoded, Placed, drop_copies_and_split
from lib.sources import Flags
from lib.tokenizer import Tokenizer
from lib.tokenizer_training import train_tokenizer

SEPARATOR = "<|endoftext|>"    # divides the documents of a .txt file that has it
PIECE_CHARS = 16_384           # a .txt file without it is cut at the first blank line after this many characters
DOCUMENT_CHARS = 1_000_000     # any longer document is cut likewise, so that memory stays bounded
TOKENIZER_CHARS = 16_000_000   # a tokenizer is trained on about so much text


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
    if opener is gzip.open and not path.stat().st_size:
        raise BadInput(f"{path} is damaged (it has 0 bytes, and even an empty text is packed into some)")
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is damaged ({error})") from None
    except UnicodeDecodeError as error:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise BadInput(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        raise


def _read_jsonl(path: Path, file) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = parse_line(line)
        except ValueError as error:
            raise BadInput(f"{path}:{number}: {error}") from None
        try:
            text = record["text"]
        except (KeyError, TypeError):
            raise BadInput(f"{path}:{number}: no field `text`") from None
        if not isinstance(text, str):
            raise BadInput(f"{path}:{number}: field `text` is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{path}:{number}: field `text` has half of a surrogate pair, not Unicode text") from None
        yield text


def parse_line(line: str):
    """What a line of JSON says. Raises ValueError with the reason alone; the reader knows the place."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        return parse_json(line, "the line")


def _read_parquet(path: Path) -> Iterator[str]:
    for number, row in enumerate(parquet_rows(path, ("text",), only=True), 1):
        text = row["text"]
        if isinstance(text, str):
            yield text
        elif text is not None:
            kind = type(text).__name__
            raise BadInput(f"{path}: row {number}: field `text` is {kind}, not a string")


def parquet_rows(path: Path, columns: tuple[str, ...], only: bool = False) -> Iterator[dict]:
    """The rows of a .parquet, with only these columns or with all. Raises ValueError without one."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        for name in columns:
            if name not in names:
                raise BadInput(f"{path}: no column `{name}` (it has {', '.join(names)})")
        for batch in table.iter_batches(256, columns=list(columns) if only else None):
            for values in batch.to_pylist():
                row += 1
                yield values
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: a text after row {row} is not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is damaged ({str(error).splitlines()[0]})") from None


def _split_text(file) -> Iterator[str]:
    def blocks() -> Iterator[str]:
        return iter(lambda: file.read(PIECE_CHARS), "")

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
    buffer, start = "", 0  # what comes before start is done with; it goes with the next block, not with every piece
    for block in itertools.chain(blocks, [""]):
        buffer, start = buffer[start:] + block, 0
        while len(buffer) - start > (4 if block else 1) * size:  # far enough ahead to choose; at the end, the rest
            first, last = start + size, start + 4 * size
            ends = (buffer.find(mark, first, last) + len(mark) for mark in ("\n\n", "\n"))
            end = next((end for end in ends if end >= first), first)
            yield buffer[start:end]
            start = end
    if start < len(buffer):
        yield buffer[start:]


def read_pieces(files: list[Path], counts: Counter) -> Iterator[str]:
    """The documents of all files, too long ones in pieces; empty ones are only counted."""
    for path in files:
        for document in read_documents(path):
            for text in cut_document(document):
                if text.strip():
                    yield text
                else:
                    counts["empty"] += 1


def read_texts(files: list[Path], counts: Counter, flags: Flags) -> Iterator[str]:
    """As `read_pieces`; with --val_last, for which all is read twice, each says whether it belongs to the end."""
    if not flags.val_last:
        yield from read_pieces(files, counts)
        return
    total = sum(map(len, read_pieces(files, Counter())))
    left = int(total * (1 - flags.val_fraction))  # characters for training
    for text in read_pieces(files, counts):
        for split, part in (("train", text[:left]), ("val", text[left:])):
            if part:
                yield Placed(part, split)
        left -= min(left, len(text))


def cut_document(text: str) -> Iterable[str]:
    return cut([text], DOCUMENT_CHARS) if len(text) > DOCUMENT_CHARS else [text]


def encode_document(text: str, tokenizer: Tokenizer) -> tuple[list[Encoded], dict[str, int]]:
    """A document as tokens between BOS and EOS."""
    ids = np.array(tokenizer.encode(text, bos=True, eos=True), np.uint32)
    return [Encoded(ids, None, len(text.encode()))], {}


def split_documents(files: list[Path], flags: Flags, database: Path) -> Iterator[tuple[str, str]]:
    """("train" or "val", text) of every document that is neither empty nor a copy of an earlier one."""
    texts, counts = read_texts(files, Counter(), flags), Counter()
    return drop_copies_and_split(texts, str.encode, flags.val_fraction, database, counts)


def train_on_documents(files: list[Path], vocab_size: int, flags: Flags, folder: Path) -> Path:
    """Train a tokenizer on the training documents; its file in folder."""
    total = sum(path.stat().st_size for path in files)
    megabytes = min(total, TOKENIZER_CHARS) / 1e6
    print(f"training a tokenizer of {vocab_size} pieces on {megabytes:.1f} MB", file=sys.stderr)
    path = folder / "tokenizer.model"
    train_tokenizer(tokenizer_texts(files, flags, folder / "seen.db", total), vocab_size, path)
    return path


def plain_bytes(files: list[Path]) -> int | None:
    """How many bytes of text are in the files; None where some are packed."""
    if any(path.name.endswith((".gz", ".parquet")) for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def tokenizer_texts(files: list[Path], flags: Flags, database: Path, total: int) -> Iterator[str]:
    """Training documents for the tokenizer, about TOKENIZER_CHARS of them spread over the whole corpus."""
    read = kept = 0
    for split, text in split_documents(files, flags, database):
        read += len(text)
        if split == "train" and kept <= read * min(1.0, TOKENIZER_CHARS / total) and kept < TOKENIZER_CHARS:
            kept += len(text)
            yield text
