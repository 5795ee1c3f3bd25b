"""Text to tokens on disk, and tokens on disk to the batch of a step.

    python data.py --source stdlib --out data/stdlib --tokenizer train:4096

The way of a corpus:
1. `read_documents` streams the documents of the source: files, folders, Python's standard library, a download.
2. An exact duplicate of an earlier document is dropped and counted.
3. The hash of a document, of conversations that of the first question, decides whether it is for validation, so
   adding data never moves one.
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

from lib.cli import run_command  # isort: skip (lib refuses old Pythons, Windows)

import bisect
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.chat_formats import FORMATS
from lib.chats import counted_as, first_question, usable
from lib.cleaning import Cleaner, Cleaning
from lib.datasets import check_bounds, check_uncut
from lib.disk import writing
from lib.documents import TOKENIZER_CHARS, split_documents, tokenizer_texts
from lib.files import new_folder
from lib.meta import read_meta
from lib.refusals import is_refusal  # noqa: F401 (part of what data.py offers)
from lib.shards import (
    ShardWriter,
    describe_dataset,
    drop_copies_and_split,
    group_tasks,
    map_in_order,
    token_dtype,
    tokenize,
)
from lib.sources import CHAT_SUFFIXES, CORPORA, SUFFIXES, find_files
from lib.templates import TEMPLATES, bracketed, render_task
from lib.tokenizer import Tokenizer, train_tokenizer

IGNORE = -100                  # a target that does not count, as in model.py
MAX_PIECES = 1_000_000         # the largest vocabulary that is trained; LLaMA-3's has 128,256
MAX_WORKERS = 1024             # far more than a machine has cores
MIXTURE_BLOCK = 1000           # sequences in which a mixture has exactly its proportions






# ---- tokenizers ----












# ---- documents ----






















# ---- preparation ----






















def prepare(
    source: tuple[str, ...], out: str | Path, tokenizer: str, val_fraction: float = 0.05, workers: int | None = None
) -> dict:
    """Make the dataset folder out and return its meta.json. The result does not depend on the number of workers.

    Raises ValueError for bad input; out appears only when everything in it is complete.
    """
    trained = tokenizer.removeprefix("train:") if tokenizer.startswith("train:") else None
    if trained is not None and not (re.fullmatch("[0-9]{1,7}", trained) and 300 < int(trained) <= MAX_PIECES):
        sizes = f"a vocabulary size above 300 and at most {MAX_PIECES:,}"
        raise ValueError(f"--tokenizer {tokenizer[:40]}: give {sizes}, such as train:4096")
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
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"--workers {workers} must be at least 1 and at most {MAX_WORKERS}, or 0 for all cores")
    if not all(flags["source"]) or not flags["source"]:
        raise ValueError('--source names nothing ("" is no file); give a file, a folder or a name such as stdlib')
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} exists; choose another folder or delete it")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    files = find_files(flags["source"], out.parent / "downloads", suffixes)
    with new_folder(out) as aside:
        meta = write(aside, files, val_fraction=val_fraction, workers=workers)
        words = [word for name, value in flags.items() for word in _as_flag(name, value)]
        meta["command"] = shlex.join(["python", "data.py", *words])
        with writing(aside / "meta.json"):
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
        texts = tokenizer_texts(files, val_fraction, aside / "seen.db", total)
        train_tokenizer(texts, int(tokenizer[6:]), path)
    chosen = Tokenizer(path)
    chosen.save(aside)

    counts = Counter()
    writer = ShardWriter(aside, token_dtype(chosen.vocab_size))
    tasks = group_tasks(split_documents(files, val_fraction, aside / "seen.db", counts))
    work = functools.partial(tokenize, tokenizer_path=str(aside / chosen.file))
    expected = None if any(path.name.endswith((".gz", ".parquet")) for path in files) else total
    with tqdm(total=expected, unit="B", unit_scale=True, desc="tokenizing", file=sys.stderr) as bar:
        for split, tokens, documents, num_bytes in map_in_order(work, tasks, workers):
            writer.write(split, tokens, documents, num_bytes)
            bar.update(num_bytes)

    about = {"empty_documents": counts["empty"], "duplicate_documents": counts["duplicates"]}
    return describe_dataset(chosen, writer, val_fraction, {"documents_are": "BOS, text, EOS"} | about)






# ---- chats ----






























































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
    content = lambda sides: json.dumps(sides).encode()
    items = drop_copies_and_split(sides, content, val_fraction, aside / "seen.db", counts, first_question)
    tasks = group_tasks(items, lambda sides: sum(len(turn.text) for side in sides for turn in side))
    work = functools.partial(render_task, tokenizer_path=str(aside / chosen.file), template=template, max_len=max_len)
    with tqdm(unit=" documents", desc="tokenizing", file=sys.stderr) as bar:
        for name, ids, mask, sizes, num_bytes, counted in map_in_order(work, tasks, workers):
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
        with writing(aside / "cleaning.txt"):
            (aside / "cleaning.txt").write_text(cleaner.report() + "\n")
    return describe_dataset(chosen, writer, val_fraction, about | {"counts": dict(counts)})




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




# ---- cleaning ----




































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
        self.arrange(split)
        self.bytes_per_target = counts["bytes"] / (counts.get("targets") or self.count_targets())

    def arrange(self, split: str):
        """Find out which sequences there are."""
        seq_len = self.seq_len
        self.counts = [max(0, (len(tokens) - 1) // seq_len) for tokens in self.files]
        if not sum(self.counts):
            raise ValueError(f"{self.folder}: no {split} file has {seq_len + 1} tokens, one of --seq_len {seq_len}")

    def count_targets(self) -> int:
        """How many tokens of the split can be targets: all but the first of a file."""
        return sum(len(tokens) - 1 for tokens in self.files)

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
        for file in {file for pieces in rows for file, _, _ in pieces}:
            self.check_uncut(file)
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

    def check_uncut(self, file: int):
        check_uncut(self.files[file])

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

    def count_targets(self) -> int:
        """How many tokens of the split are targets: all but the BOS of each document."""
        return int(self.table[:, 2].sum())

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
            bounds = np.fromfile(path.with_suffix(".bounds"), "<u8")
            check_bounds(path.with_suffix(".bounds"), bounds, len(tokens))
            self.bounds.append(bounds.astype(np.int64))
        longest = max(int(np.diff(bounds).max()) for bounds in self.bounds)
        if longest > self.seq_len + 1:
            problem = f"a conversation has {longest} tokens, more than --seq_len {self.seq_len}"
            raise ValueError(f"{self.folder}: {problem}; prepare it with --max_len {self.seq_len}")

    def check_uncut(self, file: int):
        super().check_uncut(file)
        check_uncut(self.masks[file])

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
    room = min(room, int(sizes.sum()))  # in more there would be as many rows, and a longer table
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
    if not sources:
        raise ValueError("--data names no folder; it takes one or more that data.py has made")
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
    if twice := [name for name, count in Counter(map(os.path.realpath, folders)).items() if count > 1]:
        raise ValueError(f"--data {' '.join(sources)} names {twice[0]} twice; FOLDER:WEIGHT draws more often from one")
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
    template: str = ""
    """llama2-chat, vicuna, alpaca (Stanford's own), chatml, plain or alpaca-lf (as most later copies of Alpaca have it,
    with a line end before the answer) makes a set to fine-tune on"""
    max_len: int = 2048                 # tokens; what is longer is split between exchanges
    format: str = "auto"
    """by a record's fields, or sharegpt, openai, alpaca, dolly, oasst, hh-rlhf, pairs (ShareGPT's chosen, rejected)"""
    allow_bad: float = 0.01             # fraction of the records that may be bad, and are left out
    cleaning: Cleaning = field(default_factory=Cleaning)
    show: str | None = None             # instead print examples of this folder, what the loss counts in brackets
    n: int = 3                          # so many


def main(config: Config):
    if config.show is not None:
        if not config.show or config.n < 1:
            raise ValueError(f'--show "{config.show}" needs a folder, and --n {config.n} must be at least 1')
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
