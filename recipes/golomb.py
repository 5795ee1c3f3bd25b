"""A vector of -m, 0 and +m as a file: the gaps between its places in Golomb's code, each with its sign."""

import math
import struct

import numpy as np
import torch
from torch import Tensor

HEADER = "<QQBe"  # numbers, kept ones, the code's parameter, the magnitude in 16 bits


def code_parameter(p: float) -> int:
    """Bits of the fixed part of Golomb's code for places that are taken with probability p."""
    if not 0 < p < 1:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - p))))


def expected_bits(n: int, p: float) -> float:
    """Bits of n numbers, a share p of them kept: places, signs, and 16 for the magnitude.

    >>> [round(expected_bits(10**6, p) / 10**6, 3) for p in (0.05, 0.1, 0.2, 0.3, 0.5)]
    [0.339, 0.576, 0.939, 1.188, 1.5]
    """
    b = code_parameter(p)
    return n * p * (b + 1 / (1 - (1 - p) ** 2**b) + 1) + 16


def write_bits(vector: Tensor) -> bytes:
    """A ternary vector in a file's form: gaps between its places by Golomb's code, each with its sign."""
    values = vector.numpy()
    places = np.flatnonzero(values)
    b = code_parameter(len(places) / len(values))
    gaps = np.diff(places, prepend=-1) - 1
    ones = gaps >> b  # in unary, ended by a zero
    lengths = ones + 1 + b + 1
    starts = np.cumsum(lengths) - lengths
    bits = np.zeros(lengths.sum(), np.uint8)
    within = np.arange(ones.sum()) - np.repeat(np.cumsum(ones) - ones, ones)
    bits[np.repeat(starts, ones) + within] = 1
    for j in range(b):
        bits[starts + ones + 1 + j] = gaps >> (b - 1 - j) & 1
    bits[starts + ones + 1 + b] = values[places] < 0
    magnitude = abs(values[places[0]]) if len(places) else 0.0
    return struct.pack(HEADER, len(values), len(places), b, magnitude) + np.packbits(bits).tobytes()


def read_bits(data: bytes) -> Tensor:
    """The vector again, its magnitude as 16 bits have it."""
    n, count, b, magnitude = struct.unpack_from(HEADER, data)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=struct.calcsize(HEADER))).tolist()
    found, at, place = np.zeros(n, np.float32), 0, -1
    for _ in range(count):
        gap = 0
        while bits[at]:
            gap, at = gap + 1, at + 1
        for bit in bits[at + 1 : at + 1 + b]:
            gap = 2 * gap + bit
        at += b + 2
        place += gap + 1
        found[place] = -magnitude if bits[at - 1] else magnitude
    return torch.from_numpy(found)
