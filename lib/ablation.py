"""What an ablation came to: the runs read back, each arm at its best setting, and compared with the first in pairs."""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from lib.checkpoints import named_by_last
from lib.grid import Run
from lib.paired import Difference, holm, paired
from lib.records import read_json
from lib.runs import read_log

SPEEDS = ("tokens_per_s", "pairs_per_s")


@dataclass
class Result:
    """A run that has ended, and what it measured."""

    run: Run
    value: float  # of the metric; nan where the run failed or diverged
    steps: int = 0
    tokens: int = 0
    parameters: int = 0
    speed: float = math.nan                                   # tokens a second, of pairs pairs
    curve: dict[int, float] = field(default_factory=dict)     # training loss at each step that was logged
    measured: dict[int, float] = field(default_factory=dict)  # the metric at each step where it was


def ended(folder: Path) -> bool:
    """Whether a run has made all its steps."""
    if not (folder / "run.json").exists():
        return False
    steps, last = read_json(folder / "run.json")["config"]["steps"], named_by_last(folder)
    return bool(last) and last.exists() and int(last.name[5:]) >= steps


def read_result(run: Run, metric: str, score: Callable[[Path], float] | None = None) -> Result:
    """What a run measured: a field of its log.jsonl at the last step, or its score by an evaluation."""
    if not ended(run.folder):
        return Result(run, math.nan)
    record, rows = read_json(run.folder / "run.json"), read_log(run.folder / "log.jsonl")
    measured = {row["step"]: row[metric] for row in rows if isinstance(row.get(metric), (int, float))}
    curve = {row["step"]: row["loss"] for row in rows if "loss" in row}
    steps = max((row["step"] for row in rows), default=0)
    value = score(run.folder) if score else measured.get(steps, math.nan)
    speeds = [row[name] for row in rows for name in SPEEDS if name in row]
    tokens = max((row["tokens"] for row in rows if "tokens" in row), default=0)
    return Result(
        run, value if math.isfinite(value) else math.nan, steps, tokens, record.get("parameters", 0),
        median(speeds) if speeds else math.nan, curve, measured,
    )  # fmt: skip


@dataclass
class Arm:
    """An arm at its best setting."""

    name: str
    setting: str                         # the best
    tried: dict[str, dict[int, Result]]  # setting -> seed -> result
    seeds: list[int]                     # those that are there at the best setting
    difference: Difference | None = None  # to the first arm
    p: float = math.nan                  # of it, Holm's correction made

    @property
    def results(self) -> list[Result]:
        return [self.tried[self.setting][seed] for seed in self.seeds]

    @property
    def values(self) -> list[float]:
        return [result.value for result in self.results]


def best_setting(tried: dict[str, dict[int, Result]], lower: bool, seeds: list[int]) -> str:
    """The setting with the best mean over these seeds; one that failed on fewer of them comes first."""
    ranked = []
    for place, (setting, results) in enumerate(tried.items()):
        values = [results[seed].value for seed in seeds if seed in results]
        finite = [value for value in values if math.isfinite(value)]
        average = mean(finite) if finite else math.inf
        ranked.append((-len(finite), average if lower else -average, place, setting))
    return min(ranked)[-1]


def compare_arms(results: list[Result], lower: bool, sweep: list[int]) -> list[Arm]:
    """The arms, compared with the first; the best setting of each is chosen on the seeds in sweep."""
    tried = defaultdict(lambda: defaultdict(dict))
    for result in results:
        tried[result.run.arm][result.run.setting][result.run.seed] = result
    arms = []
    for name, settings in tried.items():
        best = best_setting(settings, lower, sweep)
        seeds = sorted(seed for seed, result in settings[best].items() if math.isfinite(result.value))
        arms.append(Arm(name, best, settings, seeds))
    first, *others = arms
    for arm in others:
        both = sorted(set(first.seeds) & set(arm.seeds))
        if both:
            pairs = [[a.tried[a.setting][seed].value for seed in both] for a in (first, arm)]
            arm.difference = paired(*pairs)
    corrected = holm([arm.difference.p if arm.difference else math.nan for arm in others])
    for arm, p in zip(others, corrected):
        arm.p = p
    return arms


def as_json(metric: str, arms: list[Arm]) -> str:
    rows = []
    for arm in arms:
        row = {"arm": arm.name, "setting": arm.setting, "values": dict(zip(arm.seeds, arm.values))}
        if arm.difference:
            row |= arm.difference._asdict() | {"p_holm": arm.p}
        rows.append({name: _finite(value) for name, value in row.items()})
    return json.dumps({"metric": metric, "arms": rows}, indent=2) + "\n"


def _finite(value):
    """JSON knows neither nan nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(metric: str, arms: list[Arm]) -> str:
    """A line for every run, also those at other settings than the best."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "setting", "seed", metric, "steps", "tokens", "parameters", "tokens_per_s", "folder"])
    for arm in arms:
        for setting, results in arm.tried.items():
            for seed, result in sorted(results.items()):
                numbers = [result.value, result.steps, result.tokens, result.parameters, result.speed]
                writer.writerow([arm.name, setting, seed, *numbers, result.run.folder])
    return text.getvalue()
