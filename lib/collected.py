"""Runs that exist already: found under folders, told apart by the flags in which they differ, listed."""

from pathlib import Path

from lib.errors import BadInput
from lib.grid import BASELINE, TUNED, Flags, Run, in_words, named
from lib.records import read_json
from lib.runs import is_record, read_log
from lib.tables import Row

# flags that say where a run is, or how it is told or divided, and not what it computes
INCIDENTAL = set(
    """seed out resume anyway trust_variant stop_at log_every save_every keep keep_every sample wandb micro_batch
    reduce_each shard_over reshard_after_forward plan draw gpus gpu""".split()
)


def find_runs(places: tuple[str, ...]) -> list[Path]:
    """The folders of runs at and below these places, in their order."""
    folders = []
    for place in places:
        records = sorted(Path(place).rglob("run.json"))
        found = [path.parent for path in records if is_record(path)]
        if not found:
            raise BadInput(f"{place}: no run here (looked for run.json)")
        folders += [folder for folder in found if folder not in folders]
    return folders


def flags_of(record: dict) -> Flags:
    """The flags of a run that say what it computes, the variant first, by the hash of its file."""
    variant = record.get("variant", {})
    flags = {"variant": variant.get("sha256", "")}
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
            digest, name = variant["sha256"], in_words("variant", variant["file"])
            if name in names.values():
                name += f"#{digest[:8]}"
            names[digest] = name
    return names


def told_apart(folders: list[Path]) -> list[Run]:
    """The runs with names that say in which flags they differ; the first is of the arm that others are compared with.

    Raises ValueError where two runs have the same flags and seed.
    """
    records = [read_json(folder / "run.json") for folder in folders]
    variants = names_of_variants(records)
    flags = [flags_of(record) for record in records]
    differing = where_they_differ(flags)
    runs = {}
    for folder, record, each in zip(folders, records, flags):
        tuned = {name: each[name] for name in differing if name in TUNED and name in each}
        words = []
        for name in differing:
            if name == "variant":
                words.append(variants[each[name]])
            elif name not in TUNED and each.get(name):
                value = each[name]
                if value == "0" and name in record["model"]:  # that of the size
                    value = str(record["model"][name])
                words.append(in_words(name, value))
        arm = ", ".join(words) or BASELINE
        run = Run(arm, named(tuned), record["config"]["seed"], folder)
        other = runs.setdefault((run.arm, run.setting, run.seed), run)
        if other is not run:
            raise BadInput(f"{other.folder} and {folder} are runs of the same flags and seed")
    return list(runs.values())


def where_they_differ(flags: list[Flags]) -> list[str]:
    values = {}
    for each in flags:
        values |= dict.fromkeys(each)
    for name in values:
        values[name] = {each.get(name, "") for each in flags}
    return [name for name, found in values.items() if len(found) > 1]


def spelled(value) -> str:
    """A flag's value as it is typed."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def history(places: tuple[str, ...], defaults: dict) -> list[Row]:
    """A line for every run: the flags that are not the defaults, commit, steps, losses, minutes of training."""
    rows = [("run", ["flags", "commit", "steps", "loss", "val_loss", "minutes"])]
    shown = INCIDENTAL - {"seed"}
    for folder in find_runs(places):
        record, log = read_json(folder / "run.json"), read_log(folder / "log.jsonl")
        changed = []
        for name, value in record["config"].items():
            usual = spelled(defaults.get(name, ""))
            if name not in shown and spelled(value) != usual:
                changed.append(f"{name}={spelled(value)}")
        last = {}
        for row in log:
            last |= row
        steps = f"{last.get('step', 0)}/{record['config']['steps']}"
        cells = [" ".join(changed), record.get("git_commit", ""), steps]
        for name in ("loss", "val_loss"):
            cells.append(f"{last[name]:.4f}" if name in last else "–")
        rows.append((str(folder), [*cells, minutes(log)]))
    return rows


def minutes(log: list[dict]) -> str:
    """How long the steps took that were logged, by their speeds; evaluating and saving are not in it."""
    seconds, before = 0.0, 0
    for row in log:
        speed = row.get("tokens_per_s")
        if speed:
            seconds += (row["tokens"] - before) / speed
            before = row["tokens"]
    return f"{seconds / 60:.1f}" if seconds else "–"
