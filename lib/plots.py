"""The pictures, by matplotlib, which is imported only where one is drawn."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np


def load_pyplot():
    """matplotlib.pyplot for pictures in files, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_losses(rows: list[dict], path: Path, title: str, unit: str):
    """loss.png: training and validation loss against the step, of the rows of log.jsonl."""
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    curves = (("loss", "training", "-"), ("val_loss", "validation", "o-"))
    for name, label, style in curves:
        measured = [row for row in rows if name in row]
        steps = [row["step"] for row in measured]
        losses = [row[name] for row in measured]
        axes.plot(steps, losses, style, label=label, linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss (nats a {unit})", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(points: list, name: str, picture: io.BytesIO):
    """The score of runs against steps and tokens, as a .png; see lib/curves.py for the points.

    A line for each setting: the mean of its runs, which differ in the seed alone, and the band that
    they fill.
    """
    plt = load_pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
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
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_speeds(rows: list[dict], title: str, picture: io.BytesIO):
    """A bar for every row of bench.py: its tokens a second, as a .png."""
    plt = load_pyplot()
    upwards = rows[::-1]  # the first row goes to the top
    places = range(len(upwards))
    names = [row["name"] for row in upwards]
    speeds = [row["tokens_per_s"] for row in upwards]
    height = 1.2 + 0.35 * len(upwards)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    bars = axes.barh(places, speeds)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_yticks(places, names)
    axes.set(xlabel="tokens a second", title=title)
    axes.margins(x=0.12)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
