"""A model's weights by name and shape: Hugging Face's names for them, and whether files hold what a
config asks for."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lib.errors import BadInput
from lib.variants import variant_of

HF_NAMES = {  # this project's name of a module -> Hugging Face's
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}

Named = Iterator[tuple[str, Tensor]]


def translate(name: str, table: dict[str, str]) -> str:
    """`blocks.3.attention.out.weight` -> `model.layers.3.self_attn.o_proj.weight`, or back with the table reversed."""
    for ours, theirs in table.items():
        if name == f"{ours}.weight":
            return f"{theirs}.weight"
        if name.startswith(f"{ours}.") and name.split(".")[-1] == "weight":
            number, rest = name.removeprefix(f"{ours}.").split(".", 1)
            if number.isdigit():
                return f"{theirs}.{number}.{translate(rest, table)}"
    return name


def block_shapes(config) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's weights by name, in llama2.c's order."""
    dim, ffn_dim = config.dim, config.ffn_dim
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention_norm": (dim,), "attention.query": (q_dim, dim), "attention.key": (kv_dim, dim),
        "attention.value": (kv_dim, dim), "attention.out": (dim, q_dim), "feed_forward_norm": (dim,),
        "feed_forward.gate": (ffn_dim, dim), "feed_forward.down": (dim, ffn_dim),
        "feed_forward.up": (ffn_dim, dim),
    }  # fmt: skip


def shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every weight of a model."""
    if variant_of(type(config)):
        with torch.device("meta"):
            yield from ((name, tuple(weight.shape)) for name, weight in config.build().named_parameters())
        return
    yield "embedding.weight", (config.vocab_size, config.dim)
    yield "norm.weight", (config.dim,)
    if not config.tie_embeddings:
        yield "unembedding.weight", (config.vocab_size, config.dim)
    for layer in range(config.num_layers):
        for name, shape in block_shapes(config).items():
            yield f"blocks.{layer}.{name}.weight", shape


def check_shapes(config, found: dict[str, tuple[int, ...]], path: Path):
    """Raise ValueError naming the tensor where a config and the files at path differ.

    Done before anything is allocated: a config may ask for a million layers.
    """
    # of one more than there are, one is missing
    expected = dict(islice(shapes(config), len(found) + 1))
    for name, shape in found.items():
        if name not in expected and len(expected) <= len(found):
            raise BadInput(f"{path}: tensor {name} {shape} has no place in this model")
        if expected.get(name, shape) != shape:
            raise BadInput(f"{path}: tensor {name} should be {expected[name]} and is {shape}")
    for name in expected:
        if name not in found:
            raise BadInput(f"{path}: tensor {name} {expected[name]} is missing")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity.

    Either is among the extremes of a tensor, which are found in less time than copying it takes.
    """
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_finite(tensor: Tensor, name: str, path: Path):
    """Raise ValueError for NaN and infinity."""
    if not is_finite(tensor):
        raise BadInput(f"{path}: tensor {name} holds NaN or infinity, which no model can use")


@contextlib.contextmanager
def readable(path: Path):
    """Turn whatever a damaged file makes its reader raise into one ValueError."""
    try:
        yield
    except BaseException as error:  # the exceptions of sharded checkpoints are no Exceptions
        if isinstance(error, (BadInput, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)):
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0 if isinstance(error, Exception) else -1]  # the latter end with their cause
        raise BadInput(f"{path} cannot be read ({type(error).__name__}: {reason})") from error
