"""The pictures of an ablation: differences with intervals, and learning curves with bands.

arms are lib.ablation.Arm, of which the first is what the others are compared with.
"""

import io

import numpy as np

from lib.plots import picture

Curves = dict[int, dict[int, float]]  # of each seed, at each step
MANY = [  # colours for more arms than matplotlib has, and greys behind them
    *(f"C{number}" for number in range(10)),
    *("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"),
]
SMOOTHED = 10  # logged steps at most that a difference of curves is averaged over


def draw_differences(arms: list, name: str, file: io.BytesIO):
    """The difference of each arm to the first, with its 95 % interval and a mark for every seed, as a .png."""
    first, *others = arms
    shown = [arm for arm in others if arm.difference]
    shown.reverse()  # the first goes to the top
    height = 1.4 + 0.35 * len(shown)
    size = (8, height)
    with picture(file, size) as axes:
        for place, arm in enumerate(shown):
            found = arm.difference
            both = set(arm.seeds) & set(first.seeds)
            each = np.subtract(arm.values_of(both), first.values_of(both))
            interval = [found.low, found.high]
            axes.plot(interval, [place, place], color="C0", linewidth=2)
            axes.plot(found.mean, place, "o", color="C0")
            places = [place] * len(each)
            axes.plot(each, places, "|", color="black", markersize=9)
        axes.axvline(0, color="black", linewidth=0.8)
        names = [arm.name for arm in shown]
        top = max(0.6, len(names) - 0.4)
        rows = range(len(names))
        axes.set_yticks(rows, names)
        axes.set_ylim(-0.6, top)
        axes.set_xlabel(f"{name}, minus that of {first.name}")
        axes.grid(visible=False, axis="y")


def draw_arms(arms: list, name: str, file: io.BytesIO):
    """Training loss of each arm, and its difference to the first with the same seed and step, as a .png.

    Bands are what the seeds fill.
    """
    size = (12, 4.5)
    with picture(file, size, 1, 2) as (left, right):
        if len(arms) > 10:
            left.set_prop_cycle(color=MANY)
            right.set_prop_cycle(color=MANY)
        first = curves_of(arms[0])
        for arm in arms:
            curves = curves_of(arm)
            draw_band(left, curves, arm.name)
            draw_band(right, less(curves, first), arm.name)
        left.set_xlabel("step")
        right.set_xlabel("step")
        left.set_ylabel("training loss (nats)")
        right.set_ylabel(f"training loss, minus that of {arms[0].name}")
        beside = (1.02, 0.5)
        right.legend(loc="center left", bbox_to_anchor=beside, fontsize=8)


def curves_of(arm) -> Curves:
    return {result.run.seed: result.curve for result in arm.results}


def less(curves: Curves, first: Curves) -> Curves:
    """Differences of curves of the same seed, each the mean of some logged steps."""
    differences = {}
    for seed in curves.keys() & first.keys():
        mine, theirs = curves[seed], first[seed]
        steps = sorted(mine.keys() & theirs.keys())
        each = [mine[step] - theirs[step] for step in steps]
        width = min(SMOOTHED, len(each) // 4)
        width = max(1, width)
        if each:
            smooth = np.convolve(each, np.ones(width) / width, "valid")
            differences[seed] = dict(zip(steps[width - 1 :], smooth))
    return differences


def draw_band(axes, curves: Curves, label: str):
    """The mean of curves, and what they fill, at the steps that all of them have."""
    if not curves:
        return
    first, *others = curves.values()
    steps = sorted(set(first).intersection(*others))
    values = []
    for curve in curves.values():
        values.append([curve[step] for step in steps])
    values = np.array(values)
    means, lows, highs = values.mean(0), values.min(0), values.max(0)
    (line,) = axes.plot(steps, means, linewidth=1, label=label)
    color = line.get_color()
    axes.fill_between(steps, lows, highs, alpha=0.2, color=color)
