"""The flags of bench.py: which do not fit."""

import importlib.util
from pathlib import Path

from lib.errors import BadInput
from lib.results import check_out


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
    if config.sweep + config.pack + (config.peer != "none") > 1:
        raise BadInput("only one of --sweep, --pack and --peer can be given")
    if config.peer == "hf":
        if config.checkpointing not in ("none", "full") or config.optimizer != "adamw":
            given = f"--checkpointing {config.checkpointing} --optimizer {config.optimizer}"
            known = "which knows none or full, and adamw"
            raise BadInput(f"{given} does not go with --peer hf, {known}")
        if importlib.util.find_spec("transformers") is None:
            raise BadInput("--peer hf needs the package transformers, which is not installed")
