"""The files of a dataset folder: opened, and whether they are still those that were written."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.files import sha256
from lib.meta import read_meta

IGNORE = -100  # a target that does not count, as in model.py
HASHES = {
    ".bin": "sha256",
    ".mask": "mask_sha256",
    ".bounds": "bounds_sha256",
}  # by suffix, where meta.json has it


class TokenFiles:
    """The files of one split, mapped: tokens, of conversations the masks too, and where each begins, and the end.

    Raises ValueError when they are not what meta.json says, or a conversation is longer than the seq_len tokens and
    their last target.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int):
        self.folder, self.split, self.seq_len = folder, split, seq_len
        self.meta = read_meta(folder)
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        entries = self.meta["splits"][split]["files"]
        self.files, self.masks, self.bounds = [], None, None
        for entry in entries:
            path = Path(folder) / entry["file"]
            check_size(path, entry["tokens"] * dtype.itemsize)
            self.files.append(np.memmap(path, dtype, "r"))
        if "template" in self.meta:
            self.read_masks(entries)

    def read_masks(self, entries: list[dict]):
        self.masks, self.bounds = [], []
        for entry in entries:
            path = Path(self.folder) / entry["file"]
            mask, bounds = (
                path.with_suffix(".mask"),
                path.with_suffix(".bounds"),
            )
            check_size(mask, entry["tokens"])
            check_size(bounds, 8 * entry["documents"] + 8)
            self.masks.append(np.memmap(mask, np.uint8, "r"))
            begins = np.fromfile(bounds, "<u8")
            check_bounds(bounds, begins, entry["tokens"])
            self.bounds.append(begins.astype(np.int64))
        longest = max(int(np.diff(begins).max()) for begins in self.bounds)
        if longest > self.seq_len + 1:
            problem = f"a conversation has {longest} tokens, more than --seq_len {self.seq_len}"
            raise BadInput(
                f"{self.folder}: {problem}; give --seq_len {longest}, or prepare it with --max_len {self.seq_len}"
            )

    def find_documents(self, file: int) -> np.ndarray:
        """Where the documents of a file of text begin, and the end."""
        tokens = self.files[file]
        starts = np.flatnonzero(tokens == self.meta["bos"])
        if (
            self.meta["bos"] == self.meta["eos"]
        ):  # GPT-2's tokenizer has one token for both
            starts = starts[::2]
        return np.append(starts, len(tokens))

    def check_uncut(self, file: int):
        check_uncut(self.files[file])
        if self.masks:
            check_uncut(self.masks[file])

    def read(
        self, file: int, start: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and targets of a piece. Raises ValueError for a token outside the vocabulary."""
        inputs = self.files[file][start : start + size]
        targets = self.targets(file, start + 1, start + size + 1)
        largest = max(inputs.max(initial=0), targets.max(initial=0))
        if largest >= self.meta["vocab_size"]:
            raise BadInput(
                f"{self.folder} has a token {largest}, its vocabulary only {self.meta['vocab_size']}"
            )
        return inputs, targets

    def targets(self, file: int, begin: int, end: int) -> np.ndarray:
        """A file's tokens as targets."""
        tokens = self.files[file][begin:end]
        if self.masks is None:
            return tokens
        return np.where(
            self.masks[file][begin:end], tokens.astype(np.int64), IGNORE
        )

    def document(self, file: int, token: int) -> int:
        """Which document of a file a token belongs to; the first is 1."""
        if self.bounds is None:
            return np.count_nonzero(
                self.files[file][: token + 1] == self.meta["bos"]
            )
        return int(np.searchsorted(self.bounds[file], token, "right"))

    def place_of_pieces(self, pieces: list[tuple[int, int, int]]) -> str:
        """Where pieces come from: file, tokens, and which of the file's documents they are."""
        names = []
        for file, start, size in pieces:
            begun, ended = (
                self.document(file, start),
                self.document(file, start + size - 1),
            )
            documents = (
                f"document {begun}"
                if begun == ended
                else f"documents {begun}-{ended}"
            )
            name = Path(self.files[file].filename).name
            names.append(f"{name} tokens {start}-{start + size} ({documents})")
        return f"{self.folder}: {', '.join(names)}"


def check_size(path: Path, expected: int):
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise BadInput(
            f"{path} has {found} bytes, meta.json says {expected}; prepare the dataset again"
        )


def _hashed(folder: Path, meta: dict) -> Iterator[tuple[Path, str]]:
    for split in meta["splits"].values():
        for entry in split["files"]:
            for suffix, name in HASHES.items():
                if name in entry:
                    yield (
                        (folder / entry["file"]).with_suffix(suffix),
                        entry[name],
                    )


def changed_file(
    sources: list[tuple[Path, dict]], rank: int = 0, world: int = 1
) -> str:
    """What is wrong with a file of these datasets, each a folder and its meta.json; empty where nothing is.

    Every file is read whole and compared with its SHA-256 in meta.json, by the process `rank` of `world` on this
    machine that has the next share of them, in as many threads as it has cores: hashing lets go of Python's lock.
    """
    files = [
        pair for folder, meta in sources for pair in _hashed(folder, meta)
    ][rank::world]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool:
        found = pool.map(sha256, (path for path, _ in files))
        for (path, expected), digest in zip(files, found, strict=True):
            if digest != expected:
                return f"{path} has SHA-256 {digest[:12]}…, meta.json says {expected[:12]}…; prepare the dataset again"
    return ""


def check_all_uncut(rows: list[tuple[TokenFiles, list[tuple[int, int, int]]]]):
    """Raise ValueError where a file that these pieces are read from has become shorter."""
    for data, file in {(data, file) for data, row in rows for file, _, _ in row}:
        data.check_uncut(file)


def check_uncut(tokens: np.memmap):
    """Raise ValueError where a file has become shorter than what is mapped of it, whose reading would kill us."""
    if (
        tokens.base.size() < tokens.nbytes
    ):  # size asks the system for the length of the file
        problem = f"has {tokens.base.size()} bytes, {tokens.nbytes} when it was opened"
        raise BadInput(
            f"{tokens.filename} {problem}; it was cut while it was being read"
        )


def check_bounds(path: Path, bounds: np.ndarray, num_tokens: int):
    """Raise ValueError unless bounds (uint64), where documents begin, go from 0 up to the number of tokens."""
    if (
        bounds[0] != 0
        or not (bounds[1:] > bounds[:-1]).all()
        or bounds[-1] != num_tokens
    ):
        raise BadInput(
            f"{path} must rise from 0 to the {num_tokens} tokens of its file; prepare the dataset again"
        )
