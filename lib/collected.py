"""Runs that exist already: found under folders, told apart by the flags in which they differ, listed."""

import math
from pathlib import Path

from lib.errors import BadInput
from lib.grid import BASELINE, TUNED, Run, in_words
from lib.records import read_json
from lib.runs import is_record, read_log
from lib.tables import Row

# flags that say where a run is, or how it is told or divided, and not what it computes
INCIDENTAL = set(
    """seed out resume anyway trust_variant stop_at log_every save_every keep keep_every sample wandb micro_batch
    reduce_each shard_over reshard_after_forward plan gpus gpu""".split()
)


def find_runs(places: tuple[str, ...]) -> list[Path]:
    """The folders of runs at and below these places, in their order."""
    folders = []
    for place in map(Path, places):
        found = sorted(path.parent for path in place.rglob("run.json") if is_record(path))
        if not found:
            raise BadInput(f"{place}: no run here (looked for run.json)")
        folders += [folder for folder in found if folder not in folders]
    return folders


def flags_of(record: dict) -> dict[str, str]:
    """The flags of a run that say what it computes, the variant first, by the hash of its file."""
    flags = {"variant": record.get("variant", {}).get("sha256", "")}
    for name, value in record["config"].items():
        if name not in INCIDENTAL and name != "variant":
            flags[name] = spelled(value)
    return flags


def names_of_variants(records: list[dict]) -> dict[str, str]:
    """What to call each variant, by its hash: its file's name, with some of the hash where two have the same."""
    names = {"": "none"}
    for record in records:
        variant = record.get("variant")
        if variant and variant["sha256"] not in names:
            name = in_words("variant", variant["file"])
            if name in names.values():
                name += f"#{variant['sha256'][:8]}"
            names[variant["sha256"]] = name
    return names


def told_apart(folders: list[Path]) -> list[Run]:
    """The runs with names that say in which flags they differ; the first is of the arm that others are compared with.

    Raises ValueError where two runs have the same flags and seed.
    """
    records = [read_json(folder / "run.json") for folder in folders]
    flags = [flags_of(record) for record in records]
    names = list(dict.fromkeys(name for each in flags for name in each))
    differing = [name for name in names if len({each.get(name, "") for each in flags}) > 1]
    variants, runs = names_of_variants(records), []
    for folder, record, each in zip(folders, records, flags):
        words = {True: [], False: []}
        for name in differing:
            value = each.get(name, "")
            words[name in TUNED].append(variants[value] if name == "variant" else in_words(name, value))
        arm, setting = ", ".join(words[False]) or BASELINE, ", ".join(words[True])
        runs.append(Run(arm, setting, record["config"]["seed"], folder))
    places = {}
    for run in runs:
        place = (run.arm, run.setting, run.seed)
        if place in places:
            raise BadInput(f"{places[place]} and {run.folder} are runs of the same flags and seed")
        places[place] = run.folder
    return runs


def spelled(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def history(places: tuple[str, ...], defaults: dict) -> list[Row]:
    """A line for every run: the flags that are not the defaults, commit, steps, losses, minutes of training."""
    rows = [("run", ["flags", "commit", "steps", "loss", "validation", "minutes"])]
    for folder in find_runs(places):
        record, log = read_json(folder / "run.json"), read_log(folder / "log.jsonl")
        changed = []
        for name, value in record["config"].items():
            if name not in INCIDENTAL - {"seed"} and spelled(value) != spelled(defaults.get(name, "")):
                changed.append(f"{name}={spelled(value)}")
        losses = [row["loss"] for row in log if "loss" in row]
        measured = [row["val_loss"] for row in log if "val_loss" in row]
        steps = max((row["step"] for row in log), default=0)
        done = f"{steps}/{record['config']['steps']}"
        last = [f"{each[-1]:.4f}" if each else "–" for each in (losses, measured)]
        rows.append((str(folder), [" ".join(changed), record.get("git_commit", ""), done, *last, minutes(log)]))
    return rows


def minutes(log: list[dict]) -> str:
    """How long the steps took that were logged, by their speeds; evaluating and saving are not in it."""
    seconds, before = 0.0, 0
    for row in log:
        if row.get("tokens_per_s"):
            seconds += (row["tokens"] - before) / row["tokens_per_s"]
            before = row["tokens"]
    return f"{seconds / 60:.1f}" if seconds and math.isfinite(seconds) else "–"
