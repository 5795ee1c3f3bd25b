"""Every checkpoint of every run, measured: a table, and a picture of the main score."""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib import probe
from lib.answers import FLAGS
from lib.errors import BadInput
from lib.plots import draw_curves
from lib.records import read_json
from lib.results import check_out, check_same, write_all
from lib.runs import read_run
from lib.share import World
from lib.tables import headline


class Point(NamedTuple):
    """A checkpoint and its main score."""

    setting: str           # equal for runs that differ in the seed alone
    run: str
    step: int
    tokens: int
    interval: list[float]  # value, low, high


def draw_runs(config, world: World, evaluate: Callable, protocols: dict[str, dict]):
    """Measure all checkpoints that config, eval.py's, names, and write what --out asks for.

    evaluate(config, path, world) measures one, its result is returned on the first process.
    """
    out, points, codes = Path(config.out), [], []
    most_common, times = Counter(Path(run).name for run in config.model).most_common(1)[0]
    if times > 1:
        problem = "which the table could not tell apart"
        raise BadInput(f"--model names two runs called {most_common}, {problem}")
    # those by which a result that is there already is known as this curve's
    world.first(check_curve, config, {name: getattr(config, name) for name in FLAGS})
    for folder in map(Path, config.model):
        record = read_run(folder)["config"]
        setting, steps = setting_of(folder, record, codes)
        for path in steps:
            file = out.with_suffix("") / f"{folder.name}_{path.name}.json"
            result = evaluate(dataclasses.replace(config, out=str(file)), str(path), world)
            if world.rank == 0:
                average = protocols[config.task][config.protocol].average
                name, interval = headline(result, average)
                step = int(path.name.removeprefix("step_"))
                tokens = step * record["batch_size"] * record["seq_len"]
                points.append(Point(setting, folder.name, step, tokens, interval))
    if world.rank == 0:
        write_curve(out, {"task": config.task, "protocol": config.protocol, "score": name}, points)


def setting_of(folder: Path, flags: dict, codes: list) -> tuple[str, list[Path]]:
    """What a run has in common with those of other seeds, and its checkpoints.

    The probes of the codes that runs were made by are collected in codes.
    """
    checkpoints = folder.glob("step_" + 8 * "[0-9]")
    steps = sorted(path for path in checkpoints if (path / ".metadata").exists())
    if not steps:
        raise BadInput(f"--model {folder}: this run has no checkpoints")
    incidental = ("seed", "out", "resume", "anyway")
    kept = {key: value for key, value in flags.items() if key not in incidental}
    return json.dumps([kept, probe.number(probe.read(steps[-1]), codes)]), steps


def write_curve(out: Path, about: dict, points: list[Point]):
    name = about["score"]
    lines = [f"| run | step | tokens | {name} | 95 % interval |"]
    lines.append("| --- | ---: | ---: | ---: | --- |")
    rows = []
    for point in points:
        value, low, high = point.interval
        place = f"{point.run} | {point.step} | {point.tokens:,}"
        lines.append(f"| {place} | {value:.4f} | {low:.4f} to {high:.4f} |")
        row = {"run": point.run, "step": point.step, "tokens": point.tokens}
        rows.append(row | {"score": point.interval})
    draw_curves(points, name, picture := io.BytesIO())
    write_all({
        # first, since by it the others are known as its own
        out: json.dumps(about | {"points": rows}),
        out.with_suffix(".md"): "\n".join(lines) + "\n",
        out.with_suffix(".png"): picture.getvalue(),
    })  # fmt: skip
    written = f"wrote {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}"
    print("\n".join(lines) + f"\n\n{written}")


def check_curve(config, flags: dict):
    """Raise ValueError where --out, or a checkpoint's result beside it, is of something else."""
    out, results = Path(config.out), Path(config.out).with_suffix("")
    for name in (Path(folder).name for folder in config.model):
        for file in sorted(results.glob("*_step_????????.json")):
            if file.name[: -len("_step_00000000.json")] == name:
                check_same(file, flags)
    if out.exists():
        check_same(out, {name: flags[name] for name in ("task", "protocol")})
        if "points" not in read_json(out):
            raise BadInput(f"--out: {out} exists and is no curve; choose another name")
    else:
        check_out(out, md=None, png=None)
