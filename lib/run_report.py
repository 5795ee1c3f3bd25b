"""A run told by its files: loss.png, report.md, and several runs in one picture."""

import textwrap
from operator import itemgetter
from pathlib import Path

from lib.errors import BadInput
from lib.files import write_whole
from lib.runs import read_log, read_run
from lib.training_plot import draw_losses


def vocab_size_of(record: dict) -> int:
    """That of a run whose weights began at random, else 0."""
    return 0 if record["init_from"] else record["model"]["vocab_size"]


def unit_of(rows: list[dict]) -> str:
    for row in rows:
        if "pairs" in row:
            return "pair"
    return "token"


def draw_together(places: tuple[str, ...]) -> Path:
    """losses.png in the first of these runs' folders, the losses of all. Raises ValueError."""
    runs, sizes = {}, set()
    for place in places:
        sizes.add(vocab_size_of(read_run(Path(place))))
        runs[place] = read_log(Path(place) / "log.jsonl")
        losses = [row for row in runs[place] if "loss" in row]
        if not losses:
            raise BadInput(f"--draw {place}: its log.jsonl has no losses yet")
    units = {unit_of(rows) for rows in runs.values()}
    if len(units) > 1:
        raise BadInput(f"--draw {' '.join(places)}: losses a token and a pair are not the same")
    out = Path(places[0]) / "losses.png"
    same_size = sizes.pop() if len(sizes) == 1 else 0
    draw_losses(runs, out, "losses", units.pop(), same_size)
    return out


def seconds_of(rows: list[dict]) -> float:
    """The time of the steps of a run, as the speeds in its log say; evaluations do not count."""
    seconds, before = 0.0, 0
    unit = f"{unit_of(rows)}s"
    for row in rows:
        if row.get(f"{unit}_per_s"):
            seconds += (row[unit] - before) / row[f"{unit}_per_s"]
            before = row[unit]
    return seconds


def write_report(folder: Path):
    """loss.png and report.md of the run in a folder: command, scores, time, commit and samples."""
    rows, record = read_log(folder / "log.jsonl"), read_run(folder)
    name, vocab_size = str(folder), vocab_size_of(record)
    draw_losses({name: rows}, folder / "loss.png", name, unit_of(rows), vocab_size)
    command = record.get("command")
    lines = [f"# {folder.name}", "", f"    {command}", "", "| | |", "| --- | --- |"]
    for name, value in facts_of(record, rows).items():
        lines.append(f"| {name} | {value} |")
    lines += validations(rows)
    lines += ["", "![Training and validation loss](loss.png)"]
    sampled = [row for row in rows if "sample" in row]
    for row in sampled[-3:]:
        text = textwrap.indent(row["sample"], "    ")
        lines += ["", f"A sample after step {row['step']}:", "", text]
    text = "\n".join(lines)
    write_whole(folder / "report.md", f"{text}\n")


def facts_of(record: dict, rows: list[dict]) -> dict[str, str]:
    """What a run was, from its record and its log."""
    trained = [row for row in rows if "loss" in row]
    last = trained[-1] if trained else {"step": 0}
    asked = f"{record['config'].get('steps')} steps"
    if record["config"].get("epochs"):
        asked = f"{record['config']['epochs']:g} epochs"
    minutes = seconds_of(rows) / 60
    facts = {
        "length": f"{last['step']} steps of {asked}",
        "parameters": f"{record.get('parameters', 0):,}",
        "time of the steps": f"{minutes:.1f} minutes on {record.get('device')}",
        "code": record.get("git_commit"),
        "begun with": record["init_from"] or "random weights",
    }
    if "tokens" in last:
        facts["tokens"] = f"{last['tokens']:,}"
    return facts


def validations(rows: list[dict]) -> list[str]:
    """A table of the last validation and the best."""
    validated = [row for row in rows if "val_loss" in row]
    if not validated:
        return []
    lines = ["", "| validation | step | loss | other scores |", "| --- | --- | --- | --- |"]
    best = min(validated, key=itemgetter("val_loss"))
    for name, row in (("last", validated[-1]), ("best", best)):
        others = []
        for key, value in row.items():
            if key not in ("step", "val_loss"):
                others.append(f"{key} {value:.4g}")
        told = ", ".join(others)
        lines.append(f"| {name} | {row['step']} | {row['val_loss']:.4f} | {told} |")
    return lines
