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

Settings = dict[str, dict[int, "Result"]]  # what an arm was tried with: by setting and seed
COLUMNS = ("arm", "setting", "seed", "steps", "tokens", "parameters", "tokens_per_s", "folder")


@dataclass
class Result:
    """A run that has ended, and what it measured."""

    run: Run
    value: float  # of the metric; nan where the run failed or diverged
    steps: int = 0
    tokens: int = 0
    parameters: int = 0
    speed: float = math.nan                                # tokens a second
    curve: dict[int, float] = field(default_factory=dict)  # training loss at each step that was logged


def ended(folder: Path) -> bool:
    """Whether a run has made all its steps."""
    if not (folder / "run.json").exists():
        return False
    record = read_json(folder / "run.json")
    last = named_by_last(folder)
    if last is None or not last.exists():
        return False
    done = int(last.name.removeprefix("step_"))
    return done >= record["config"]["steps"]


def read_result(run: Run, metric: str, score: Callable[[Path], float] | None = None) -> Result:
    """What a run measured: a field of its log.jsonl at the last step, or its score by an evaluation."""
    result = Result(run, math.nan)
    if not ended(run.folder):
        return result
    record = read_json(run.folder / "run.json")
    rows = read_log(run.folder / "log.jsonl")
    speeds = []
    for row in rows:
        result.steps = max(result.steps, row["step"])
        result.tokens = max(result.tokens, row.get("tokens", 0))
        if "loss" in row:
            result.curve[row["step"]] = row["loss"]
        if "tokens_per_s" in row:
            speeds.append(row["tokens_per_s"])
    result.parameters = record.get("parameters", 0)  # older runs do not say
    if speeds:
        result.speed = median(speeds)
    if score:
        result.value = score(run.folder)
    else:
        result.value = last_value(rows, metric, result.steps)
    return result


def last_value(rows: list[dict], metric: str, step: int) -> float:
    """A field of log.jsonl at this step; nan where it is not there, or no number."""
    value = math.nan
    for row in rows:
        found = row.get(metric)
        if row["step"] == step and isinstance(found, (int, float)) and math.isfinite(found):
            value = float(found)
    return value


@dataclass
class Arm:
    """An arm at its best setting."""

    name: str
    setting: str   # the best
    tried: Settings
    seeds: list[int]  # those that have a value at the best setting
    difference: Difference | None = None  # to the first arm
    p: float = math.nan                   # of it, Holm's correction made

    @property
    def results(self) -> list[Result]:
        best = self.tried[self.setting]
        return [best[seed] for seed in self.seeds]

    @property
    def values(self) -> list[float]:
        return [result.value for result in self.results]

    def values_of(self, seeds: list[int]) -> list[float]:
        best = self.tried[self.setting]
        return [best[seed].value for seed in seeds]


def best_setting(tried: Settings, lower: bool, seeds: list[int]) -> str:
    """The setting with the best mean over these seeds; one that failed on fewer of them comes first."""
    ranked = []
    for place, (setting, results) in enumerate(tried.items()):
        values = [results[seed].value for seed in seeds if seed in results]
        finite = [value for value in values if math.isfinite(value)]
        average = math.inf
        if finite:
            average = mean(finite) if lower else -mean(finite)
        ranked.append((-len(finite), average, place, setting))
    _, _, _, best = min(ranked)
    return best


def compare_arms(results: list[Result], lower: bool, sweep: list[int]) -> list[Arm]:
    """The arms, compared with the first; the best setting of each is chosen on the seeds in sweep."""
    tried = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result.run
        tried[run.arm][run.setting][run.seed] = result
    arms = []
    for name, settings in tried.items():
        best = best_setting(settings, lower, sweep)
        seeds = []
        for seed, result in sorted(settings[best].items()):
            if math.isfinite(result.value):
                seeds.append(seed)
        arms.append(Arm(name, best, settings, seeds))
    first, *others = arms
    for arm in others:
        both = sorted(set(first.seeds) & set(arm.seeds))
        if both:
            arm.difference = paired(first.values_of(both), arm.values_of(both))
    ps = [arm.difference.p if arm.difference else math.nan for arm in others]
    for arm, p in zip(others, holm(ps)):
        arm.p = p
    return arms


def as_json(metric: str, arms: list[Arm]) -> str:
    rows = []
    for arm in arms:
        values = dict(zip(arm.seeds, arm.values))
        row = {"arm": arm.name, "setting": arm.setting, "values": values}
        if arm.difference:
            row |= arm.difference._asdict() | {"p_holm": arm.p}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None  # JSON knows neither nan nor infinity
        rows.append(row)
    return json.dumps({"metric": metric, "arms": rows}, indent=2) + "\n"


def as_csv(metric: str, arms: list[Arm]) -> str:
    """A line for every run, also those at other settings than the best."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, metric])
    for arm in arms:
        for setting, results in arm.tried.items():
            for seed, result in sorted(results.items()):
                costs = (result.steps, result.tokens, result.parameters, result.speed)
                writer.writerow([arm.name, setting, seed, *costs, result.run.folder, result.value])
    return text.getvalue()
