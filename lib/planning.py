"""What a run comes to: steps, parameters, floating-point operations, hours, and memory in words."""

import dataclasses
import math
from pathlib import Path

from torch import nn

from lib.errors import BadInput
from lib.forecast import checkpoint_bytes, forecast
from lib.gpus import GPUS
from lib.meta import read_meta
from lib.naming import shapes
from lib.order import mixture_weights
from lib.variants import variant_of

GIB = 2**30
RESERVE = 2.0  # GiB for CUDA, NCCL and gaps in the allocator
PLAN = """\
{name}: {parameters:,} parameters on {gpus}, \
{rows} × {seq_len} tokens at a time, checkpointing {mode}
GiB a GPU: {parts}
together {need:.1f} of {memory} GiB: {verdict} ({reserve:.0f} GiB are kept in reserve)
about {speed:,.0f} tokens/s a GPU if {efficiency:.0%} of its {peak:.0f} TFLOP/s are reached, \
{hours:,.1f} hours for {steps:,} steps of {length} ({tokens:,} tokens)
disk: {disk:,.1f} GB a checkpoint, the first before step 1, up to {checkpoints} at a time"""
WITHOUT_BF16 = """
{gpu} has no bf16: planned for --dtype fp16, to be given to the run as well, where auto is fp32"""


def in_steps(config, epoch: float):
    """The same run with all its lengths in steps, rounded up; an epoch has `epoch` of them.

    So the last step of --epochs takes what it lacks from the next epoch. Raises ValueError for a
    length that it cannot read.
    """
    lengths = {}
    for name in ("eval_every", "save_every"):
        value = str(getattr(config, name))
        try:
            if value.endswith("epoch"):
                count = float(value.removesuffix("epoch")) * epoch
            else:
                count = int(value)
            lengths[name] = math.ceil(round(count, 6))
        except (ValueError, OverflowError):
            problem = "is neither a number of steps nor one of epochs (0.5epoch)"
            raise BadInput(f"--{name} {value} {problem}") from None
    if config.epochs:
        lengths["steps"] = math.ceil(round(config.epochs * epoch, 6))
    return dataclasses.replace(config, **lengths)


def count_parameters(shape) -> int:
    """Parameters of a model of this shape (a model.ModelConfig)."""
    if variant_of(type(shape)):
        return sum(math.prod(size) for _, size in shapes(shape))
    dim, heads = shape.dim, shape.num_heads + shape.num_kv_heads
    attention = 2 * dim * heads * shape.head_dim  # query and out; key and value
    feed_forward = 3 * dim * shape.ffn_dim
    norms = 2 * dim
    block = attention + feed_forward + norms
    embedding = shape.vocab_size * dim
    ends = embedding if shape.tie_embeddings else 2 * embedding
    return ends + shape.num_layers * block + dim


def flops_per_token(shape, seq_len: int, frozen: bool = False) -> float:
    """6 N + 12 layers · width · T: a forward and a backward pass (PaLM, appendix B).

    What is computed again does not count. Frozen weights need no gradients, a third of 6 N; what
    adapters cost in their place does not count either.
    """
    each = 4 if frozen else 6
    width = shape.num_heads * shape.head_dim
    return each * count_parameters(shape) + 12 * shape.num_layers * width * seq_len


def flops_of_a_step(shape, config) -> float:
    """Of all processes together."""
    each = flops_per_token(shape, config.seq_len, config.lora_rank > 0)
    return each * config.batch_size * config.seq_len


def describe(parts: dict[str, int]) -> str:
    """A forecast of bytes in words, for the first lines of a run."""
    most = ", ".join(f"{name} {num_bytes / GIB:.2g}" for name, num_bytes in parts.items())
    total = sum(parts.values()) / GIB
    return f"forecast: {total:.2g} GiB in each process at the peak of a step ({most})"


def with_its_dtype(config, gpu) -> tuple:
    """A run's flags as they are planned for this GPU, and what to say of it: auto is fp16 where there is no bf16."""
    if gpu.bf16 or config.dtype not in ("auto", "bf16"):
        return config, ""
    if config.dtype == "bf16":
        problem = f"does not go with --gpu {config.gpu}, which has no bf16; fp16 does"
        raise BadInput(f"--dtype bf16 {problem}")
    return dataclasses.replace(config, dtype="fp16"), WITHOUT_BF16.format(gpu=config.gpu)


def plan(model: nn.Module, config, data=None) -> str:
    """What a run would need on --gpus of --gpu: memory by part, whether it fits, speed and time.

    data is the Mixture whose epochs are counted, where --epochs is given; nothing is run. Raises
    ValueError for bf16 on a GPU that has none.
    """
    length = f"{config.batch_size} × {config.seq_len}"
    if data:
        config = in_steps(config, len(data) / config.batch_size)
        length += f", {config.epochs:g} epochs of {len(data):,} sequences"
    gpu, compiled = GPUS[config.gpu], config.compile != "off"
    config, note = with_its_dtype(config, gpu)
    parts = forecast(model, config, config.gpus, compiled, has_pairs(config.data))
    need = sum(parts.values()) / GIB
    verdict = "fits" if need + RESERVE <= gpu.memory else "does not fit"
    tokens = config.steps * config.batch_size * config.seq_len
    speed = gpu.efficiency * gpu.peak / flops_with_recomputation(model.config, config)
    hours = tokens / (speed * config.gpus) / 3600
    for_good = config.steps // config.keep_every if config.keep_every else 0
    facts = {
        "name": config.init_from or config.size,
        "parameters": count_parameters(model.config),
        "gpus": f"{config.gpus} × {config.gpu}",
        "rows": config.micro_batch or config.batch_size // config.gpus,
        "seq_len": config.seq_len,
        "mode": config.checkpointing,
        "parts": ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items()),
        "need": need,
        "memory": gpu.memory,
        "verdict": verdict,
        "reserve": RESERVE,
        "speed": speed,
        "efficiency": gpu.efficiency,
        "peak": gpu.peak / 1e12,
        "hours": hours,
        "steps": config.steps,
        "length": length,
        "tokens": tokens,
        "disk": checkpoint_bytes(model, config) / 1e9,
        "checkpoints": config.keep + for_good + 2,  # the best, and one that is being written
    }
    return PLAN.format(**facts) + note


def has_pairs(sources: tuple[str, ...]) -> bool:
    """Whether --data are preference pairs; data that are not made yet are taken for text."""
    folders, _ = mixture_weights(sources)
    made = [folder for folder in folders if (Path(folder) / "meta.json").exists()]
    return any(read_meta(folder).get("kind") == "preference" for folder in made)


def flops_with_recomputation(shape, config) -> float:
    """Of a token, with what --checkpointing computes again: of a forward pass, a third of all."""
    shares = {"none": 0.0, "selective": 1 / 2, "full": 1.0}
    share = shares.get(config.checkpointing)
    if share is None:
        share = 1 / int(config.checkpointing)
    frozen = config.lora_rank > 0
    again = share / 3 * flops_per_token(shape, config.seq_len)
    return flops_per_token(shape, config.seq_len, frozen) + again
