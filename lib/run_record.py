"""What a run writes down of itself when it begins, run.json, and the comparison when it goes on.

What is called `data` here is a data.Mixture, a `config` the flags of train.py, a `shape` a
model.ModelConfig.
"""

import dataclasses
import functools
import json
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lib import variant_flags, variants
from lib.checkpoints import checkpoint_folder, has_checkpoint
from lib.cli import git_commit
from lib.errors import BadInput
from lib.files import write_whole
from lib.peft import adapter_settings
from lib.planning import count_parameters
from lib.runs import is_record, read_run
from lib.tokenizer import Tokenizer
from lib.train_flags import MAY_CHANGE_ON_RESUME
from lib.weights import fingerprint
from lib.world import device_name, from_first_rank, on_first_rank


def choose_run(config, config_class: type) -> dict | None:
    """The record of the run that config continues, None for a new one. Raises ValueError where the two differ."""
    folder = Path(config.out)
    # not begun; run.json may be that of a start that failed
    if not has_checkpoint(folder) and not config.resume:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        ours = "run.json" in names and is_record(folder / "run.json")
        if not ours and any(not name.endswith(".tmp") for name in names):
            raise BadInput(f"--out {folder} holds other files; choose another folder")
        return None
    if config.resume and folder != Path(config.resume):
        raise BadInput(f"--out {folder} does not go with --resume {config.resume}, which is the run's folder")
    record = read_run(folder, config=type(config), model=config_class)
    for name, theirs in record["config"].items():
        mine = getattr(config, name)
        if name not in MAY_CHANGE_ON_RESUME and mine != theirs and not (name == "dtype" and mine == "auto"):
            flag = "--resume" if config.resume else "--out"
            raise BadInput(f"{flag} {folder} holds a run with --{name} {theirs}, not {mine}; choose another --out")
    return record


def describe_run(config, shape, probed: list[float], data, device: torch.device) -> dict:
    """run.json: everything needed to know later what was run.

    probed is the probe of the code (lib/probe.py).
    """
    first, known = "", ""
    if config.init_from:
        first = str(checkpoint_folder(Path(config.init_from)).resolve())
    if first and data.kind == "preference":
        known = from_first_rank(functools.partial(fingerprint, first, type(shape)))
    record = {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(shape),
        "parameters": count_parameters(shape),
        "probe": probed,
        "init_from": first,
        "init_sha256": known,
        "dataset": describe_data([part.meta for part in data.parts], data.weights),
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(device),
        "processes": dist.get_world_size(),
    }
    record |= variant_flags.describe(config, type(shape))
    if config.lora_rank:
        record["adapter"] = describe_adapter(config, type(shape))
    return record


def describe_adapter(config, config_class: type) -> dict:
    """The adapter_config.json of every checkpoint, by which the base model is found again."""
    targets = config.lora_targets.split(",")
    numbers = (config.lora_rank, config.lora_alpha, targets, config.lora_dropout)
    settings = adapter_settings(config.init_from, *numbers)
    known = from_first_rank(functools.partial(fingerprint, config.init_from, config_class))
    return settings | {"base_sha256": known, "quantize": config.quantize}


def describe_data(metas: list[dict], shares: list[float]) -> list[dict]:
    """What makes up the data; sample.py finds the template of a chat here."""
    names = ("tokenizer", "splits", "template")
    return [
        {"share": share} | {name: meta[name] for name in names if name in meta}
        for share, meta in zip(shares, metas)
    ]


def prepare_folder(config, shape, record: dict, data):
    """Write a new run's record, tokenizer and variant. Raises OSError on all processes where there is no room."""

    def write():
        folder, tokenizer = Path(config.out), Tokenizer(data.folders[0])
        begun = has_checkpoint(folder)
        if not begun:
            write_whole(folder / "run.json", json.dumps(record, indent=2))
            (folder / variants.FILE).unlink(missing_ok=True)  # of a start that failed
            variants.write(type(shape), folder)
        # a full disk would leave half of one that was whole
        if not begun or not (folder / tokenizer.file).exists():
            tokenizer.save(folder)

    on_first_rank(write)
