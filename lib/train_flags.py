"""The flags of a training run beside those in train.py: which there are, which go together, and which may change
when a run is continued.
"""

import math
import re
from dataclasses import dataclass

from lib import (
    checkpointing,
    gpus,
    guard,
    kernels,
    lora,
    objectives,
    report,
    saving,
    training_samples,
    variant_flags,
    world,
)
from lib.errors import BadInput
from lib.gpus import GPUS
from lib.lora import TARGETS
from lib.planning import in_steps


@dataclass
class Begin:
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


@dataclass
class Flags(
    gpus.Flags,
    world.Flags,
    checkpointing.Flags,
    saving.Flags,
    report.Flags,
    training_samples.Flags,
    guard.Flags,
    objectives.Flags,
    kernels.Flags,
    lora.Flags,
    variant_flags.Flags,
    Begin,
):
    """Those of every file of lib that a run works with."""


# Flags that may differ when a run is continued: they change how its results are computed, saved or told, and but for
# rounding not what they are. What is in --data is compared by its record, not by the name of its folder.
MAY_CHANGE_ON_RESUME = set(
    """resume out data micro_batch stop_at log_every eval_every save_every keep sample sample_every wandb compile
    checkpointing shard_over reshard_after_forward deterministic keep_every max_bad_steps reduce_each
    plan draw gpus gpu anyway variant trust_variant attention""".split()
)


def check_flags(config, num_processes: int):
    """Raise ValueError for a flag out of range; the message names the flag, its value and the bound."""
    shape = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale", "lora_rank")
    terms = ("weight_decay", "neftune", "z_loss", "sample_every")
    for name in ("epochs", "micro_batch", "stop_at", "keep_every", "shard_over", "warmup", *terms, *shape):
        if not 0 <= getattr(config, name) < math.inf:
            raise BadInput(f"--{name} {getattr(config, name)} must be a number that is not negative")
    lengths = in_steps(config, 1.0)  # how long an epoch is, the data will tell
    every = ("log_every", "eval_every", "save_every")
    finite = ("learning_rate", "lora_alpha", "dpo_beta")
    positive = ("keep", *finite, "grad_clip", "max_bad_steps", "spike", "gpus")
    for name in ("seq_len", "steps", "batch_size", *every, *positive):
        if not getattr(lengths, name) > 0:
            raise BadInput(f"--{name} {getattr(config, name)} must be above 0")
        if name in finite and getattr(config, name) == math.inf:
            raise BadInput(f"--{name} {getattr(config, name)} must be a finite number")
    if config.epochs and config.steps != type(config).steps:
        raise BadInput(f"--steps {config.steps} does not go with --epochs {config.epochs}")
    for name in ("final_lr", "decay", "label_smoothing", "beta1", "beta2", "lora_dropout"):
        if not 0 <= getattr(config, name) <= (0.999999 if name.startswith(("beta", "lora")) else 1):
            raise BadInput(f"--{name} {getattr(config, name)} must lie between 0 and 1")
    if not 0 <= config.seed < 2**63:
        raise BadInput(f"--seed {config.seed} must lie between 0 and 2^63")
    if config.eval_tokens < config.seq_len:
        raise BadInput(f"--eval_tokens {config.eval_tokens} is less than one window of --seq_len {config.seq_len}")
    if config.batch_size % num_processes:
        raise BadInput(f"--batch_size {config.batch_size} must be a multiple of the {num_processes} processes")
    share = config.batch_size // num_processes
    if config.micro_batch and share % config.micro_batch:
        raise BadInput(f"--micro_batch {config.micro_batch} must divide --batch_size / processes = {share}")
    if config.shard_over and num_processes % config.shard_over:
        raise BadInput(f"--shard_over {config.shard_over} must divide the {num_processes} processes")
    mode = config.checkpointing
    if mode not in ("none", "selective", "full") and not re.fullmatch("0*[1-9][0-9]{0,5}", mode):
        raise BadInput(f"--checkpointing {mode} is not none, selective, full or a number of blocks")
    unknown = [name for name in config.lora_targets.split(",") if name not in TARGETS]
    if unknown:
        raise BadInput(f"--lora_targets {config.lora_targets}: {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    if config.quantize != "none" and not config.lora_rank:
        raise BadInput(f"--quantize {config.quantize} needs --lora_rank, for what is quantised cannot be trained")
    if config.lora_dropout and not config.lora_rank:
        raise BadInput(f"--lora_dropout {config.lora_dropout} needs --lora_rank, for it is of adapters alone")
    if config.lora_rank and mode == "selective":
        raise BadInput("--checkpointing selective does not go with --lora_rank; none, full and numbers do")
    if config.gpu not in GPUS:
        raise BadInput(f"--gpu {config.gpu} is not one of {', '.join(GPUS)}")
