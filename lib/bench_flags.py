"""The flags of bench.py that not everybody needs, and which do not fit."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.errors import BadInput
from lib.growth import check_growth
from lib.results import check_out

SHARED = (  # flags that go to train.py as they are
    "size", "seq_len", "steps", "optimizer", "shard_over", "reshard_after_forward", "reduce_each"
)  # fmt: skip


@dataclass(kw_only=True)
class Flags:
    # how, as in train.py
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic; auto: bf16 if it is faster
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: where a compiler is there; with --peer also without"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the blocks' matrices, AdamW keeps the rest"""
    checkpointing: str = "none"
    """none, selective, full, or 2 for every second block, 3 for every third, ..."""
    shard_over: int = 0
    """neighbouring processes that share one copy of the model; 0 is all of them"""
    reshard_after_forward: bool = True  # give gathered weights back until the backward pass
    reduce_each: bool = False           # reduce gradients with every micro-batch, not with the last
    # measuring
    steps: int = 10                     # timed in a round, of training; --grow may take fewer
    warmup: int = 3
    """steps that are not timed; the very first one, which compiles, is extra"""
    repeats: int = 3                    # rounds, of which the median counts
    join: str = ""                      # an earlier --grow --out, to be shown beside this one
    out: str = ""
    """JSON file for the results, with a picture beside it; "" only prints them"""


def check_alone(config, processes: int):
    """Raise ValueError for what one process measures, under torchrun."""
    for flag in ("decode", "busy"):
        if getattr(config, flag) and processes > 1:
            raise BadInput(f"--{flag} is measured by one process, and here are {processes}")


def check_flags(config, sizes: dict):
    """Raise ValueError for a flag of bench.py that is out of range or does not go with another.

    sizes is model.SIZES.
    """
    if config.size not in sizes:
        raise BadInput(f"--size {config.size} is not one of {', '.join(sizes)}")
    for name in ("seq_len", "micro_batch", "accumulate", "steps", "repeats"):
        if getattr(config, name) < 1:
            raise BadInput(f"--{name} {getattr(config, name)} must be at least 1")
    if config.warmup < 0:
        raise BadInput(f"--warmup {config.warmup} must not be negative")
    if config.out and not config.out.endswith(".json"):
        beside = "the picture goes beside it, in .png"
        raise BadInput(f"--out {config.out} must end in .json; {beside}")
    if config.out:
        check_out(Path(config.out), png=None)
    if config.busy < 0:
        raise BadInput(f"--busy {config.busy} must not be negative")
    peer = config.peer != "none" and not config.decode
    if config.sweep + config.pack + peer + config.decode + config.grow + (config.busy > 0) > 1:
        modes = "--sweep, --pack, --peer, --decode, --busy and --grow"
        raise BadInput(f"only one of {modes} can be given")
    check_growth(config)
    if config.peer == "hf":
        if config.checkpointing not in ("none", "full") or config.optimizer != "adamw":
            given = f"--checkpointing {config.checkpointing} --optimizer {config.optimizer}"
            known = "which knows none or full, and adamw"
            raise BadInput(f"{given} does not go with --peer hf, {known}")
        if importlib.util.find_spec("transformers") is None:
            raise BadInput("--peer hf needs the package transformers, which is not installed")
