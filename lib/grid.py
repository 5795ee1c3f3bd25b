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
        name, equals, values = text.partition("=")
        if not equals or not values or not re.fullmatch(r"\w+", name):
            raise BadInput(f"--{flag} {text} is not FLAG=VALUE,VALUE")
        if name in choices:
            raise BadInput(f"--{flag} names {name} twice")
        choices[name] = []
        for value in values.split(","):
            found = sorted(map(str, Path().glob(value))) if "*" in value else [value]
            if not found:
                raise BadInput(f"--{flag} {text}: no file is called {value}")
            choices[name] += found
        if len(set(choices[name])) < len(choices[name]):
            raise BadInput(f"--{flag} {text} names a value twice")
    return choices


def arms_of(vary: dict[str, list[str]], each: dict[str, list[str]]) -> dict[str, Flags]:
    """The flags of every arm by its name; the first is what the others are compared with.

    Of vary every combination is an arm; of each every value alone, beside the first combination.
    """
    names = [name for name in vary if name not in TUNED]
    arms = {}
    for values in itertools.product(*(vary[name] for name in names)):
        flags = dict(zip(names, values))
        label = ", ".join(in_words(name, value) for name, value in flags.items())
        arms[label or BASELINE] = flags
    first = next(iter(arms.values()))
    for name, values in each.items():
        if name in vary or name in TUNED:
            raise BadInput(f"--each {name} is in --vary too, or is tuned for every arm")
        for value in values:
            label = in_words(name, value)
            if label in arms:
                raise BadInput(f"two arms are called {label}; rename a file")
            arms[label] = first | {name: value}
    if len(arms) < len(list(itertools.product(*(vary[name] for name in names)))) + sum(map(len, each.values())):
        raise BadInput("two arms have the same name; rename a file")
    return arms


def in_words(name: str, value: str) -> str:
    """variants/relu2.py as relu2, other flags as optimizer=muon."""
    if name == "variant":
        return "none" if value in ("", "none") else Path(value).stem
    return f"{name}={value}"


def settings_of(vary: dict[str, list[str]]) -> dict[str, Flags]:
    """What every arm is tried with, by its name; one nameless setting where nothing is tuned."""
    names = [name for name in vary if name in TUNED]
    settings = {}
    for values in itertools.product(*(vary[name] for name in names)):
        flags = dict(zip(names, values))
        settings[", ".join(in_words(name, value) for name, value in flags.items())] = flags
    return settings


def runs_of(out: Path, arms: dict[str, Flags], settings: dict[str, Flags], seeds: list[int]) -> list[Run]:
    """Every run, seed by seed, so that all arms are as far when time is up."""
    runs = []
    for seed in seeds:
        for arm, changes in arms.items():
            for setting, tuned in settings.items():
                name = ", ".join(filter(None, (arm, setting, f"seed={seed}")))
                folder = out / re.sub(r"[^\w.=+-]+", "_", name)
                flags = changes | tuned | {"seed": str(seed), "out": str(folder)}
                if flags.get("variant") == "none":
                    del flags["variant"]
                runs.append(Run(arm, setting, seed, folder, tuple(flags.items())))
    return runs
