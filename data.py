"""Text to tokens on disk, and tokens on disk to the batch of a step.

    python data.py --source stdlib --out data/stdlib --tokenizer train:4096

How a corpus becomes a dataset, in `write_dataset`:
1. A source gives its items. The plain one is `Text`, the documents of files, folders, Python's
   standard library or a download; lib/chat_source.py has conversations, for `--template`.
2. An exact duplicate of an earlier item is dropped and counted.
3. A hash of the item (of a conversation: of its first question) decides whether it is for
   validation, so adding data never moves one.
4. All cores turn items into tokens: a text with BOS before and EOS after it, a conversation with
   a mask of the tokens that the loss counts.
5. The tokens are written to flat files `{train,val}_{00000…}.bin`, described by meta.json, in a
   folder that gets its name only when it is complete.

A `Dataset` is one split of such a folder as sequences. Its layout (lib/layouts.py) says what is in
one: a list of rows, two for a preference pair, else one; a row is a list of pieces, each (file,
first token, number of tokens). `Mixture` draws sequences from several datasets; which ones a step
trains on is a pure function of seed, batch size and step.
"""

from lib.cli import BadInput, run_command, spell  # isort: skip (refuses old Pythons, Windows)

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import chat_source, order, sources
from lib.chat_source import Chats, show
from lib.datasets import IGNORE, TokenFiles, check_all_uncut
from lib.documents import encode_document, plain_bytes, read_texts, train_on_documents
from lib.files import new_folder
from lib.layouts import Packed, Pairs, Piece, Row, Windows, positions
from lib.meta import check_together, report, write_meta
from lib.order import block_shares, mixture_weights, shuffled
from lib.shards import (
    EncodedTask,
    ShardWriter,
    describe_dataset,
    drop_copies_and_split,
    encode_task,
    group_tasks,
    map_in_order,
    token_dtype,
)
from lib.sources import CORPORA, SUFFIXES, find_files
from lib.tokenizer import Tokenizer
from lib.tokenizer_training import trained_size

LAYOUTS = {"text": Windows, "chat": Packed, "preference": Pairs}


# ---- preparation ----


@dataclass
class Config(chat_source.Flags, sources.Flags):
    """Prepare a dataset folder from text."""

    show: str | None = None
    """instead print examples of this folder, what the loss counts in brackets"""
    n: int = 3  # how many examples


class Text:
    """The plain source: the documents of text files.

    A source says what its items are, what tells two of them apart, and how one becomes tokens.
    """

    suffixes = SUFFIXES
    encode = staticmethod(encode_document)    # item, tokenizer -> its documents; runs in workers
    content = staticmethod(str.encode)        # items of one content are copies
    group = None                              # items of one group go together; None: by content
    size = staticmethod(len)                  # of an item, in characters

    def __init__(self, config: sources.Flags):
        self.config, self.counts = config, Counter()
        self.flags = {"val_fraction": config.val_fraction}  # what else to type to make it again
        self.flags |= {"val_last": True} if config.val_last else {}
        if trained_size(config.tokenizer) is None:
            Tokenizer(config.tokenizer)  # before anything is downloaded
        for item in config.source:
            if item in CORPORA and CORPORA[item].chats:
                hint = "give a --template, such as llama2-chat"
                raise BadInput(f"--source {item} is conversations; {hint}")

    def begin(self, files: list[Path], folder: Path) -> Tokenizer:
        """The tokenizer of the dataset, trained on these files where that is asked."""
        self.files = files
        size = trained_size(self.config.tokenizer)
        if size is None:
            return Tokenizer(self.config.tokenizer)
        return Tokenizer(train_on_documents(files, size, self.config, folder))

    def items(self) -> Iterator[str]:
        return read_texts(self.files, self.counts, self.config)

    def progress(self) -> dict:
        """How the bar counts what is done, and of how much."""
        return {"total": plain_bytes(self.files), "unit": "B", "unit_scale": True}

    def done(self, task: EncodedTask) -> int:
        return task.num_bytes

    def about(self, empty: bool) -> dict:
        """What meta.json says of it; empty where no document is left."""
        return {
            "documents_are": "BOS, text, EOS",
            "empty_documents": self.counts["empty"],
            "duplicate_documents": self.counts["duplicates"],
        }


def make_dataset(config: sources.Flags, source: Text) -> dict:
    """Make the folder config.out from a source and return its meta.json.

    The result does not depend on the number of workers. Raises ValueError for bad input; the folder
    appears only when everything in it is complete.
    """
    out = Path(config.out)
    workers = config.workers or os.cpu_count()
    sources.check_flags(config, workers)
    files = find_files(config.source, out.parent / "downloads", source.suffixes)
    with new_folder(out) as folder:
        meta = write_dataset(folder, source, files, config.val_fraction, workers)
        flags = {
            "source": config.source,
            "out": config.out,
            "tokenizer": config.tokenizer,
        }
        write_meta(folder, meta, spell(["python", "data.py"], flags | source.flags))
    return meta


def write_dataset(
    folder: Path, source: Text, files: list[Path], val_fraction: float, workers: int
) -> dict:
    """Write all of a dataset but meta.json, which is returned."""
    from tqdm import tqdm

    tokenizer = source.begin(files, folder)
    tokenizer.save(folder)
    path = str(folder / tokenizer.file)
    items = drop_copies_and_split(
        source.items(),
        source.content,
        val_fraction,
        folder / "seen.db",
        source.counts,
        source.group,
    )
    tasks = group_tasks(items, source.size)
    work = functools.partial(
        encode_task,
        encode=source.encode,
        tokenizer_path=path,
    )
    writer = ShardWriter(folder, token_dtype(tokenizer.vocab_size))
    with tqdm(**source.progress(), desc="tokenizing", file=sys.stderr) as bar:
        for task in map_in_order(work, tasks, workers):
            source.counts.update(task.counts)
            if task.sizes:
                num = len(task.sizes)
                writer.write(task.split, task.ids, num, task.num_bytes, task.mask, task.sizes)
            bar.update(source.done(task))
    about = source.about(empty=not any(writer.files.values()))
    return describe_dataset(tokenizer, writer, val_fraction, about)


# ---- reading ----


class Batch(NamedTuple):
    """Rows (B, T) of int64: inputs, and the targets, which are the inputs one later."""

    tokens: np.ndarray  # these are torch's tensors after `to`, documents a lib.kernels.Documents
    targets: np.ndarray
    documents: np.ndarray | None = None  # packed rows end to end: where documents begin, and end
    numbers: Sequence[int] = range(0)    # of the sequences in the run

    def positions(self) -> np.ndarray:
        """In packed rows (B, T) the place of each token in its document."""
        return positions(self.documents, self.tokens.shape)

    def to(self, device) -> "Batch":
        """As tensors: tokens and documents on the device; targets on the host, where the loss finds
        what to leave out without waiting. Pinned memory lets the copies run beside the work."""
        from lib.packed import Documents
        from lib.tensors import copied, pinned

        documents = None
        if self.documents is not None:
            documents = Documents(
                copied(self.positions(), device),
                copied(self.documents.astype(np.int32), device),
            )
        tokens = copied(self.tokens, device)
        return Batch(tokens, pinned(self.targets, device), documents, self.numbers)


class Dataset(TokenFiles):
    """One split of a dataset folder as sequences, laid out as its kind asks, or packed.

    Raises ValueError when the folder is incomplete, or its files are not what meta.json says.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int, packed: bool = False):
        super().__init__(folder, split, seq_len)
        kind = self.meta.get("kind", "text")
        layout = Packed if packed and kind == "text" else LAYOUTS[kind]
        self.layout = layout(self)
        counts = self.meta["splits"][split]
        num_targets = counts.get("targets") or self.layout.num_targets
        self.bytes_per_target = counts["bytes"] / num_targets

    def __len__(self) -> int:
        return len(self.layout)

    def index(self, number: int, seed: int) -> int:
        """The sequence that is drawn as the number-th: an epoch is each once, shuffled anew."""
        epoch, place = divmod(number, len(self))
        return shuffled(place, len(self), (seed, epoch))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences of these indices. Raises ValueError for a token outside the vocabulary."""
        return fill([(self, row) for index in indices for row in self.layout[int(index)]])

    def spread_indices(self, count: int) -> list[int]:
        """At most count sequences spaced evenly over the split, always the same."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]

    def pieces(self, index: int) -> list[Piece]:
        """The stretches of text in a sequence: (file, first token, number of inputs)."""
        return [piece for row in self.layout[index] for piece in row]

    def place(self, index: int) -> str:
        """Where a sequence comes from: file, tokens, and which of the file's documents they are."""
        return self.place_of_pieces(self.pieces(index))


def fill(rows: list[tuple[Dataset, Row]]) -> Batch:
    """The batch whose rows hold these pieces of datasets, all of one layout."""
    layout = rows[0][0].layout
    width = layout.width([row for _, row in rows])
    tokens = np.zeros((len(rows), width), np.int64)
    targets = np.full_like(tokens, IGNORE)
    bounds = []
    check_all_uncut(rows)  # reading a file that was cut meanwhile would kill the process
    for i, (data, row) in enumerate(rows):
        used = 0
        for file, start, size in row:
            bounds.append(i * width + used)
            place = slice(used, used + size)
            # the tokens, and those one later, with IGNORE where the loss does not count
            tokens[i, place], targets[i, place] = data.read(file, start, size)
            used += size
        if used < width:  # what is left over is as another document, without targets
            bounds.append(i * width + used)
    if not isinstance(layout, Packed):
        return Batch(tokens, targets)
    bounds.append(tokens.size)
    return Batch(tokens, targets, np.array(bounds))


class Mixture:
    """Datasets drawn from together, each source `FOLDER` or `FOLDER:WEIGHT`.

    Every 1,000 sequences have exactly the proportions of the weights, in an order shuffled
    anew for each block; each source goes through its own epochs. Conversations are always packed,
    and texts that are drawn with them too. Raises ValueError for a bad weight, and for sources of
    different tokenizers or templates, or pairs among others.
    """

    def __init__(self, sources: tuple[str, ...], split: str, seq_len: int, packed: bool = False):
        self.folders, self.weights = mixture_weights(sources)
        self.kind = check_together(self.folders)
        self.packed = self.kind == "chat" or self.kind == "text" and packed
        self.parts = [Dataset(folder, split, seq_len, self.packed) for folder in self.folders]
        self.shares = block_shares(sources, self.weights)

    def __len__(self) -> int:
        """How many sequences the sources have together: an epoch."""
        return sum(map(len, self.parts))

    def draw(self, number: int, seed: int) -> tuple[int, int]:
        """(source, index) of the number-th sequence of the run, counted from 0."""
        source, drawn = 0, number
        if len(self.parts) > 1:
            source, drawn = order.draw(self.shares, number, seed)
        return source, self.parts[source].index(drawn, seed)

    def numbers(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
        """The sequences of this rank in optimizer step `step` (from 0), of batch_size in all."""
        share = batch_size // world
        first = step * batch_size + rank * share
        return range(first, first + share)

    def batch(self, numbers: Sequence[int], seed: int) -> Batch:
        rows = []
        for number in numbers:
            source, index = self.draw(number, seed)
            part = self.parts[source]
            rows += [(part, row) for row in part.layout[index]]
        return fill(rows)._replace(numbers=numbers)

    def feed(self, config, steps: range, device) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step on the device, made one step ahead of their use in
        a thread beside the training. config is train.Config."""
        import torch
        import torch.distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()

        def make(step: int) -> list[Batch]:
            numbers = self.numbers(step, config.batch_size, rank, world)
            parts = order.in_parts(numbers, config.micro_batch or len(numbers))
            return [self.batch(part, config.seed).to(device) for part in parts]

        def begin():
            if device.type == "cuda":
                torch.cuda.set_device(device)

        return order.one_ahead(make, steps, begin)

    def validation(self, config, rank: int, world: int) -> Iterator[tuple[int, Batch, int]]:
        """This rank's part of --eval_tokens: the number of the source, a batch on the host, and how
        many of its sequences count.

        Every rank makes the same number of batches of one shape, filled up without targets.
        """
        size = config.micro_batch or max(1, config.batch_size // world)
        for source, (part, weight) in enumerate(zip(self.parts, self.weights)):
            rows_each = part.layout.rows_each
            share = int(config.eval_tokens * weight) // (rows_each * config.seq_len)
            indices = part.spread_indices(max(1, share))
            for local in order.shared_among_ranks(indices, size, rank, world):
                filler = indices[:1] * (size - len(local))
                batch = part.batch(local + filler)
                batch.targets[rows_each * len(local) :] = IGNORE
                yield source, batch, len(local)

    def place(self, number: int, seed: int) -> str:
        source, index = self.draw(number, seed)
        return self.parts[source].place(index)

    def epochs(self, count: int) -> dict[str, float]:
        """How often each source has been gone through after count sequences."""
        sizes = [len(part) for part in self.parts]
        passes = order.passes(self.shares, sizes, count)
        return dict(zip(self.folders, passes))


# ---- command line ----


def main(config: Config):
    if config.show is not None:
        if not config.show or config.n < 1:
            problem = f"needs a folder, and --n {config.n} must be at least 1"
            raise BadInput(f'--show "{config.show}" {problem}')
        print(show(config.show, config.n))
        return
    meta = make_dataset(config, Chats(config) if config.template else Text(config))
    if meta.get("kind") == "chat":
        print((Path(config.out) / "cleaning.txt").read_text())
    if config.template:
        print(show(config.out, 1))
    report(meta)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
