"""What the recipes of papers share: runs that are made once, differences with intervals, verdicts, the report.

Arms are compared in pairs, on the same questions and with the same seeds. A prediction is "confirmed in direction" only
if the 95 % interval of the pooled questions leaves 0 on its side and every seed has that sign, "refuted in direction"
likewise on the other side; else it is "not decided at this size".
"""

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.bits import Z
from lib.files import write_whole

OUT = Path("out/papers")
RULES = """Verdicts, where given: a side is *confirmed* or *refuted in direction* where the 95 % interval leaves 0, or a
bound that is named, and every seed is on that side; "within" some points is *confirmed* where the whole interval lies
inside, *refuted* where all of it lies outside; else it is *not decided*. In brackets, where given, 95 % intervals."""


def run(*words):
    """One of the project's commands, shown as it is typed. Raises CalledProcessError where it fails."""
    words = [str(word) for word in words]
    print("+ python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True)


def once(made: Path, *words) -> Path:
    """The file or folder that a command makes; what is there is not made again."""
    if not made.exists():
        run(*words)
    return made


def train(out: Path, *words) -> Path:
    """The run of train.py in the folder out; one that was interrupted goes on, one that is finished stays."""
    marker = out.with_name(f"{out.name}.finished")
    if not marker.exists():
        run("train.py", "--out", out, "--sample=", *words)
        marker.touch()
    return out


def text() -> Path:
    """The dataset of Python's standard library with 4,096 tokens, as train.py makes it by itself."""
    made = Path("data/stdlib")
    return once(made, "data.py", "--source", "stdlib", "--out", made, "--tokenizer", "train:4096")


def base(seed: int) -> Path:
    """The laptop's model of a seed: 1.3 M parameters, 1,350 steps on the standard library (3 to 6 minutes).

    Every 150th step has a checkpoint.
    """
    every = ("--save_every", 150, "--keep_every", 150)
    return train(OUT / f"base_{seed}", "--data", text(), "--seed", seed, *every)


# ---- differences ----


class Difference(NamedTuple):
    """Of a second arm less a first: the mean, its 95 % interval, and the mean of each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.4g} ({self.low:+.4g} to {self.high:+.4g})"

    def times(self, factor: float) -> "Difference":
        """In another unit, such as points for shares."""
        seeds = tuple(factor * value for value in self.seeds)
        return Difference(*(factor * value for value in self[:3]), seeds)

    def less(self, bound: float) -> "Difference":
        return Difference(*(value - bound for value in self[:3]), tuple(value - bound for value in self.seeds))


def difference(first, second) -> Difference:
    """Of values (seeds, items) of two arms: items, such as questions, are drawn; seeds are what they are.

    The values of an item are averaged over seeds first, since all seeds answer the same questions.

    >>> difference([[0, 0, 1, 1]], [[0, 1, 1, 1]])
    Difference(mean=0.25, low=-0.24, high=0.74, seeds=(0.25,))
    """
    values = np.subtract(second, first, dtype=float)
    items = values.mean(0)
    mean, half = float(items.mean()), Z * float(items.std(ddof=1)) / math.sqrt(len(items))
    seeds = tuple(float(row.mean()) for row in values)
    return Difference(mean, round(mean - half, 10), round(mean + half, 10), seeds)


def verdict(found: Difference, sign: int) -> str:
    """What a difference says of the prediction that it has this sign, 1 or -1.

    >>> verdict(Difference(0.3, 0.1, 0.5, (0.2, 0.4)), 1)
    'confirmed in direction'
    """
    for words, side in (("confirmed in direction", sign), ("refuted in direction", -sign)):
        away = min(side * found.low, side * found.high) > 0
        if away and all(side * value > 0 for value in found.seeds):
            return words
    return "not decided at this size"


# ---- the report ----


@dataclass
class Report:
    """A page of what was found, printed as it grows and written as out/papers/NAME.md."""

    name: str
    title: str

    def __post_init__(self):
        self.began = time.perf_counter()
        self.parts: list[str] = []
        self.say(f"# {self.title}")

    def say(self, text: str):
        self.parts.append(text)
        print(f"\n{text}", flush=True)

    def about(self, text: str):
        """A paragraph that stands in several lines."""
        self.say(" ".join(text.split()))

    def table(self, header: list[str], rows: list[list]):
        lines = [header, ["---"] * len(header), *rows]
        self.say("\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines))

    def judge(self, prediction: str, found: Difference, sign: int, unit: str, bound: float = 0.0):
        """A prediction, what was found, and the verdict on its side of the bound."""
        seeds = ", ".join(f"{value:+.3g}" for value in found.seeds)
        measured = f"{found} {unit}; by seed {seeds}"
        self.say(f"- Predicted: {prediction}. Found: {measured}. **{verdict(found.less(bound), sign)}**")

    def end(self, rules: str = RULES):
        minutes = (time.perf_counter() - self.began) / 60
        day = time.strftime("%Y-%m-%d")
        self.about(rules)
        self.say(f"{day}; this call took {minutes:.1f} minutes of the clock. What earlier calls had left was not made "
                 "again: what a whole run takes stands in the recipe's head, under Hardware.")  # fmt: skip
        OUT.mkdir(parents=True, exist_ok=True)
        write_whole(OUT / f"{self.name}.md", "\n\n".join(self.parts) + "\n")
        print(f"wrote {OUT / self.name}.md")


def shown(cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
