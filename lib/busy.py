"""A machine that is not idle, for bench.py --busy: training steps beside busy processes."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

import torch

from lib.rounds import compare, in_turns
from lib.timing import timed

# counts while its parent is there, so that it also ends when the parent is killed
LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""
LINE = "{name:16} {tokens_per_s:10,.0f} {share:>15}   {rounds}"
TITLES = f"{'':16}   tokens/s  of quiet speed   rounds"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """So many processes that each keep a core busy; they are gone afterwards, whatever happens.

    Gives their ids.
    """
    words = [sys.executable, "-I", "-c", LOOP, str(os.getpid())]
    started = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen(words))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def measure_beside(
    step: Callable, config, tokens: int, device: torch.device, say: Callable
) -> dict:
    """A row for the step alone and beside 1 .. --busy busy processes, in turns; says the table.

    config is a bench.Config, tokens those of a round of --steps steps. A row's share is of the
    quiet speed, the median of the shares round by round.
    """

    def seconds(count: int) -> float:
        with busy_processes(count):
            for _ in range(config.warmup):
                step()
            return timed(step, config.steps, device)

    counts = range(config.busy + 1)
    actions = [functools.partial(seconds, count) for count in counts]
    rows = []
    say(TITLES)
    for count, taken in zip(counts, in_turns(actions, config.repeats)):
        name = f"beside {count} busy" if count else "quiet"
        row = {"name": name, "busy": count, "seconds": taken, "tokens_per_round": tokens}
        row["tokens_per_s"] = tokens / median(taken)
        rows.append(row)
        contest = compare(row, rows[0])
        row["share_of_quiet"], row["shares"] = contest["ratio"], contest["ratios"]
        each = ", ".join(f"{share:.1%}" for share in row["shares"])
        say(LINE.format(**row, share=f"{row['share_of_quiet']:.1%}", rounds=each))
    return {"rows": rows}
