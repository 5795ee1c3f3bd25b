"""loss.png: how runs went, from the rows of their log.jsonl."""

import math
from pathlib import Path

import numpy as np

from lib.plots import picture

SMOOTHED = 20  # so many pieces of a curve are told apart


def smoothed(values: list[float]) -> np.ndarray:
    """Each value averaged with those around it, at the ends with fewer."""
    count = len(values)
    half = count // SMOOTHED
    values = np.asarray(values)
    means = []
    for place in range(count):
        left = count - 1 - place
        near = min(half, place, left)
        first, last = place - near, place + near
        around = values[first : last + 1]
        means.append(around.mean())
    return np.array(means)


def of_rows(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps at which something was logged, and what."""
    steps, values = [], []
    for row in rows:
        if row.get(name) is not None:
            steps.append(row["step"])
            values.append(row[name])
    return steps, values


def draw_losses(
    runs: dict[str, list[dict]], place: Path, title: str, unit: str, vocab_size: int = 0
):
    """Training and validation loss of runs, by name, against steps and tokens, and the learning
    rate below, as a .png.

    A training loss is the mean since the line before, faint, and smoothed over it. vocab_size, if
    the weights began at random, gives the loss of a guess at random: ln V.
    """
    options = dict(sharex=True, height_ratios=(4, 1))
    size = (8, 5.5)
    with picture(place, size, 2, 1, **options) as (axes, below):
        for number, (name, rows) in enumerate(runs.items()):
            prefix = ""
            if len(runs) > 1:
                prefix = f"{name}, "
            draw_run(axes, below, rows, f"C{number}", prefix)
        guess = math.log(vocab_size) if vocab_size else math.inf
        _, highest = axes.get_ylim()
        if highest > 0.7 * guess:
            label = f"ln V = {guess:.2f}, a guess at random"
            axes.axhline(guess, color="black", linewidth=0.8, ls=":", label=label)
        axes.set_ylabel(f"loss (nats a {unit})")
        axes.set_title(title)
        axes.legend()
        below.set_xlabel("step")
        below.set_ylabel("learning rate")
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        together = []
        for rows in runs.values():
            together += rows
        add_tokens(axes, together)


def draw_run(axes, below, rows: list[dict], color: str, prefix: str):
    """The curves of one run; prefix names it where there are others."""
    steps, losses = of_rows(rows, "mean_loss")
    if not losses:  # a run of an older version has none
        steps, losses = of_rows(rows, "loss")
    axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
    label = f"{prefix}training"
    axes.plot(steps, smoothed(losses), color=color, label=label)
    steps, losses = of_rows(rows, "val_loss")
    style = dict(color=color, markersize=4, linewidth=1, markerfacecolor="white")
    label = f"{prefix}validation"
    axes.plot(steps, losses, "o--", label=label, **style)
    steps, rates = of_rows(rows, "lr")
    below.plot(steps, rates, color=color)


def add_tokens(axes, rows: list[dict]):
    """A second axis on top: millions of tokens, where all steps have as many."""
    each = set()
    for row in rows:
        if row.get("tokens"):
            each.add(row["tokens"] / row["step"])
    if len(each) == 1:
        millions = each.pop() / 1e6

        def to_tokens(steps):
            return steps * millions

        def to_steps(tokens):
            return tokens / millions

        both_ways = (to_tokens, to_steps)
        top = axes.secondary_xaxis("top", functions=both_ways)
        top.set_xlabel("million tokens")
