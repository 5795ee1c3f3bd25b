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
    size = (10, 4)
    with picture(place, size, 1, 2, sharey=True) as panels:
        draw_settings(panels, points, name)


def draw_settings(panels, points: list, name: str):
    by_steps, by_tokens = panels
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
    by_steps.set_title(f"{name}, by step")
    by_tokens.set_title("by tokens read")
    by_steps.legend()


SIDES = {  # of bench.py, as a reader knows them
    "plainllama": "plainllama",
    "hf here": "transformers' model in this loop",
    "hf": "transformers with its own Trainer",
}


def draw_speeds(results: dict, title: str, place: io.BytesIO):
    """What bench.py measured, as a .png: a dot for every round and a bar for their median, of the
    rows that were measured in turns if there were such."""
    contests = results.get("contests", [])
    rows = compared_rows(results["rows"], contests)
    rows.reverse()  # the first goes to the top
    height = 1.2 + 0.45 * len(rows)
    size = (9, height)
    with picture(place, size) as axes:
        draw_bars(axes, rows)
        for one in contests:
            low, high = min(one["ratios"]), max(one["ratios"])
            other = one["of"][1]
            dtype = next(row["dtype"] for row in rows if row["name"] == other)
            side, _ = side_and_setting(other, dtype)
            title += f"\n{one['ratio']:.2f} × {side} ({low:.2f} to {high:.2f})"
        axes.set_title(title)


def draw_bars(axes, rows: list[dict]):
    """The speed of each row, the first at the bottom: a bar for the median, a dot for a round."""
    labels = []
    for height, row in enumerate(rows):
        speed, seconds = row["tokens_per_s"], row["seconds"]
        tokens = speed * np.median(seconds)
        rounds = [tokens / one for one in seconds]
        heights = [height] * len(rounds)
        bar = axes.barh(height, speed, height=0.6, alpha=0.5, color="C0")
        axes.bar_label(bar, fmt="{:,.0f}", label_type="center")
        axes.plot(rounds, heights, "o", color="black", markersize=3)
        side, setting = side_and_setting(row["name"], row.get("dtype", ""))
        labels.append(f"{side}\n{setting}")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("tokens a second; a dot is a round")
    axes.margins(x=0.15)


def compared_rows(rows: list[dict], contests: list[dict]) -> list[dict]:
    """The rows that were measured in turns, which come after their trials, or all."""
    if not contests:
        return list(rows)
    last = {row["name"]: row for row in rows}
    names = []
    for one in contests:
        names += one["of"]
    names = dict.fromkeys(names)
    return [last[name] for name in names]


def side_and_setting(name: str, dtype: str) -> tuple[str, str]:
    """The two parts of a row's name, the side in words."""
    side, _, rest = name.partition(f" {dtype}")
    setting = f"{dtype}{rest}"
    return SIDES.get(side, side), setting
