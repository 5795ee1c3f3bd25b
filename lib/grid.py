"""The arms of an ablation: what each changes, with which settings and seeds it is trained, and in which folders."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import BadInput

TUNED = ("learning_rate",)  # flags whose values an arm is tried with, to be compared at its own best
BASELINE = "baseline"
Flags = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One training run of an ablation; a plain run of train.py."""

    arm: str      # "relu2", say
    setting: str  # "learning_rate=1e-3"; empty where nothing is tuned
    seed: int
    folder: Path
    flags: tuple[tuple[str, str], ...] = ()  # of train.py


def read_choices(texts: tuple[str, ...], flag: str) -> dict[str, list[str]]:
    """`variant=none,variants/relu2.py learning_rate=1e-3,2e-3`, as the values of each flag in turn.

    A value with * stands for the files of that pattern. Raises ValueError.
    """
    choices = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not values or not re.fullmatch(r"\w+", name):
            raise BadInput(f"--{flag} {text} is not FLAG=VALUE,VALUE")
        if name in choices:
            raise BadInput(f"--{flag} names {name} twice")
        if name == "seed":
            raise BadInput(f"--{flag} {text}: every arm has the same seeds, as many as --seeds says")
        choices[name] = found = []
        for value in values.split(","):
            if "*" in value:
                found += files_like(value)
            else:
                found.append(value)
        if len(set(found)) < len(found):
            raise BadInput(f"--{flag} {text} names a value twice")
    return choices


def files_like(pattern: str) -> list[str]:
    paths = sorted(Path().glob(pattern))
    if not paths:
        raise BadInput(f"no file is called {pattern}")
    return [str(path) for path in paths]


def arms_of(vary: dict[str, list[str]], each: dict[str, list[str]]) -> dict[str, Flags]:
    """The flags of every arm by its name; the first is what the others are compared with.

    Of vary every combination is an arm; of each every value alone, beside the first combination. Raises ValueError
    where two arms have the same name.
    """
    arms = {}
    for flags in combinations(vary, tuned=False):
        add_arm(arms, named(flags) or BASELINE, flags)
    first = next(iter(arms.values()))
    for name, values in each.items():
        if name in TUNED:
            raise BadInput(f"--each {name}: it belongs in --vary, which tries it with every arm")
        if name in vary:
            raise BadInput(f"--each {name} is in --vary too")
        for value in values:
            add_arm(arms, in_words(name, value), first | {name: value})
    return arms


def add_arm(arms: dict[str, Flags], label: str, flags: Flags):
    if label in arms:
        raise BadInput(f"two arms are called {label}; rename a file")
    arms[label] = flags


def combinations(vary: dict[str, list[str]], tuned: bool) -> list[Flags]:
    """Every combination of the values of the flags that are tuned, or of the others."""
    names = [name for name in vary if (name in TUNED) == tuned]
    values = [vary[name] for name in names]
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def settings_of(vary: dict[str, list[str]]) -> dict[str, Flags]:
    """What every arm is tried with, by its name; one nameless setting where nothing is tuned."""
    return {named(flags): flags for flags in combinations(vary, tuned=True)}


def named(flags: Flags) -> str:
    words = [in_words(name, value) for name, value in flags.items()]
    return ", ".join(words)


def in_words(name: str, value: str) -> str:
    """variants/relu2.py as relu2, other flags as optimizer=muon."""
    if name != "variant":
        return f"{name}={value}"
    if value in ("", "none"):
        return "none"
    return Path(value).stem


def runs_of(out: Path, arms: dict[str, Flags], settings: dict[str, Flags], seeds: list[int]) -> list[Run]:
    """Every run, seed by seed, so that all arms are as far when time is up."""
    runs = []
    for seed, arm, setting in itertools.product(seeds, arms, settings):
        words = [word for word in (arm, setting, f"seed={seed}") if word]
        name = re.sub(r"[^\w.=+-]+", "_", "_".join(words))
        folder = out / name
        flags = arms[arm] | settings[setting]
        if flags.get("variant") == "none":
            del flags["variant"]
        flags |= {"seed": str(seed), "out": str(folder)}
        runs.append(Run(arm, setting, seed, folder, tuple(flags.items())))
    return runs
