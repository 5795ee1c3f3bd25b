"""Test a design choice: train every arm with several seeds, and say whether the difference is real.

    python recipes/ablate.py --data data/stdlib --vary variant=none,variants/relu2.py \\
        learning_rate=1e-3,2e-3 --seeds 3 --steps 400 --out out/relu
    python recipes/ablate.py ... --minutes 3 --out out/relu    # equal time: each arm makes the steps that fit
    python recipes/ablate.py ... -- --batch_size 16            # flags of train.py for every arm
    python recipes/ablate.py --compare out/a out/b --out out/ab  # runs that exist already
    python recipes/ablate.py --history out                     # a table of all runs

The first value of each flag is what the others are compared with. `--vary` makes every combination an arm, `--each`
changes one flag at a time; a learning rate is tried with every arm, and arms are compared each at its own best. Type
the same command again to continue. The answer is in report.html, report.md, results.csv and results.json.
"""

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from eval import PROTOCOLS
from lib.ablation import Result, compare_arms, read_result
from lib.ablation_report import write_report
from lib.cli import ROOT, run_command
from lib.collected import find_runs, history, spelled, told_apart
from lib.errors import BadInput
from lib.files import write_whole
from lib.grid import Flags, Run, arms_of, read_choices, runs_of, settings_of
from lib.grid_runner import Trainer
from lib.opening import prepare_default
from lib.records import read_json
from lib.side_by_side import Job, last_line, run_jobs
from lib.tables import headline, markdown
from lib.train_flags import check_flags
from lib.variant_flags import extended, typed
from train import Config as TrainConfig

COMMAND = list(sys.argv)  # as it was typed
LOWER = ("loss", "bits", "perplexity", "norm", "memory")  # a metric with such a name is better when it is lower


@dataclass
class Config:
    """Test a design choice with seeds and intervals. What follows -- goes to train.py for every arm."""

    data: tuple[str, ...] = ("data/stdlib",)  # as of train.py
    vary: tuple[str, ...] = ()     # FLAG=VALUE,VALUE: every combination is an arm, but for learning rates
    each: tuple[str, ...] = ()     # FLAG=VALUE,VALUE: each value is an arm that changes this flag alone
    seeds: int = 3
    sweep_seeds: int = 0           # seeds that all learning rates are tried with, the others with the best; 0: all
    steps: int = 0                 # of each run; 400 where neither minutes nor tokens are given
    tokens: int = 0                # of each run, instead of steps
    minutes: float = 0.0           # of training of each run, instead of steps; each arm's step is timed first
    out: str = "out/ablation"
    jobs: int = 0                  # runs at a time; 0: one on each GPU, or one
    metric: str = "val_bits_per_byte"
    """a field of log.jsonl, or TASK:DATA for the score of an eval.py task"""
    compare: tuple[str, ...] = ()  # runs that exist already, or folders of them, instead
    history: str = ""              # a folder: print a table of all runs under it


def main(config: Config, rest: list[str]):
    if config.history:
        print("\n".join(markdown(history((config.history,), asdict(TrainConfig())))))
        return
    if config.compare:
        runs = told_apart(find_runs(config.compare))
        answer(config, runs, sorted({run.seed for run in runs}), [])
        return
    vary, each = read_choices(config.vary, "vary"), read_choices(config.each, "each")
    arms, settings = arms_of(vary, each), settings_of(vary)
    trainer = Trainer(config, rest)
    tokens = check(config, trainer, arms, settings)
    remember(config, rest)
    if config.data == Config.data and not Path(config.data[0]).exists():
        prepare_default(config.data[0])
    steps = trainer.steps_of(arms, tokens)
    seeds = list(range(config.seeds))
    sweep = seeds[: config.sweep_seeds] or seeds
    runs = runs_of(Path(config.out), arms, settings, sweep)
    later = runs_of(Path(config.out), arms, settings, seeds[len(sweep) :])
    total = len(runs) + len(later) // len(settings)
    trainer.train(runs, steps, total)
    if later:
        best = {arm.name: arm.setting for arm in compared(config, runs, sweep)}
        chosen = [run for run in later if run.setting == best[run.arm]]
        trainer.train(chosen, steps, total)
        runs += chosen
    notes = [f"{run.folder} failed ({why})." for run, why in trainer.failed.items()]
    if config.minutes:
        notes.append(f"Each run trained for {config.minutes:g} minutes, by the time of its arm's step.")
    answer(config, runs, sweep, notes)


def check(config: Config, trainer: Trainer, arms: dict[str, Flags], settings: dict[str, Flags]) -> dict[str, int]:
    """Raise ValueError for what would make a run fail at once, before the first begins; for a flag that train.py does
    not know, the program ends. Returns the tokens of a step of each arm.
    """
    if len(arms) < 2:
        hint = "learning rates are tried with every arm and make none"
        raise BadInput(f"one arm cannot be compared; give a flag in --vary or --each a second value ({hint})")
    if sum(map(bool, (config.steps, config.tokens, config.minutes))) > 1:
        raise BadInput("--steps, --tokens and --minutes do not go together")
    for name in ("seeds", "sweep_seeds", "steps", "tokens", "minutes", "jobs"):
        value, least = getattr(config, name), int(name == "seeds")
        if not least <= value < math.inf:
            raise BadInput(f"--{name} {value} must be at least {least}")
    task, _, data = config.metric.partition(":")
    if data and task not in PROTOCOLS:
        raise BadInput(f"--metric {config.metric}: {task} is no task of eval.py ({', '.join(PROTOCOLS)})")
    if data and not Path(data).exists():
        raise BadInput(f"--metric {config.metric}: there is no {data}")
    for word in trainer.rest:
        if word.partition("=")[0] in ("--data", "--steps", "--seed", "--out", "--resume"):
            raise BadInput(f"{word} is ablate.py's own, or set for each run; it cannot follow --")
    tokens = {}
    for run in runs_of(Path(config.out), arms, settings, [0]):
        flags = dict(run.flags)
        kind = extended(TrainConfig, flags.get("variant") or typed("--variant", trainer.rest), "")
        for name in flags:
            if not hasattr(kind, name):
                raise BadInput(f"{run.arm}: train.py has no flag --{name} with this variant")
        how = dict(config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
        flags = tyro.cli(kind, args=trainer.flags(run, config.steps or 1), **how)
        check_flags(flags, 1)
        tokens[run.arm] = flags.batch_size * flags.seq_len
    return tokens


def remember(config: Config, rest: list[str]):
    """Write down what is asked. Raises ValueError where --out holds the answer to something else."""
    path = Path(config.out) / "ablation.json"
    free = ("out", "jobs", "metric", "seeds", "compare", "history")
    asked = {name: value for name, value in asdict(config).items() if name not in free} | {"rest": rest}
    asked = json.loads(json.dumps(asked))  # with lists for tuples, as in the file
    if path.exists():
        before = read_json(path, *asked)
        for name in asked:
            if before[name] != asked[name]:
                what = "after --" if name == "rest" else f"with --{name}"
                then, now = spelled(before[name]) or "nothing", spelled(asked[name]) or "nothing"
                raise BadInput(f"--out {config.out} holds an ablation {what} {then}, not {now}; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asked, indent=2))


def measure(folder: Path, task: str, data: str) -> float:
    """The main score of a run in a task of eval.py."""
    path = folder.with_suffix(f".{task}.json")
    words = ["--model", str(folder), "--task", task, "--data", data, "--out", str(path)]
    job = Job(task, [sys.executable, str(ROOT / "eval.py"), *words], path.with_suffix(".txt"))
    if not path.exists():
        run_jobs([job], 1, 0)
        if job.process.returncode:
            raise BadInput(f"{folder} could not be measured: {last_line(job.log)}")
    result = read_json(path)
    _, (value, _, _) = headline(result, PROTOCOLS[task][result["protocol"]].average)
    return value


def lower_is_better(metric: str) -> bool:
    return any(word in metric.partition(":")[0] for word in LOWER)


def read_all(config: Config, runs: list[Run]) -> list[Result]:
    task, _, data = config.metric.partition(":")
    score = partial(measure, task=task, data=data) if data else None
    return [read_result(run, config.metric, score) for run in runs]


def compared(config: Config, runs: list[Run], sweep: list[int]) -> list:
    return compare_arms(read_all(config, runs), lower_is_better(config.metric), sweep)


def answer(config: Config, runs: list[Run], sweep: list[int], notes: list[str]):
    """Write the report, and print its first sentence."""
    arms = compared(config, runs, sweep)
    question = shlex.join(["python", "recipes/ablate.py", *COMMAND[1:]])
    report = Path(config.out) / "report.md"
    if config.compare and report.exists() and f"`{question}`" not in report.read_text():
        raise BadInput(f"--out {config.out} holds the report of another command; choose another")
    results = [result for arm in arms for tried in arm.tried.values() for result in tried.values()]
    missing = [str(result.run.folder) for result in results if math.isnan(result.value)]
    if len(missing) == len(results):
        raise BadInput(f"no run has {config.metric} at its last step; {missing[0]} is the first of {len(missing)}")
    unsaid = [folder for folder in missing if not any(f"{folder} failed" in note for note in notes)]
    if unsaid:
        notes = [*notes, f"No {config.metric} at the end of {', '.join(unsaid)}."]
    words = write_report(Path(config.out), question, config.metric, lower_is_better(config.metric), arms, notes)
    print(f"\n{words}\n\nwrote report.html, report.md, results.csv and results.json in {config.out}", flush=True)


if __name__ == "__main__":
    place = COMMAND.index("--") if "--" in COMMAND else len(COMMAND)
    sys.argv = COMMAND[:place]
    run_command(partial(main, rest=COMMAND[place + 1 :]), Config)
