"""The answer of an ablation: a sentence, tables and pictures, as report.md and as report.html."""

import base64
import html
import io
import math
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from lib.ablation import Arm, as_csv, as_json
from lib.files import write_whole
from lib.paired import LEVEL
from lib.plots import draw_arms, draw_differences
from lib.tables import Row, markdown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.answer { font-size: 1.2rem; border-left: 4px solid #36c; padding-left: 1rem }
img { max-width: 100% }
code { background: #f3f3f3; padding: .1rem .3rem }
"""
NOTES = """The difference is to the first arm, run by run of the same seed, which draws the first weights and the order
of the data. Its interval and p are those of the paired t test; p is corrected for the number of arms (Holm).
"Found from" is the smallest true difference that so many seeds would find in four of five such experiments, "seeds
needed" how many would find one as large as was seen; both are estimates from the spread of few differences."""


class Part(NamedTuple):
    """A paragraph, a table or a picture of a report."""

    kind: str  # text, answer, heading, table, picture
    content: str | list[Row] | bytes
    name: str = ""  # of a picture


def write_report(out: Path, question: str, metric: str, lower: bool, arms: list[Arm], notes: list[str]) -> str:
    """Write report.md, report.html, their pictures and numbers. Returns the answer."""
    answer = in_a_sentence(arms, metric, lower)
    parts = [Part("text", f"`{question}`"), Part("answer", answer)]
    parts += [Part("table", table_of(arms)), Part("text", " ".join([NOTES.replace("\n", " "), *notes]))]
    pictures = {"differences.png": draw_differences, "curves.png": draw_arms}
    for name, draw in pictures.items():
        draw(arms, metric, picture := io.BytesIO())
        parts.append(Part("picture", picture.getvalue(), name))
    parts += [Part("heading", "Every setting"), Part("text", how_many_settings(arms))]
    parts += [Part("table", settings_table(arms))]
    parts += [Part("heading", "What each arm costs"), Part("table", costs_table(arms))]
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part.kind == "picture":
            write_whole(out / part.name, part.content)
    write_whole(out / "results.csv", as_csv(metric, arms))
    write_whole(out / "results.json", as_json(metric, arms))
    write_whole(out / "report.md", in_markdown(metric, parts))
    write_whole(out / "report.html", in_html(metric, parts))
    return answer


# ---- in words ----


def in_a_sentence(arms: list[Arm], metric: str, lower: bool) -> str:
    first, *others = arms
    if not others:
        return f"There is one arm, {first.name}, and nothing to compare it with."
    if len(others) == 1:
        return about_one(first, others[0], metric, lower)
    verdicts = {arm.name: verdict(arm, lower) for arm in others}
    words = []
    for kind, said in (("better", "better than"), ("worse", "worse than"), ("equal", "the same as")):
        names = [name for name, found in verdicts.items() if found == kind]
        if names:
            words.append(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {said} {first.name}")
    unknown = [name for name, found in verdicts.items() if found == "unclear"]
    if unknown:
        words.append(f"of {', '.join(unknown)} these seeds cannot tell")
    failed = [name for name, found in verdicts.items() if found == "failed"]
    if failed:
        words.append(f"{', '.join(failed)} did not get through")
    return f"In {metric}, {'; '.join(words)}."


def verdict(arm: Arm, lower: bool) -> str:
    """better, worse, equal, unclear, or failed, where no run of it has a value."""
    found = arm.difference
    if found is None:
        return "failed"
    if found.mean == 0 and not found.spread > 0:
        return "equal"
    if not arm.p < LEVEL:
        return "unclear"
    return "better" if (found.mean < 0) == lower else "worse"


def about_one(first: Arm, arm: Arm, metric: str, lower: bool) -> str:
    found, seeds = arm.difference, f"{len(arm.seeds)} seeds"
    if found is None:
        return f"{arm.name} did not get through, so there is nothing to compare with {first.name}."
    if len(arm.seeds) < 2 or math.isnan(found.low):
        return f"One seed cannot tell: {arm.name} less {first.name} is {found.mean:+.4f} {metric}."
    told = verdict(arm, lower)
    if told == "equal":
        return f"{arm.name} is the same as {first.name}: {metric} is equal with every seed, to the last digit."
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, p = {arm.p:.2g}, {seeds}"
    if told == "unclear":
        least = f"a true difference from {found.detectable:.4f} on would probably have been found"
        return f"{seeds} cannot tell {arm.name} from {first.name}: {found.mean:+.4f} {metric} ({interval}); {least}."
    return f"{arm.name} is {told} than {first.name} by {abs(found.mean):.4f} {metric} ({interval})."


def number(value: float, digits: int = 4, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else "–"


def table_of(arms: list[Arm]) -> list[Row]:
    columns = ["best setting", "mean", "each seed", "difference", "95 % interval", "p", "found from", "seeds needed"]
    rows = [("arm", columns)]
    for arm in arms:
        values, found = arm.values, arm.difference
        cells = [arm.setting or "–", number(mean(values)) if values else "failed", " ".join(map(number, values))]
        if found is None:
            cells += ["–"] * 5
        else:
            cells += [number(found.mean, sign="+"), f"{number(found.low, sign='+')} to {number(found.high, sign='+')}"]
            needed = f"{found.needed:.0f}" if math.isfinite(found.needed) else "above 1,000"
            needed = "–" if math.isnan(found.needed) else needed
            cells += [number(arm.p, 3), number(found.detectable), needed]
        rows.append((arm.name, cells))
    return rows


def how_many_settings(arms: list[Arm]) -> str:
    counts = {len(arm.tried) for arm in arms}
    if counts == {1}:
        return "Each arm had one setting."
    if len(counts) == 1:
        return f"Each arm had {counts.pop()} settings and is compared at its best, here with a *."
    each = ", ".join(f"{arm.name} {len(arm.tried)}" for arm in arms)
    return f"The arms had different numbers of settings ({each}), which favours those with more; * is the best."


def settings_table(arms: list[Arm]) -> list[Row]:
    """The mean of every arm at every setting."""
    settings = list(dict.fromkeys(setting for arm in arms for setting in arm.tried))
    rows = [("arm", [setting or "mean" for setting in settings])]
    for arm in arms:
        cells = []
        for setting in settings:
            values = [result.value for result in arm.tried.get(setting, {}).values()]
            finite = [value for value in values if math.isfinite(value)]
            cell = number(mean(finite)) if finite else "–"
            if len(finite) < len(values):
                cell += f" ({len(values) - len(finite)} failed)"
            cells.append(cell + " *" * (setting == arm.setting and len(settings) > 1))
        rows.append((arm.name, cells))
    return rows


def costs_table(arms: list[Arm]) -> list[Row]:
    rows = [("arm", ["parameters", "steps", "tokens", "tokens/s"])]
    for arm in arms:
        results = arm.results
        if not results:
            rows.append((arm.name, ["–"] * 4))
            continue
        speed = number(mean(result.speed for result in results), 0)
        one = results[0]
        rows.append((arm.name, [f"{one.parameters:,}", f"{one.steps:,}", f"{one.tokens:,}", speed]))
    return rows


# ---- on paper ----


def in_markdown(metric: str, parts: list[Part]) -> str:
    lines = [f"# Ablation, {metric}", ""]
    for part in parts:
        if part.kind == "table":
            lines += markdown(part.content)
        elif part.kind == "picture":
            lines.append(f"![{part.name.removesuffix('.png')}]({part.name})")
        else:
            marks = {"heading": "## ", "answer": "**"}.get(part.kind, "")
            lines.append(marks + part.content + "**" * (part.kind == "answer"))
        lines.append("")
    return "\n".join(lines)


def in_html(metric: str, parts: list[Part]) -> str:
    """One file that needs no other."""
    title = html.escape(f"Ablation, {metric}")
    body = [f"<h1>{title}</h1>"]
    for part in parts:
        if part.kind == "table":
            body.append(html_table(part.content))
        elif part.kind == "picture":
            data = base64.b64encode(part.content).decode()
            body.append(f'<img alt="{part.name.removesuffix(".png")}" src="data:image/png;base64,{data}">')
        elif part.kind == "heading":
            body.append(f"<h2>{html.escape(part.content)}</h2>")
        else:
            text = part.content
            inner = f"<code>{html.escape(text[1:-1])}</code>" if text.startswith("`") else html.escape(text)
            body.append(f'<p class="{part.kind}">{inner}</p>')
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def html_table(rows: list[Row]) -> str:
    lines = ["<table>"]
    for place, (label, cells) in enumerate(rows):
        tag = "td" if place else "th"
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in [label, *cells])
        lines.append(f"<tr>{inside}</tr>")
    return "\n".join([*lines, "</table>"])
