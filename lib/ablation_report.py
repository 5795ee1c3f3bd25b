"""The answer of an ablation: a sentence, tables and pictures, as report.md and as report.html."""

import io
import math
from pathlib import Path
from statistics import mean

from lib.ablation import Arm, Result, as_csv, as_json
from lib.ablation_plots import draw_arms, draw_differences
from lib.files import write_whole
from lib.pages import Part, in_html, in_markdown
from lib.paired import LEVEL, Difference
from lib.tables import Row

NOTES = """The difference is to the first arm, run by run of the same seed, which draws the first weights and the order
of the data. Its interval and p are those of the paired t test; p is corrected for the number of arms (Holm).
"Found from" is the smallest true difference that so many seeds would find in four of five such experiments, "seeds
needed" how many would find one as large as was seen; both are of a single comparison, without that correction, and
rough, since they rest on the spread of few differences."""
CAPTIONS = {
    "differences": "A dot is the mean difference, its line the 95 % interval, a tick one seed.",
    "curves": "Lines are means, bands what the seeds fill. On the right the noise that arms share is gone.",
}
SPEEDS = "Speeds are of one run each, the slowest to the fastest; other work on the machine is in them."


def write_report(out: Path, question: str, metric: str, lower: bool, arms: list[Arm], notes: list[str]) -> str:
    """Write report.md, report.html, their pictures and numbers. Returns the answer."""
    measured, title = metric, f"Ablation, {metric}"
    steps = steps_of(arms)
    if len(set(steps.values())) == 1:
        measured += f" after {max(steps.values()):,} steps"
    answer = in_a_sentence(arms, measured, lower)
    direction = f"Of {metric}, {'lower' if lower else 'higher'} is better."
    explained = [direction, how_many_settings(arms), NOTES.replace("\n", " ").strip()]
    parts = [
        Part("code", question),
        Part("answer", answer),
        Part("table", table_of(arms)),
        Part("text", " ".join([*explained, *at_the_edge(arms), *unequal_steps(arms), *notes])),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("differences", draw_differences), ("curves", draw_arms)):
        draw(arms, metric, picture := io.BytesIO())
        write_whole(out / f"{name}.png", picture.getvalue())
        parts.append(Part("picture", picture.getvalue(), name))
        parts.append(Part("text", CAPTIONS[name]))
    if several_settings(arms):
        parts += [Part("heading", "Every setting"), Part("table", settings_table(arms))]
    parts += [
        Part("heading", "What each arm costs"),
        Part("table", costs_table(arms)),
        Part("text", SPEEDS),
    ]
    write_whole(out / "results.csv", as_csv(metric, arms))
    write_whole(out / "results.json", as_json(metric, arms))
    write_whole(out / "report.md", in_markdown(title, parts))
    write_whole(out / "report.html", in_html(title, parts))
    return answer


def in_a_sentence(arms: list[Arm], metric: str, lower: bool) -> str:
    first, *others = arms
    if not others:
        return f"There is one arm, {first.name}, and nothing to compare it with."
    if len(others) == 1:
        return about_one(first, others[0], metric, lower)
    names = {kind: [] for kind in ("better", "worse", "equal", "unclear", "failed")}
    for arm in others:
        names[verdict(arm, lower)].append(f"“{arm.name}”" if ", " in arm.name else arm.name)
    words = []
    for kind, told in (("better", "better than"), ("worse", "worse than"), ("equal", "the same as")):
        if names[kind]:
            verb = "is" if len(names[kind]) == 1 else "are"
            words.append(f"{', '.join(names[kind])} {verb} {told} {first.name}")
    if names["unclear"]:
        words.append(f"{seeds_of(others)} cannot tell {', '.join(names['unclear'])} from {first.name}")
    if names["failed"]:
        words.append(f"{', '.join(names['failed'])} did not get through")
    return f"In {metric}, {'; '.join(words)}."


def verdict(arm: Arm, lower: bool) -> str:
    """better, worse, equal, unclear, or failed, where no run of it has a value."""
    found = arm.difference
    if found is None:
        return "failed"
    if found.mean == found.spread == 0:
        return "equal"
    if not arm.p < LEVEL:  # nan, of a single seed, is not
        return "unclear"
    return "better" if (found.mean < 0) == lower else "worse"


def about_one(first: Arm, arm: Arm, metric: str, lower: bool) -> str:
    found, told = arm.difference, verdict(arm, lower)
    if found is None:
        return f"{arm.name} did not get through, so there is nothing to compare with {first.name}."
    if math.isnan(found.low):
        return f"1 seed cannot tell: {arm.name} minus {first.name} is {found.mean:+.4f} {metric}."
    if told == "equal":
        return f"{arm.name} is the same as {first.name}: {metric} is equal with every seed, to the last digit."
    seeds = seeds_of([arm])
    interval = f"95 % interval {between(found)}, p = {arm.p:.2g}, {seeds}"
    if told == "unclear":
        least = f"a true difference of {found.detectable:.4f} or more would probably have been found"
        what = f"{seeds} cannot tell {arm.name} from {first.name}"
        return f"{what}: {found.mean:+.4f} {metric} ({interval}); {least}."
    return f"{arm.name} is {told} than {first.name} by {abs(found.mean):.4f} {metric} ({interval})."


def number(value: float, digits: int = 4, sign: str = "") -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}"


def between(found: Difference) -> str:
    low, high = number(found.low, sign="+"), number(found.high, sign="+")
    if low == high == "–":
        return low
    return f"{low} to {high}"


def seeds_of(arms: list[Arm]) -> str:
    count = max(len(arm.seeds) for arm in arms)
    return "1 seed" if count == 1 else f"{count} seeds"


def several_settings(arms: list[Arm]) -> bool:
    return any(len(arm.tried) > 1 for arm in arms)


def at_the_edge(arms: list[Arm]) -> list[str]:
    """A note on arms whose best setting is the first or last of those tried, as more might be gained beyond it."""
    names = []
    for arm in arms:
        tried = list(arm.tried)
        if len(tried) > 2 and arm.setting in (tried[0], tried[-1]):
            names.append(arm.name)
    if not names:
        return []
    return [f"At the edge of the settings tried, so a wider range may do better: {', '.join(names)}."]


def steps_of(arms: list[Arm]) -> dict[str, int]:
    return {arm.name: arm.results[0].steps for arm in arms if arm.results}


def unequal_steps(arms: list[Arm]) -> list[str]:
    """A note where arms made different numbers of steps."""
    steps = steps_of(arms)
    if len(set(steps.values())) < 2:
        return []
    each = ", ".join(f"{name} {count:,}" for name, count in steps.items())
    return [f"Steps differ: {each}."]


def table_of(arms: list[Arm]) -> list[Row]:
    columns = ["mean", "each seed", "difference", "95 % interval", "p", "found from", "seeds needed"]
    settings = several_settings(arms)
    if settings:
        columns.append("best setting")
    rows = [("arm", columns)]
    for arm in arms:
        values, found = arm.values, arm.difference
        cells = ["failed", "–"]
        if values:
            cells = [number(mean(values)), " ".join(map(number, values))]
        if found is None:
            cells += ["–"] * 5
        else:
            cells += [number(found.mean, sign="+"), between(found), number(arm.p, 3)]
            cells += [number(found.detectable), how_many(found.needed)]
        if settings:
            cells.append(arm.setting)
        rows.append((arm.name, cells))
    return rows


def how_many(seeds: float) -> str:
    if seeds == math.inf:
        return "above 1,000"
    return number(seeds, 0)


def how_many_settings(arms: list[Arm]) -> str:
    counts = {len(arm.tried) for arm in arms}
    if counts == {1}:
        return "Each arm had one setting."
    if len(counts) == 1:
        return f"Each arm had {counts.pop()} settings and is compared at its best (* below)."
    each = ", ".join(f"{arm.name} {len(arm.tried)}" for arm in arms)
    return f"The arms had different numbers of settings ({each}), which favours those with more (* below is the best)."


def settings_table(arms: list[Arm]) -> list[Row]:
    """The mean of every arm at every setting."""
    settings = {}
    for arm in arms:
        settings |= dict.fromkeys(arm.tried)
    rows = [("arm", [setting or "mean" for setting in settings])]
    for arm in arms:
        cells = []
        for setting in settings:
            cell = mean_of(arm.tried.get(setting, {}))
            if setting == arm.setting and len(settings) > 1:
                cell += " *"
            cells.append(cell)
        rows.append((arm.name, cells))
    return rows


def mean_of(results: dict[int, Result]) -> str:
    """The mean of the runs at one setting, and how many of them failed."""
    values = [result.value for result in results.values()]
    finite = [value for value in values if math.isfinite(value)]
    cell = number(mean(finite)) if finite else "–"
    failed = len(values) - len(finite)
    if failed:
        cell += f" ({failed} failed)"
    return cell


def costs_table(arms: list[Arm]) -> list[Row]:
    rows = [("arm", ["parameters", "steps", "tokens", "tokens/s"])]
    for arm in arms:
        cells = ["–"] * 4
        if results := arm.results:
            one, speeds = results[0], [result.speed for result in results]
            cells = [f"{count:,}" for count in (one.parameters, one.steps, one.tokens)]
            cells.append(f"{min(speeds):,.0f} to {max(speeds):,.0f}")
        rows.append((arm.name, cells))
    return rows
