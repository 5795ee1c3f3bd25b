"""The pictures, by matplotlib, which is imported only where one is drawn."""

import io
from pathlib import Path

import numpy as np


def draw_losses(rows: list[dict], path: Path, title: str, unit: str):
    """loss.png: training and validation loss against the step, of the rows of log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for setting in dict.fromkeys(point.setting for point in points):
        chosen = [point for point in points if point.setting == setting]
        label = ", ".join(dict.fromkeys(point.run for point in chosen))
        for axes, axis in zip(panels, ("step", "tokens")):
            places = sorted({getattr(point, axis) for point in chosen})
            scores = []
            for place in places:
                at = [point for point in chosen if getattr(point, axis) == place]
                scores.append([point.interval[0] for point in at])
            (line,) = axes.plot(places, list(map(np.mean, scores)), "o-", linewidth=1, label=label)
            lows, highs = list(map(min, scores)), list(map(max, scores))
            axes.fill_between(places, lows, highs, alpha=0.2, color=line.get_color())
            axes.set(xlabel=axis, ylabel=name)
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_speeds(rows: list[dict], title: str, picture: io.BytesIO):
    """A bar for every row of bench.py: its tokens a second, as a .png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    upwards = rows[::-1]  # the first row goes to the top
    places = range(len(upwards))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.35 * len(upwards)), layout="constrained")
    bars = axes.barh(places, [row["tokens_per_s"] for row in upwards])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_yticks(places, [row["name"] for row in upwards])
    axes.set(xlabel="tokens a second", title=title)
    axes.margins(x=0.12)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
