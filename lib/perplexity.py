"""The task perplexity: windows of text, which stand as choices whose log-probabilities add up."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lib.documents import read_documents
from lib.errors import BadInput
from lib.meta import read_meta
from lib.prompts import Pair, Question, question_hash
from lib.sources import find_files


def perplexity(dataset: Callable):
    """The task; dataset is data.Dataset."""

    def task(config, tokenizer, room: int) -> Iterator[Question]:
        path = Path(config.data)
        if (path / "meta.json").exists():
            yield from dataset_windows(config, tokenizer, room, dataset, read_meta(path))
            return
        if not path.exists():
            raise BadInput(f"--data {path}: no such file or folder")
        for file in find_files((config.data,), path):
            texts = filter(str.strip, read_documents(file))
            for index, text in enumerate(texts):
                if config.limit and index >= config.limit:
                    break
                yield whole_document(str(file), index, text, tokenizer, room)

    return task


def whole_document(file: str, index: int, text: str, tokenizer, room: int) -> Question:
    ids = tokenizer.encode(text, bos=True)
    words = re.split(r"\s+", text)  # as lm-evaluation-harness counts them
    windows = list(rolling_windows(ids, room))
    question = Question(file, index, ids[:1], windows, sha256=question_hash(text))
    question.sizes = [len(text.encode()), len(words)]
    return question


def rolling_windows(ids: list[int], window: int) -> Iterator[Pair]:
    """(context, new tokens): each token after the first is new once, the last window with as much
    context as fits.

    >>> list(rolling_windows([1, 5, 6, 7, 8], 3))
    [([1], [5, 6, 7]), ([5, 6, 7], [8])]
    """
    for start in range(1, len(ids), window):
        end = min(start + window, len(ids))
        yield ids[max(0, end - 1 - window) : start], ids[start:end]


def dataset_windows(
    config, tokenizer, room: int, dataset: Callable, meta: dict
) -> Iterator[Question]:
    """Every window of the validation split by itself, as training measures it."""
    path = Path(config.data)
    if "template" in meta:
        raise BadInput(f"--data {path} holds conversations; perplexity is that of text")
    sizes = [file["tokens"] for file in meta["splits"]["val"]["files"]]
    largest = max(sizes, default=0)
    seq_len = max(1, min(room, largest - 1))
    val = dataset(path, "val", seq_len)
    if meta["tokenizer"]["sha256"] != tokenizer.sha256:
        other = f"another tokenizer than the model's {tokenizer.name}"
        raise BadInput(f"--data {path} was made with {other}")
    begins = [np.flatnonzero(tokens == meta["bos"]) for tokens in val.files]
    windows = range(len(val))
    for index in windows[: config.limit or None]:
        batch = val.batch([index])
        first = batch.tokens[0, :1].tolist()
        targets = batch.targets[0].tolist()
        num_bytes = len(targets) * val.bytes_per_target  # in proportion to the tokens
        sizes = [round(num_bytes, 3)]
        file, start, _ = val.pieces(index)[0]
        number = np.searchsorted(begins[file], start, "right")
        question = Question(str(path), index, first, [(first, targets)], sizes=sizes)
        question.document = f"file {file} document {number}"
        question.sha256 = question_hash(first, targets, sizes)
        yield question
