"""How well a model knows several kinds of text, at many of its checkpoints, for recipes about the course of training.

Of each kind, a dataset: questions of recipes/cloze.py (`other`), and bits a byte of single windows, both of documents
that are held out.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scoring import Questions
from study import once

from data import Dataset
from lib.bits import BIT
from lib.checkpoints import checkpoints, remove
from lib.files import write_whole
from model import load


@torch.no_grad()
def of_windows(model, windows: Dataset, count: int) -> tuple[list[float], list[float]]:
    """Of so many windows spread over a split: the bits of each over its bytes, which are taken in proportion to its
    tokens, and the share of its tokens that the model holds for likeliest."""
    bits, guessed, places = [], [], windows.spread_indices(count)
    for begin in range(0, len(places), 8):
        batch = windows.batch(places[begin : begin + 8]).to(torch.device("cpu"))
        logits = model(batch.tokens)
        nats = -logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0].mean(1)
        bits += (nats / BIT / windows.bytes_per_target).tolist()
        guessed += (logits.argmax(-1) == batch.targets).float().mean(1).tolist()
    return bits, guessed


class Skills:
    """What is measured: `KIND right`, of each question 1 or 0; `KIND bits` and `KIND guessed` of each window."""

    def __init__(self, run: Path, kinds: dict[str, Path], where: Path, count: int):
        """kinds are datasets; count is how many questions of each; run has the window of all models to measure."""
        self.questions, self.windows = {}, {}
        for kind, data in kinds.items():
            made, sizes = where / f"{kind}_{count}.jsonl", ("--count", count, "--context", 32, "--size", 8)
            once(made, "recipes/cloze.py", "--data", data, *sizes, "--out", made)
            self.questions[kind] = Questions(run, made, chat=False)
            self.windows[kind] = Dataset(data, "val", load(run).config.max_seq_len)

    def of(self, model, windows: int = 32) -> dict[str, list[float]]:
        found = {}
        for kind, questions in self.questions.items():
            found[f"{kind} right"] = questions.right(model).astype(float).tolist()
            found[f"{kind} bits"], found[f"{kind} guessed"] = of_windows(model, self.windows[kind], windows)
        return found


def measured(kept: Path, models: dict[int, Path], measure: Callable) -> dict[int, dict[str, np.ndarray]]:
    """What measure says of the models by step: in the file kept, where it is there."""
    if not kept.exists():
        write_whole(kept, json.dumps({step: measure(load(model)) for step, model in models.items()}))
    read = json.loads(kept.read_text())
    return {int(step): {name: np.array(values) for name, values in found.items()} for step, found in read.items()}


def curve(kept: Path, run: Path, steps: Iterable[int], measure: Callable) -> dict[int, dict[str, np.ndarray]]:
    """As `measured`, of a run's checkpoints after these steps; then all but the last are deleted."""
    found = measured(kept, {step: run / f"step_{step:08d}" for step in steps}, measure)
    for checkpoint in checkpoints(run)[:-1]:
        remove(checkpoint)
    return found
