"""How a run begins: its flags checked, its folder and record made or found again, its data as they were."""

import dataclasses
import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lib.checkpoints import checkpoint_folder, has_checkpoint
from lib.cli import ROOT, git_commit
from lib.datasets import changed_file
from lib.files import write_whole
from lib.forecast import GPUS
from lib.lora import TARGETS
from lib.meta import read_meta
from lib.peft import adapter_settings
from lib.runs import is_record, read_run
from lib.tokenizer import Tokenizer
from lib.weights import fingerprint, is_known
from lib.world import device_name, from_first_rank


@dataclass
class Flags:
    """The flags of a run's beginning, and of a shape other than --size."""

    resume: str = ""                    # folder of a run to continue; its own flags are taken
    anyway: bool = False                # also go on with a run of code that computes something else than this
    # shape
    dim: int = 0                        # width; 0 here and in the next four takes the number of --size
    num_layers: int = 0                 # blocks
    num_heads: int = 0                  # query heads
    num_kv_heads: int = 0               # key/value heads; with --num_heads given, as many
    ffn_dim: int = 0                    # width of the feed-forward layers
    rope_scale: float = 0.0             # position interpolation; 0 keeps the model's
    # length
    epochs: float = 0.0                 # instead of --steps: passes over the data, rounded up to a step
    stop_at: int = 0                    # leave after this step with a checkpoint, to be resumed; 0 is never


# Flags that may differ when a run is continued: they change how its results are computed, saved or told, and but for
# rounding not what they are. What is in --data is compared by its record, not by the name of its folder.
MAY_CHANGE_ON_RESUME = set(
    """resume out data micro_batch stop_at log_every eval_every save_every keep sample wandb compile checkpointing
    shard_over reshard_after_forward deterministic keep_every max_bad_steps reduce_each plan gpus gpu anyway""".split()
)


def in_steps(config, epoch: float):
    """The same run with all its lengths in steps, rounded up; an epoch has `epoch` of them.

    So the last step of --epochs takes what it lacks from the next epoch. Raises ValueError for a length it cannot read.
    """
    lengths = {}
    for name in ("eval_every", "save_every"):
        value = str(getattr(config, name))
        try:
            count = float(value.removesuffix("epoch")) * epoch if value.endswith("epoch") else int(value)
            lengths[name] = math.ceil(round(count, 6))
        except (ValueError, OverflowError):
            raise ValueError(f"--{name} {value} is neither a number of steps nor one of epochs (0.5epoch)") from None
    if config.epochs:
        lengths["steps"] = math.ceil(round(config.epochs * epoch, 6))
    return dataclasses.replace(config, **lengths)


def check(config, world: int):
    """Raise ValueError for a flag out of range; the message names the flag, its value and the bound."""
    shape = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale", "lora_rank")
    terms = ("weight_decay", "neftune", "z_loss")
    for name in ("epochs", "micro_batch", "stop_at", "keep_every", "shard_over", "warmup", *terms, *shape):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name} {getattr(config, name)} must be a number that is not negative")
    lengths = in_steps(config, 1.0)  # how long an epoch is, the data will tell
    every = ("log_every", "eval_every", "save_every")
    finite = ("learning_rate", "lora_alpha", "dpo_beta")
    positive = ("keep", *finite, "grad_clip", "max_bad_steps", "spike", "gpus")
    for name in ("seq_len", "steps", "batch_size", *every, *positive):
        if not getattr(lengths, name) > 0:
            raise ValueError(f"--{name} {getattr(config, name)} must be above 0")
        if name in finite and getattr(config, name) == math.inf:
            raise ValueError(f"--{name} {getattr(config, name)} must be a finite number")
    if config.epochs and config.steps != type(config).steps:
        raise ValueError(f"--steps {config.steps} does not go with --epochs {config.epochs}")
    for name in ("final_lr", "decay", "label_smoothing", "beta1", "beta2"):
        if not 0 <= getattr(config, name) <= (0.999999 if name.startswith("beta") else 1):
            raise ValueError(f"--{name} {getattr(config, name)} must lie between 0 and 1")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed} must lie between 0 and 2^63")
    if config.eval_tokens < config.seq_len:
        raise ValueError(f"--eval_tokens {config.eval_tokens} is less than one window of --seq_len {config.seq_len}")
    if config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} must be a multiple of the {world} processes")
    share = config.batch_size // world
    if config.micro_batch and share % config.micro_batch:
        raise ValueError(f"--micro_batch {config.micro_batch} must divide --batch_size / processes = {share}")
    if config.shard_over and world % config.shard_over:
        raise ValueError(f"--shard_over {config.shard_over} must divide the {world} processes")
    mode = config.checkpointing
    if mode not in ("none", "selective", "full") and not (mode.isdecimal() and int(mode)):
        raise ValueError(f"--checkpointing {mode} is not none, selective, full or a number of blocks")
    unknown = [name for name in config.lora_targets.split(",") if name not in TARGETS]
    if unknown:
        raise ValueError(f"--lora_targets {config.lora_targets}: {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    if config.quantize != "none" and not config.lora_rank:
        raise ValueError(f"--quantize {config.quantize} needs --lora_rank, for what is quantised cannot be trained")
    if config.lora_rank and mode == "selective":
        raise ValueError("--checkpointing selective does not go with --lora_rank; none, full and numbers do")
    if config.gpu not in GPUS:
        raise ValueError(f"--gpu {config.gpu} is not one of {', '.join(GPUS)}")


def choose_run(config, config_class: type) -> dict | None:
    """The record of the run that config continues, None for a new one. Raises ValueError where the two differ."""
    folder = Path(config.out)
    # not begun; run.json may be that of a start that failed
    if not has_checkpoint(folder) and not config.resume:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        ours = "run.json" in names and is_record(folder / "run.json")
        if not ours and any(not name.endswith(".tmp") for name in names):
            raise ValueError(f"--out {folder} holds other files; choose another folder")
        return None
    if config.resume and folder != Path(config.resume):
        raise ValueError(f"--out {folder} does not go with --resume {config.resume}, which is the run's folder")
    record = read_run(folder, config=type(config), model=config_class)
    for name, theirs in record["config"].items():
        mine = getattr(config, name)
        if name not in MAY_CHANGE_ON_RESUME and mine != theirs and not (name == "dtype" and mine == "auto"):
            flag = "--resume" if config.resume else "--out"
            raise ValueError(f"{flag} {folder} holds a run with --{name} {theirs}, not {mine}; choose another --out")
    return record


def resumed(first):
    """The flags of the run that --resume names, as the defaults of those typed beside it. Raises ValueError."""
    kind = type(first)
    if not first.resume:
        return kind()
    saved = kind(**read_run(Path(first.resume), config=kind)["config"])
    return dataclasses.replace(saved, resume=first.resume, out=first.resume, stop_at=0, anyway=False)


def describe_run(config, shape, probed: list[float], metas: list[dict], shares: list[float], device) -> dict:
    """run.json: everything needed to know later what was run. probed is the probe of the code (lib/probe.py)."""
    first, known = "", ""
    if config.init_from:
        first = str(checkpoint_folder(Path(config.init_from)).resolve())
    if first and any(meta.get("kind") == "preference" for meta in metas):
        known = from_first_rank(functools.partial(fingerprint, first, type(shape)))
    record = {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(shape),
        "probe": probed,
        "init_from": first,
        "init_sha256": known,
        "dataset": describe_data(metas, shares),
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(device),
        "processes": dist.get_world_size(),
    }
    if config.lora_rank:
        record["adapter"] = describe_adapter(config, type(shape))
    return record


def describe_adapter(config, config_class: type) -> dict:
    """The adapter_config.json of every checkpoint, by which the base model is found again."""
    targets = config.lora_targets.split(",")
    settings = adapter_settings(config.init_from, config.lora_rank, config.lora_alpha, targets)
    known = from_first_rank(functools.partial(fingerprint, config.init_from, config_class))
    return settings | {"base_sha256": known, "quantize": config.quantize}


def describe_data(metas: list[dict], shares: list[float]) -> list[dict]:
    """What makes up the data; sample.py finds the template of a chat here."""
    names = ("tokenizer", "splits", "template")
    return [
        {"share": share} | {name: meta[name] for name in names if name in meta}
        for share, meta in zip(shares, metas)
    ]


def prepare_default(folder: str):
    """Make the dataset that a run without flags trains on, by the command that anybody could type."""
    command = [sys.executable, str(ROOT / "data.py"), "--source", "stdlib", "--out", folder]
    print(f"first the data: python data.py --source stdlib --out {folder}", flush=True)
    if subprocess.run(command).returncode:
        raise ValueError(f"--data {folder} could not be prepared")


def show_sample(config):
    """Let sample.py continue --sample with the run's model."""
    words = ["sample.py", "--model", config.out, f"--prompt={config.sample}", "--max_new_tokens", "200"]
    if config.anyway:
        words.append("--anyway")
    print(f"\npython {shlex.join(words)}\n", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sample is drawn by a process of its own
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]])


def check_reference(record: dict, folder: Path, config_class: type) -> str:
    """The model that the run in folder began with and does not move away from; ValueError if it is another by now."""
    first = record["init_from"]
    if first and not is_known(first, record["init_sha256"], config_class):
        raise ValueError(f"{first} holds other weights than when {folder} began")
    return first


def check_data(config, record: dict | None, folders: list[str], shares: list[float]):
    """Raise ValueError where a run goes on with other data than it began with."""
    metas = [read_meta(folder) for folder in folders]
    if record and record["dataset"] != describe_data(metas, shares):
        raise ValueError(f"--data {' '.join(config.data)} is another dataset than when {config.out} began")


def check_terms(config, kind: str):
    """Raise ValueError for terms of the loss that pairs do not have."""
    for name in ("neftune", "label_smoothing", "z_loss"):
        if kind == "preference" and getattr(config, name):
            raise ValueError(f"--{name} {getattr(config, name)} does not go with preference pairs")


def check_files(sources: list[tuple[Path, dict]]):
    """Raise ValueError on all ranks where a file of these datasets, each a folder and its meta.json, has changed.

    All files are read once, also those for validation; the ranks of one machine share the work.
    """
    place = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, changed_file(sources, place, count))
    if any(problems):
        raise ValueError(max(problems))


def prepare_folder(folder: Path, record: dict, tokenizer: Tokenizer):
    """Write a new run's record and tokenizer."""
    begun = has_checkpoint(folder)
    if not begun:
        write_whole(folder / "run.json", json.dumps(record, indent=2))
    if not begun or not (folder / tokenizer.file).exists():  # a full disk would leave half of one that was whole
        tokenizer.save(folder)
