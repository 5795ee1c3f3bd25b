"""Which part of a text a model goes on with: all of it, a random part, the one most like a reference.

The text is PyTorch's own Python code, which everybody has who runs this, cut into passages. Every tenth passage is the
reference; the rest is new.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from ngrams import Ngrams
from study import once, text

from data import Tokenizer
from lib.files import write_whole

FOLDERS = ("nn", "optim", "distributions", "utils")  # of PyTorch
PASSAGE = 200  # tokens


def domain(where: Path) -> Path:
    """PyTorch's code in the tokenizer of the standard library; a tenth of its files is held out."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    how = ("--tokenizer", text(), "--val_fraction", 0.1, "--out", where / "torch")
    return once(where / "torch", "data.py", "--source", *(root / folder for folder in FOLDERS), *how)


def chosen(texts: list[list[int]], scores: list[float], tokens: int) -> list[list[int]]:
    """The texts of the lowest scores, of so many tokens in all, or the few more of the last one.

    >>> chosen([[1, 2], [3], [4, 5, 6]], [0.2, 0.9, 0.1], 4)
    [[4, 5, 6], [1, 2]]
    """
    kept, size = [], 0
    for place in np.argsort(scores, kind="stable"):
        if size >= tokens:
            break
        kept.append(texts[place])
        size += len(texts[place])
    return kept


def select(name: str, texts: list[list[int]], tokens: int, vocabulary: int) -> list[list[int]]:
    """Of all texts: new; or of these so many tokens, random or best, of the lowest perplexity."""
    reference, new = texts[::10], [each for number, each in enumerate(texts) if number % 10]
    if name == "new":
        return new
    scores = np.random.default_rng(0).random(len(new)).tolist()
    if name == "best":
        judge = Ngrams(reference, vocabulary)
        scores = [judge.perplexity(each) for each in new]
    return chosen(new, scores, tokens)


def subset(name: str, where: Path, tokens: int) -> Path:
    """One of them as a dataset, of which data.py holds out a tenth, or `stdlib`."""
    if name == "stdlib":
        return text()
    made, lines = where / name, where / f"{name}.jsonl"
    if not made.exists():
        tokenizer, texts = Tokenizer(text()), []
        for ids in read_split(domain(where), "train"):
            texts += [ids[begin : begin + PASSAGE] for begin in range(0, len(ids), PASSAGE)]
        kept = select(name, texts, tokens, tokenizer.vocab_size)
        write_whole(lines, "".join(json.dumps({"text": tokenizer.decode(each)}) + "\n" for each in kept))
    return once(made, "data.py", "--source", lines, "--out", made, "--tokenizer", text(), "--val_fraction", 0.1)
