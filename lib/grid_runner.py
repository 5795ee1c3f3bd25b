"""Trains the runs of an ablation: what is not done yet, some at a time, with as many steps as time or tokens allow."""

import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, median

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


class Trainer:
    """Starts train.py for the runs of a grid.

    config has the flags of recipes/ablate.py, rest is what follows -- there: flags of train.py for every arm.
    """

    def __init__(self, config, rest: list[str]):
        self.config, self.rest = config, rest
        self.gpus = torch.cuda.device_count()
        self.slots = config.jobs or self.gpus or 1
        self.failed: dict[Run, str] = {}  # and why
        self.done = 0  # runs that are behind us

    def flags(self, run: Run, steps: int) -> list[str]:
        """The flags of train.py for a run, which are all its own but for what it keeps and says."""
        words = ["--data", *self.config.data]
        words += ["--steps", str(steps)]
        words += ["--sample", "", "--keep", "1"]
        for name, value in run.flags:
            words += [f"--{name}", value]
        return words + self.rest

    def job(self, run: Run, steps: int, *more: str) -> Job:
        script = str(ROOT / "train.py")
        words = self.flags(run, steps)
        command = [sys.executable, script, *words, *more]
        return Job(str(run.folder), command, run.folder.with_suffix(".txt"))

    def steps_of(self, arms: dict[str, Flags], tokens_of_a_step: dict[str, int]) -> dict[str, int]:
        """How many steps each arm makes: as many as --steps says, or as fit into --tokens or --minutes."""
        config = self.config
        if config.tokens:
            amount, of_a_step = config.tokens, tokens_of_a_step
        elif config.minutes:
            amount, of_a_step = 60 * config.minutes, self.seconds_of_a_step(arms)
        else:
            return dict.fromkeys(arms, config.steps or 400)
        steps = {}
        for arm in arms:
            fitting = amount / of_a_step[arm]
            steps[arm] = max(1, int(fitting + 1e-6))
        return steps

    def seconds_of_a_step(self, arms: dict[str, Flags]) -> dict[str, float]:
        """Of each arm on this machine, timed once."""
        path = Path(self.config.out) / "timing.json"
        if not path.exists():
            timed = self.time(arms)
            write_whole(path, json.dumps(timed, indent=2))
        return read_json(path, *arms)

    def time(self, arms: dict[str, Flags]) -> dict[str, float]:
        """Seconds of a step of each arm: the better of two short runs, all arms in turns."""
        seconds = {}
        for turn in range(2):
            folder = Path(self.config.out) / f"timing{turn}"
            for run in runs_of(folder, arms, {"": {}}, [0]):
                found = self.time_one(run)
                seconds[run.arm] = min(found, seconds.get(run.arm, found))
            shutil.rmtree(folder)  # they are no runs to compare
        for arm, each in seconds.items():
            print(f"{arm}: {each:.4f} s a step", flush=True)
        return seconds

    def time_one(self, run: Run) -> float:
        job = self.job(run, TIMED_STEPS, "--log_every", "5")
        run_jobs([job], 1, self.gpus)
        log = read_log(run.folder / "log.jsonl")
        rows = [row for row in log if "tokens_per_s" in row]
        if len(rows) < 3:
            raise BadInput(f"{run.arm} could not be timed: {last_line(job.log)}")
        first, *others = rows  # the first steps warm up
        speed = median(row["tokens_per_s"] for row in others)
        return first["tokens"] / first["step"] / speed

    def check_metric(self, folder: Path):
        """Raise ValueError where a run does not log what --metric names, after the first run and not the last."""
        metric, task, _ = self.config.metric.partition(":")
        fields = {}
        for row in read_log(folder / "log.jsonl"):
            fields |= row
        if not task and metric not in fields:
            raise BadInput(f"--metric {metric} is not in {folder / 'log.jsonl'}, which has {', '.join(sorted(fields))}")

    def train(self, runs: list[Run], steps: dict[str, int], total: int):
        """Train what is not done yet of these runs; what fails is told and kept in `failed`. total is of all runs."""
        todo = {}
        for run in runs:
            if not ended(run.folder):
                todo[str(run.folder)] = run
        before, took = self.done + len(runs) - len(todo), []

        def finished(job: Job):
            took.append(time.monotonic() - job.began)
            outcome = ""
            if job.process.returncode:
                why = last_line(job.log)
                self.failed[todo[job.name]] = why
                outcome = f"  FAILED: {why}"
            else:
                self.check_metric(todo[job.name].folder)
            number = before + len(took)
            minutes = (total - number) * mean(took) / self.slots / 60
            print(f"{number}/{total}  {job.name}  {took[-1]:.0f} s, {minutes:.0f} min left{outcome}", flush=True)

        if todo:
            print(f"{len(todo)} runs to go, {self.slots} at a time", flush=True)
        jobs = [self.job(run, steps[run.arm]) for run in todo.values()]
        run_jobs(jobs, self.slots, self.gpus, finished)
        self.done += len(runs)
