"""From items to token files: training or validation, worker processes, and what is written."""

import errno
import functools
import hashlib
import multiprocessing
import os
import sqlite3
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.disk import writing
from lib.errors import BadInput
from lib.meta import FORMAT
from lib.tokenizer import Tokenizer

TASK_CHARS = 1_000_000         # about so much text goes to a worker at a time
SHARD_TOKENS = 100_000_000     # a token file is closed when it holds this many


class Placed(str):
    """A text whose split, "train" or "val", does not depend on its hash."""

    def __new__(cls, text: str, split: str):
        placed = super().__new__(cls, text)
        placed.split = split
        return placed


def drop_copies_and_split(
    items: Iterator,
    content: Callable[..., bytes],
    val_fraction: float,
    database: Path,
    counts: Counter,
    group: Callable[..., bytes] | None = None,
) -> Iterator[tuple[str, object]]:
    """("train" or "val", item) of every item whose content differs from that of all before.

    The first 8 bytes of the SHA-256 of its group, the content where no group is given, as a fraction of 2^64, lie under
    val_fraction for validation; one that is Placed says it itself. The hashes of the contents seen so far are kept in a
    database file, so that memory does not grow with the corpus.
    """
    try:
        seen = sqlite3.connect(database, isolation_level=None)
        seen.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF")  # after a crash nobody needs the database
        seen.executescript("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN")
        for item in items:
            digest = hashlib.sha256(content(item)).digest()
            if not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount:
                counts["duplicates"] += 1
                continue
            digest = hashlib.sha256(group(item)).digest() if group else digest
            by_hash = "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"
            yield (item.split, str(item)) if isinstance(item, Placed) else (by_hash, item)
        seen.close()
    except sqlite3.OperationalError as error:
        raise OSError(errno.EIO, str(error), str(database)) from None
    database.unlink()


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Sequence[int]
    mask: Sequence[int] | None  # 1 where the loss counts a token; None where it counts all
    num_bytes: int              # of the text whose tokens the loss counts, in UTF-8


class EncodedTask(NamedTuple):
    """The documents of a task end to end; without any, no tokens."""

    split: str
    ids: np.ndarray | None
    mask: np.ndarray | None
    sizes: list[int]            # of the documents, in tokens
    num_bytes: int
    counts: Counter             # of what was left out or split


def group_tasks(documents: Iterator[tuple[str, object]], size: Callable[..., int] = len) -> Iterator[tuple[str, list]]:
    """Group documents of one split into tasks of about TASK_CHARS characters."""
    waiting, sizes = {"train": [], "val": []}, Counter()
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += size(text)
        if sizes[split] >= TASK_CHARS:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    for split, texts in waiting.items():
        if texts:
            yield split, texts


def _end_with_parent():
    """In a worker: end as soon as the main process does, even when that was killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def worker_tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)


def encode_task(task: tuple[str, list], encode: Callable, tokenizer_path: str) -> EncodedTask:
    """In a worker: encode(item, tokenizer) gives the documents of an item, and what was counted, for all items."""
    split, items = task
    tokenizer = worker_tokenizer(tokenizer_path)
    documents, counts = [], Counter()
    for item in items:
        encoded, counted = encode(item, tokenizer)
        documents += encoded
        counts.update(counted)
    sizes = [len(document.ids) for document in documents]
    num_bytes = sum(document.num_bytes for document in documents)
    if not documents:
        return EncodedTask(split, None, None, sizes, num_bytes, counts)
    ids = np.concatenate([np.array(document.ids, np.uint32) for document in documents])
    mask = None
    if documents[0].mask is not None:
        mask = np.concatenate([np.array(document.mask, np.uint8) for document in documents])
    return EncodedTask(split, ids, mask, sizes, num_bytes, counts)


def map_in_order(function, tasks, workers: int) -> Iterator:
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
            self.hashes[split] = {name: hashlib.sha256() for name in ("sha256", "mask_sha256", "bounds_sha256")}
        if tokens.max() > np.iinfo(self.dtype).max:
            raise BadInput(f"token id {tokens.max()} does not fit in {self.dtype}")
        self._append(split, "sha256", ".bin", tokens.astype(self.dtype))
        if mask is not None:
            self._write_mask(split, mask, files[-1]["tokens"] + np.cumsum(sizes))
            files[-1]["targets"] = files[-1].get("targets", 0) + int(mask.sum())
        for name, number in (("tokens", len(tokens)), ("documents", documents), ("bytes", num_bytes)):
            files[-1][name] += number

    def _write_mask(self, split: str, mask: np.ndarray, ends: np.ndarray):
        begun = "bounds_sha256" in self.files[split][-1]
        self._append(split, "mask_sha256", ".mask", mask.astype(np.uint8))
        self._append(split, "bounds_sha256", ".bounds", (ends if begun else np.append(0, ends)).astype("<u8"))

    def _append(self, split: str, name: str, suffix: str, values: np.ndarray):
        """Add to the last file of a split, or what lies beside it with this suffix, and keep its hash under name."""
        entry, data, digest = self.files[split][-1], values.tobytes(), self.hashes[split][name]
        path = (self.folder / entry["file"]).with_suffix(suffix)
        with writing(path), open(path, "ab") as file:
            file.write(data)
        digest.update(data)
        entry[name] = digest.hexdigest()

    def splits(self) -> dict:
        """For each split the sums over its files, and the files."""
        names = ("tokens", "documents", "bytes", "targets")
        return {
            split: {name: sum(file[name] for file in files) for name in names if all(name in file for file in files)}
            | {"files": files}
            for split, files in self.files.items()
        }


def describe_dataset(tokenizer: Tokenizer, writer: ShardWriter, val_fraction: float, about: dict) -> dict:
    """meta.json. Raises ValueError where a split has no documents."""
    meta = {
        "format": FORMAT,
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
            if "kind" in about:
                hint = f"those with the same first question go together; {hint}"
            raise BadInput(f"none of the {found} documents went to {split}; {hint}")
    return meta
