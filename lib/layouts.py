"""Which stretches of the token files a sequence holds.

A piece is (file, first token, number of inputs), a row a list of pieces, and a sequence a list of
rows. A layout is a sequence of sequences: it has a length, and layout[index] gives the rows of one.
"""

import math

import numpy as np

from lib.datasets import TokenFiles
from lib.errors import BadInput

ROUND = 64  # rows of pairs are padded to a multiple of this

Piece = tuple[int, int, int]
Row = list[Piece]


class Windows:
    """Windows of a text that start every seq_len tokens, do not reach over the end of a file, and
    run over document boundaries."""

    rows_each = 1

    def __init__(self, data: TokenFiles):
        sizes = [len(tokens) - 1 for tokens in data.files]
        self.seq_len = data.seq_len
        self.counts = [max(0, size // data.seq_len) for size in sizes]
        self.num_targets = sum(sizes)  # all but the first of a file
        if not sum(self.counts):
            problem = f"no {data.split} file has {data.seq_len + 1} tokens"
            raise BadInput(f"{data.folder}: {problem}, one of --seq_len {data.seq_len}")

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> list[Row]:
        for file, count in enumerate(self.counts):
            if index < count:
                begin = index * self.seq_len
                return [[(file, begin, self.seq_len)]]
            index -= count
        raise IndexError(index)

    def width(self, rows: list[Row]) -> int:
        return self.seq_len


class Packed:
    """Rows filled with whole documents, padded at the end; a document longer than a row is cut.

    Rows are packed by best fit over the whole split, the longest pieces first; 20 bytes of memory a
    document.
    """

    rows_each = 1

    def __init__(self, data: TokenFiles):
        self.seq_len = data.seq_len
        pieces = []
        for file in range(len(data.files)):
            bounds = data.bounds[file] if data.bounds else data.find_documents(file)
            pieces.append(cut(file, bounds, data.seq_len))
        pieces = np.concatenate(pieces)
        row_of = pack(pieces[:, 2], data.seq_len)
        by_row = np.argsort(row_of, kind="stable")
        self.table = pieces[by_row]
        pieces_in_row = np.bincount(row_of)
        self.first = np.concatenate(([0], np.cumsum(pieces_in_row)))
        self.num_targets = int(self.table[:, 2].sum())  # all but the first token of each document

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> list[Row]:
        begin, end = self.first[index], self.first[index + 1]
        pieces = self.table[begin:end].tolist()
        return [[tuple(piece) for piece in pieces]]

    def width(self, rows: list[Row]) -> int:
        return self.seq_len


class Pairs:
    """Preference pairs: a sequence is two rows, the chosen conversation first.

    Rows are padded at the end to the longest of the batch, rounded up to a multiple of ROUND.
    """

    rows_each = 2

    def __init__(self, data: TokenFiles):
        self.bounds = data.bounds
        self.seq_len = data.seq_len
        sizes = [(len(begins) - 1) // 2 for begins in data.bounds]
        self.ends = np.cumsum(sizes)  # of each file, in pairs

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> list[Row]:
        file = int(np.searchsorted(self.ends, index, "right"))
        before = int(self.ends[file - 1]) if file else 0
        first = 2 * (index - before)
        begin, middle, end = self.bounds[file][first : first + 3].tolist()
        chosen = (file, begin, middle - begin - 1)
        rejected = (file, middle, end - middle - 1)
        return [[chosen], [rejected]]

    def width(self, rows: list[Row]) -> int:
        longest = max(size for row in rows for _, _, size in row)
        rounded_up = math.ceil(longest / ROUND) * ROUND
        return min(self.seq_len, rounded_up)


def positions(bounds: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """In packed rows the place of each token in its document; bounds are those of the rows laid end
    to end."""
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    place = np.arange(bounds[-1]) - starts
    return place.reshape(shape)


def cut(file: int, bounds: np.ndarray, seq_len: int) -> np.ndarray:
    """The pieces (N, 3) of a file's documents; the last token of a document has no target and is no
    input."""
    starts, inputs = bounds[:-1], np.diff(bounds) - 1
    per_document = -(-inputs // seq_len)
    before = np.cumsum(per_document) - per_document  # pieces of the documents before
    number = np.arange(per_document.sum()) - np.repeat(before, per_document)  # in its document
    offset = number * seq_len
    left = np.repeat(inputs, per_document) - offset
    sizes = np.minimum(seq_len, left)
    first_tokens = np.repeat(starts, per_document) + offset
    return np.stack((np.full_like(sizes, file), first_tokens, sizes), 1)


def pack(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece, when the longest goes first, always to the row that it fills best
    (best-fit decreasing).

    >>> pack(np.array([2, 7, 3, 5, 3]), 10).tolist()
    [1, 0, 0, 1, 1]
    """
    rows = np.empty(len(sizes), np.int64)
    room = min(room, int(sizes.sum()))  # in more there would be as many rows, and a longer table
    by_room = [[] for _ in range(room + 1)]  # the rows that have this much room left
    open_rows = 0  # bit r is set where by_room[r] is not empty
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = open_rows >> size
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            left = size + lowest_bit
            row = by_room[left].pop()
            if not by_room[left]:
                open_rows ^= 1 << left
        else:
            row, left = count, room
            count += 1
        rows[piece] = row
        left -= size
        if left > 0:
            by_room[left].append(row)
            open_rows |= 1 << left
    return rows
