"""Trains the runs of an ablation: what is not done yet, some at a time, with as many steps as time or tokens allow."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from lib.ablation import ended
from lib.cli import ROOT
from lib.errors import BadInput
from lib.files import write_whole
from lib.grid import Flags, Run, runs_of
from lib.records import read_json
from lib.runs import read_log
from lib.side_by_side import Job, last_line, run_jobs

TIMED_STEPS = 40  # of each arm, twice in turns, where its step is timed


def words_of(flags: dict[str, str]) -> list[str]:
    """What to type for these flags; a variant called none is no flag."""
    words = []
    for name, value in flags.items():
        if (name, value) != ("variant", "none"):
            words += [f"--{name}", value]
    return words


class Trainer:
    """Starts train.py for the runs of a grid.

    config has the flags of recipes/ablate.py, rest is what follows -- there: flags of train.py for every arm.
    """

    def __init__(self, config, rest: list[str]):
        self.config, self.rest = config, rest
        self.gpus = torch.cuda.device_count()
        self.slots = config.jobs or self.gpus or 1
        self.failed: dict[Run, str] = {}  # and why

    def flags(self, run: Run, steps: int) -> list[str]:
        own = ["--data", *self.config.data, "--steps", str(steps), "--sample", "", "--keep", "1"]
        return [*own, *words_of(dict(run.flags)), *self.rest]

    def job(self, run: Run, steps: int, *more: str) -> Job:
        command = [sys.executable, str(ROOT / "train.py"), *self.flags(run, steps), *more]
        return Job(str(run.folder), command, run.folder.with_suffix(".txt"))

    def steps_of(self, arms: dict[str, Flags], tokens_of_a_step: dict[str, int]) -> dict[str, int]:
        """How many steps each arm makes: as many as --steps says, or as fit into --tokens or --minutes."""
        config = self.config
        if config.tokens:
            return {arm: max(1, config.tokens // each) for arm, each in tokens_of_a_step.items()}
        if not config.minutes:
            return dict.fromkeys(arms, config.steps or 400)
        path = Path(config.out) / "timing.json"
        if not path.exists():
            write_whole(path, json.dumps(self.time(arms), indent=2))
        return {arm: max(1, int(60 * config.minutes / seconds + 1e-6)) for arm, seconds in read_json(path, *arms).items()}

    def time(self, arms: dict[str, Flags]) -> dict[str, float]:
        """Seconds of a step of each arm on this machine: the better of two short runs, all arms in turns."""
        seconds = {}
        for turn in range(2):
            for run in runs_of(Path(self.config.out) / f"timing{turn}", arms, {"": {}}, [0]):
                job = self.job(run, TIMED_STEPS, "--log_every", "5")
                run_jobs([job], 1, self.gpus)
                rows = [row for row in read_log(run.folder / "log.jsonl") if "tokens_per_s" in row]
                if len(rows) < 3:
                    raise BadInput(f"{run.arm} could not be timed: {last_line(job.log)}")
                tokens = rows[0]["tokens"] / rows[0]["step"]
                found = tokens / median(row["tokens_per_s"] for row in rows[1:])
                seconds[run.arm] = min(found, seconds.get(run.arm, found))
        for arm, each in seconds.items():
            print(f"{arm}: {each:.4f} s a step", flush=True)
        return seconds

    def train(self, runs: list[Run], steps: dict[str, int], total: int):
        """Train what is not done yet of these runs; what fails is told and kept in `failed`. total is of all runs."""
        todo = {str(run.folder): run for run in runs if not ended(run.folder)}
        before, took = total - len(todo), []

        def finished(job: Job):
            took.append(time.monotonic() - job.began)
            outcome = ""
            if job.process.returncode:
                self.failed[todo[job.name]] = last_line(job.log)
                outcome = f"  FAILED: {last_line(job.log)}"
            left = (len(todo) - len(took)) * sum(took) / len(took) / self.slots / 60
            progress = f"{before + len(took)}/{total}  {job.name}  {took[-1]:.0f} s, {left:.0f} min left"
            print(progress + outcome, flush=True)

        if todo:
            print(f"{len(todo)} runs to go, {self.slots} at a time", flush=True)
        run_jobs([self.job(run, steps[run.arm]) for run in todo.values()], self.slots, self.gpus, finished)
