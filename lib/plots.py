"""The pictures, by matplotlib, which is imported only where one is drawn."""

import contextlib
import io
from collections import defaultdict
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def picture(place: str | Path | io.BytesIO, size: tuple[float, float], *shape: int, **options):
    """The axes of a picture of this size in inches, which is written as a .png when all is drawn.

    shape are its rows and columns of panels, options those of matplotlib's subplots.
    """
    import matplotlib

    matplotlib.use("Agg")  # in files, without a window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", **options)
    try:
        for panel in figure.axes:
            panel.grid(alpha=0.3)
        yield axes
        figure.savefig(place, dpi=120, format="png")
    finally:
        plt.close(figure)


def draw_curves(points: list, name: str, place: io.BytesIO):
    """The score of runs against steps and tokens, as a .png; see lib/curves.py for the points.

    A line for each setting: the mean of its runs, which differ in the seed alone, and the band that
    they fill.
    """
    with picture(place, (10, 4), 1, 2, sharey=True) as panels:
        _draw_settings(panels, points, name)


def _draw_settings(panels, points: list, name: str):
    for setting in dict.fromkeys(point.setting for point in points):
        chosen = [point for point in points if point.setting == setting]
        label = ", ".join(dict.fromkeys(point.run for point in chosen))
        for axes, axis in zip(panels, ("step", "tokens")):
            scores = defaultdict(list)  # at each place on the axis
            for point in chosen:
                value, _, _ = point.interval
                scores[getattr(point, axis)].append(value)
            places = sorted(scores)
            means = [np.mean(scores[place]) for place in places]
            lows = [min(scores[place]) for place in places]
            highs = [max(scores[place]) for place in places]
            (line,) = axes.plot(places, means, "o-", linewidth=1, label=label)
            axes.fill_between(places, lows, highs, alpha=0.2, color=line.get_color())
            axes.set(xlabel=axis, ylabel=name)
    panels[0].set_title(f"{name}, by step")
    panels[1].set_title("by tokens read")
    panels[0].legend()


SIDES = {  # of bench.py, as a reader knows them
    "plainllama": "plainllama",
    "hf here": "transformers' model in this loop",
    "hf": "transformers with its own Trainer",
}


def draw_speeds(results: dict, title: str, place: io.BytesIO):
    """What bench.py measured, as a .png: a dot for every round and a bar for their median, of the
    rows that were measured in turns if there were such."""
    last = {row["name"]: row for row in results["rows"]}  # a contest comes after the trials
    contests = results.get("contests", [])
    names = list(dict.fromkeys(name for one in contests for name in one["of"])) or list(last)
    rows = [last[name] for name in reversed(names)]  # the first goes to the top
    labels = []
    with picture(place, (9, 1.2 + 0.45 * len(rows))) as axes:
        for height, row in enumerate(rows):
            speed, seconds = row["tokens_per_s"], row["seconds"]
            rounds = [speed * np.median(seconds) / one for one in seconds]
            bar = axes.barh(height, speed, height=0.6, alpha=0.5, color="C0")
            axes.bar_label(bar, fmt="{:,.0f}", padding=8)
            axes.plot(rounds, [height] * len(rounds), "o", color="black", markersize=3)
            side = row["name"].split(row["dtype"])[0].strip()
            rest = row["name"].removeprefix(side).strip()
            labels.append(f"{SIDES.get(side, side)}\n{rest}")
        for one in contests:
            ratios = one["ratios"]
            against = SIDES.get(one["of"][1].split(" fp32")[0].split(" bf16")[0], one["of"][1])
            title += f"\n{one['ratio']:.2f} × {against} ({min(ratios):.2f} to {max(ratios):.2f})"
        axes.set_yticks(range(len(rows)), labels)
        axes.set(xlabel="tokens a second; a dot is a round", title=title)
        axes.margins(x=0.15)
