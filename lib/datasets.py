"""The files of a dataset folder: whether they are still those that were written."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lib.files import sha256

HASHES = {".bin": "sha256", ".mask": "mask_sha256", ".bounds": "bounds_sha256"}  # by suffix, where meta.json has it


def _hashed(folder: Path, meta: dict) -> Iterator[tuple[Path, str]]:
    for split in meta["splits"].values():
        for entry in split["files"]:
            for suffix, name in HASHES.items():
                if name in entry:
                    yield (folder / entry["file"]).with_suffix(suffix), entry[name]


def changed_file(sources: list[tuple[Path, dict]], rank: int = 0, world: int = 1) -> str:
    """What is wrong with a file of these datasets, each a folder and its meta.json; empty where nothing is.

    Every file is read whole and compared with its SHA-256 in meta.json, by the process `rank` of `world` on this
    machine that has the next share of them, in as many threads as it has cores: hashing lets go of Python's lock.
    """
    files = [pair for folder, meta in sources for pair in _hashed(folder, meta)][rank::world]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool:
        found = pool.map(sha256, (path for path, _ in files))
        for (path, expected), digest in zip(files, found, strict=True):
            if digest != expected:
                return f"{path} has SHA-256 {digest[:12]}…, meta.json says {expected[:12]}…; prepare the dataset again"
    return ""


def check_uncut(tokens: np.memmap):
    """Raise ValueError where a file has become shorter than what is mapped of it, whose reading would kill us."""
    if tokens.base.size() < tokens.nbytes:  # size asks the system for the length of the file
        problem = f"has {tokens.base.size()} bytes, {tokens.nbytes} when it was opened"
        raise ValueError(f"{tokens.filename} {problem}; it was cut while it was being read")


def check_bounds(path: Path, bounds: np.ndarray, num_tokens: int):
    """Raise ValueError unless bounds (uint64), where documents begin, go from 0 up to the number of tokens."""
    if bounds[0] != 0 or not (bounds[1:] > bounds[:-1]).all() or bounds[-1] != num_tokens:
        raise ValueError(f"{path} must rise from 0 to the {num_tokens} tokens of its file; prepare the dataset again")
