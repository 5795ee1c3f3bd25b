"""Which sequence comes when: epochs shuffled anew, and the proportions of a mixture."""

import bisect
import functools
import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lib.errors import BadInput

MIXTURE_BLOCK = 1000  # sequences in which a mixture has exactly its proportions
Made = TypeVar("Made")


def mixture_weights(sources: tuple[str, ...]) -> tuple[list[str], list[float]]:
    """The folders of sources `FOLDER` or `FOLDER:WEIGHT`, and their shares, which add up to 1. Raises ValueError.

    >>> mixture_weights(("data/a:3", "data/b"))
    (['data/a', 'data/b'], [0.75, 0.25])
    """
    if not sources:
        raise BadInput("--data names no folder; it takes one or more that data.py has made")
    folders, weights = [], []
    for source in sources:
        folder, colon, weight = source.rpartition(":")
        if not colon or Path(source).exists():
            folder, weight = source, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            raise BadInput(
                f"--data {source}: {weight} is no number; write FOLDER or FOLDER:WEIGHT"
            ) from None
        folders.append(folder)
        if not 0 < weights[-1] < math.inf:
            raise BadInput(f"--data {source}: the weight must be above 0")
    if twice := [
        name for name, count in Counter(map(os.path.realpath, folders)).items() if count > 1
    ]:
        raise BadInput(
            f"--data {' '.join(sources)} names {twice[0]} twice; FOLDER:WEIGHT draws more often from one"
        )
    return folders, [weight / sum(weights) for weight in weights]


def block_shares(sources: tuple[str, ...], weights: list[float]) -> tuple[tuple[int, int], ...]:
    """Of each source the begin and end of its share in a block. Raises ValueError for one without any."""
    ends = [round(end * MIXTURE_BLOCK) for end in itertools.accumulate(weights)]
    shares = tuple(zip([0, *ends], ends))
    for source, (begin, end) in zip(sources, shares):
        if begin == end:
            raise BadInput(f"--data {source}: its share is below 1 in {MIXTURE_BLOCK}")
    return shares


def draw(shares: tuple[tuple[int, int], ...], number: int, seed: int) -> tuple[int, int]:
    """(source, how many were drawn from it before) of the sequence that a mixture draws as number `number`."""
    block, place = divmod(number, MIXTURE_BLOCK)
    return _draw_block(shares, block, seed)[place]


@functools.lru_cache(maxsize=8)
def _draw_block(
    shares: tuple[tuple[int, int], ...], block: int, seed: int
) -> list[tuple[int, int]]:
    """What `draw` says of each sequence of a block."""
    ends = [end for _, end in shares]
    drawn = [block * (end - begin) for begin, end in shares]
    pairs = []
    for i in range(MIXTURE_BLOCK):
        source = bisect.bisect(ends, shuffled(i, MIXTURE_BLOCK, (seed, block)))
        pairs.append((source, drawn[source]))
        drawn[source] += 1
    return pairs


def passes(shares: tuple[tuple[int, int], ...], sizes: list[int], count: int) -> list[float]:
    """How often each source, of this size, has been gone through after count sequences."""
    return [
        round(count * ((end - begin) / MIXTURE_BLOCK) / size, 4)
        for (begin, end), size in zip(shares, sizes)
    ]


def shuffled(index: int, size: int, key: tuple[int, int]) -> int:
    """Where index goes in a permutation of range(size) drawn by key: a Feistel network (Luby and
    Rackoff 1988).

    A pure function with no table, so that a corpus of any size needs no memory and no state. Four
    rounds permute numbers of an even number of bits; what falls outside the range is sent on until
    it falls inside.

    >>> sorted(shuffled(i, 10, (0, 0)) for i in range(10))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            text = b"%d %d %d %d" % (*key, turn, right)
            digest = hashlib.blake2b(text, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < size:
            return index


def one_ahead(
    make: Callable[[int], Made], steps: range, begin: Callable[[], None]
) -> Iterator[Made]:
    """make(step) for each step, one ahead of its use, in a thread that begins with begin()."""
    with ThreadPoolExecutor(1, initializer=begin) as pool:
        ahead = pool.submit(make, steps[0]) if steps else None
        for step in steps:
            made = ahead.result()
            ahead = pool.submit(make, step + 1) if step + 1 in steps else None
            yield made


def in_parts(numbers: range, size: int) -> list[range]:
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def shared_among_ranks(
    indices: list[int], size: int, rank: int, world: int
) -> Iterator[list[int]]:
    """This rank's part, at most size, of each batch of all ranks; every rank gets equally many, some perhaps empty."""
    for start in range(0, len(indices), size * world):
        yield indices[start : start + size * world][rank::world]
