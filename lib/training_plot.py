"""loss.png: how runs went, from the rows of their log.jsonl."""

import math
from pathlib import Path

import numpy as np

from lib.plots import picture

SMOOTHED = 20  # so many pieces of a curve are told apart


def smoothed(values: list[float]) -> np.ndarray:
    """Each value averaged with those around it, at the ends with fewer."""
    half = len(values) // SMOOTHED
    values = np.asarray(values)
    means = []
    for place in range(len(values)):
        near = min(half, place, len(values) - 1 - place)
        means.append(values[place - near : place + near + 1].mean())
    return np.array(means)


def of_rows(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps at which something was logged, and what."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_losses(
    runs: dict[str, list[dict]], place: Path, title: str, unit: str, vocab_size: int = 0
):
    """Training and validation loss of runs, by name, against steps and tokens, and the learning
    rate below, as a .png.

    A training loss is the mean since the line before, faint, and smoothed over it. vocab_size, if
    the weights began at random, gives the loss of a guess at random: ln V.
    """
    options = dict(sharex=True, height_ratios=(4, 1))
    with picture(place, (8, 5.5), 2, 1, **options) as (axes, below):
        highest = 0.0
        for number, (name, rows) in enumerate(runs.items()):
            color, prefix = f"C{number}", f"{name}, " if len(runs) > 1 else ""
            steps, losses = of_rows(rows, "mean_loss")
            if not losses:
                steps, losses = of_rows(rows, "loss")
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
            if losses:
                axes.plot(steps, smoothed(losses), color=color, label=f"{prefix}training")
                highest = max(highest, max(losses))
            steps, losses = of_rows(rows, "val_loss")
            axes.plot(
                steps, losses, "o--", color=color, markersize=4, linewidth=1, markerfacecolor="white",
                label=f"{prefix}validation",
            )  # fmt: skip
            below.plot(*of_rows(rows, "lr"), color=color)
        if vocab_size and highest > 0.7 * math.log(vocab_size):
            label = f"ln V = {math.log(vocab_size):.2f}, a guess at random"
            axes.axhline(math.log(vocab_size), color="black", linewidth=0.8, ls=":", label=label)
        axes.set(ylabel=f"loss (nats a {unit})", title=title)
        axes.legend()
        below.set(xlabel="step", ylabel="learning rate")
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        add_tokens(axes, [row for rows in runs.values() for row in rows])


def add_tokens(axes, rows: list[dict]):
    """A second axis on top: millions of tokens, where all steps have as many."""
    each = {row["tokens"] / row["step"] for row in rows if row.get("tokens") and row["step"]}
    if len(each) == 1:
        millions = each.pop() / 1e6

        def to_tokens(steps):
            return steps * millions

        def to_steps(tokens):
            return tokens / millions

        axes.secondary_xaxis("top", functions=(to_tokens, to_steps)).set_xlabel("million tokens")
