"""The pictures of bench.py beside that of training speeds: of writing, and of growth."""

import io
from collections import defaultdict

from lib.plots import draw_bars, picture

STYLES = ("o-", "s--", "^:")  # of lines, one for each number of processes
MEASURES = {
    "tokens_per_s": "tokens a second",
    "share_of_product": "share of a matrix product",
    "peak_bytes": "bytes of a process at the peak",
}


def draw_writing(rows: list[dict], title: str, place: io.BytesIO):
    """What bench.py --decode measured, as a .png: a panel for each job, a bar for each way."""
    jobs = defaultdict(list)
    for row in rows:
        jobs[row["job"]].append(row)
    num_ways = len(rows) / len(jobs)
    size = (3.2 * len(jobs), 1.2 + 0.5 * num_ways)
    with picture(place, size, 1, len(jobs), sharey=True) as panels:
        for axes, job in zip(panels, jobs):
            ways = jobs[job]
            ways.reverse()  # the first goes to the top
            draw_bars(axes, ways)
            axes.set_title(job)
        panels[0].get_figure().suptitle(title)


def draw_growth(rows: list[dict], title: str, place: io.BytesIO):
    """What bench.py --grow measured, as a .png: speed, share of a product and memory by length.

    A colour for each size, a style of line for each number of processes.
    """
    lines = defaultdict(list)
    for row in rows:
        lines[row["size"], row["processes"]].append(row)
    with picture(place, (12, 4.5), 1, 3) as panels:
        for axes, measure in zip(panels, MEASURES):
            draw_lines(axes, lines, measure)
            axes.set_title(MEASURES[measure])
            axes.set_xlabel("tokens of a sequence")
            axes.set_xscale("log", base=2)
            if measure != "share_of_product":
                axes.set_yscale("log")
        panels[0].legend(fontsize="small")
        panels[0].get_figure().suptitle(title)


def draw_lines(axes, lines: dict, measure: str):
    """A line for each size and number of processes."""
    colors, styles = {}, {}
    for size, world in lines:
        color = colors.setdefault(size, f"C{len(colors)}")
        style = styles.setdefault(world, STYLES[len(styles) % 3])
        line = lines[size, world]
        lengths = [row["seq_len"] for row in line]
        values = [row[measure] for row in line]
        label = f"{size}, {world} processes"
        axes.plot(lengths, values, style, color=color, label=label)
