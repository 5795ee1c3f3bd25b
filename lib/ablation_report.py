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
needed" how many would find one as large as was seen; both are estimates from the spread of few differences."""


def write_report(out: Path, question: str, metric: str, lower: bool, arms: list[Arm], notes: list[str]) -> str:
    """Write report.md, report.html, their pictures and numbers. Returns the answer."""
    answer, title = in_a_sentence(arms, metric, lower), f"Ablation, {metric}"
    explained = NOTES.replace("\n", " ")
    parts = [
        Part("code", question),
        Part("answer", answer),
        Part("table", table_of(arms)),
        Part("text", " ".join([how_many_settings(arms), explained, *notes])),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("differences", draw_differences), ("curves", draw_arms)):
        draw(arms, metric, picture := io.BytesIO())
        write_whole(out / f"{name}.png", picture.getvalue())
        parts.append(Part("picture", picture.getvalue(), name))
    parts += [
        Part("heading", "Every setting"),
        Part("table", settings_table(arms)),
        Part("heading", "What each arm costs"),
        Part("table", costs_table(arms)),
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
        names[verdict(arm, lower)].append(arm.name)
    words = []
    for kind, told in (("better", "better than"), ("worse", "worse than"), ("equal", "the same as")):
        if names[kind]:
            verb = "is" if len(names[kind]) == 1 else "are"
            words.append(f"{', '.join(names[kind])} {verb} {told} {first.name}")
    if names["unclear"]:
        words.append(f"of {', '.join(names['unclear'])} these seeds cannot tell")
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
        return f"One seed cannot tell: {arm.name} less {first.name} is {found.mean:+.4f} {metric}."
    if told == "equal":
        return f"{arm.name} is the same as {first.name}: {metric} is equal with every seed, to the last digit."
    seeds = f"{len(arm.seeds)} seeds"
    interval = f"95 % interval {between(found)}, p = {arm.p:.2g}, {seeds}"
    if told == "unclear":
        least = f"a true difference from {found.detectable:.4f} on would probably have been found"
        what = f"{seeds} cannot tell {arm.name} from {first.name}"
        return f"{what}: {found.mean:+.4f} {metric} ({interval}); {least}."
    return f"{arm.name} is {told} than {first.name} by {abs(found.mean):.4f} {metric} ({interval})."


def number(value: float, digits: int = 4, sign: str = "") -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}"


def between(found: Difference) -> str:
    low, high = number(found.low, sign="+"), number(found.high, sign="+")
    return f"{low} to {high}"


def table_of(arms: list[Arm]) -> list[Row]:
    columns = ["best setting", "mean", "each seed", "difference", "95 % interval", "p", "found from", "seeds needed"]
    rows = [("arm", columns)]
    for arm in arms:
        values, found = arm.values, arm.difference
        cells = [arm.setting or "–", "failed", "–"]
        if values:
            cells[1:] = number(mean(values)), " ".join(map(number, values))
        if found is None:
            cells += ["–"] * 5
        else:
            cells += [number(found.mean, sign="+"), between(found), number(arm.p, 3)]
            cells += [number(found.detectable), how_many(found.needed)]
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
            one, speed = results[0], mean(result.speed for result in results)
            cells = [f"{count:,}" for count in (one.parameters, one.steps, one.tokens)]
            cells.append(f"{speed:,.0f}")
        rows.append((arm.name, cells))
    return rows
