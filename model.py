"""LLaMA-2, the whole model in one file (Touvron et al. 2023, arXiv:2307.09288).

Comments give tensor shapes in these letters:

    B  sequences in the batch    H  query heads               D  model width
    T  tokens in a sequence      G  key/value heads, G <= H   F  feed-forward width
    V  vocabulary                K  width of one head         S  slots of the key/value cache
    N  documents in packed rows

Read it upwards from `Transformer.forward`, or downwards from the leaves. The second half of the file reads
and writes weights: Hugging Face folders, Meta's release, llama2.c's .bin files and this project's checkpoints.
"""

import contextlib
import functools
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import probe
from lib.checkpoints import check_hashes, last_checkpoint
from lib.configs import HuggingFace, read_adapter_config, read_params
from lib.disk import writing
from lib.files import file_in, new_folder
from lib.identity import first_rows_sha256, weights_sha256
from lib.kernels import IGNORE, CrossEntropy, Documents, attend_within
from lib.lora import TARGETS, adapters, from_nf4, to_nf4
from lib.records import checked, read_json
from lib.rows import fill_normal, local_rows


@dataclass(frozen=True)
class ModelConfig:
    dim: int                       # D, a multiple of num_heads
    num_layers: int
    num_heads: int                 # H
    num_kv_heads: int              # G: equal to H is multi-head, 1 is multi-query, between is grouped-query attention
    ffn_dim: int                   # F
    vocab_size: int = 32_000       # V
    max_seq_len: int = 4096        # tokens; the context window
    rope_theta: float = 10_000.0   # base of the rotary wavelengths
    rope_scale: float = 1.0        # position interpolation (Chen et al. 2023): positions are divided by this
    norm_eps: float = 1e-5
    tie_embeddings: bool = False   # one matrix for the embedding and the output

    def __post_init__(self):
        for field in fields(self):
            if not getattr(self, field.name) > 0 and field.type is not bool:
                raise ValueError(f"{field.name} {getattr(self, field.name)} must be above 0")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} must be a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


SIZES = {
    # LLaMA-2
    "7B": ModelConfig(4096, 32, 32, 32, 11008),
    "13B": ModelConfig(5120, 40, 40, 40, 13824),
    "70B": ModelConfig(8192, 80, 64, 8, 28672),
    # LLaMA-1, OpenLLaMA, TinyLlama
    "33B": ModelConfig(6656, 60, 52, 52, 17920, max_seq_len=2048, norm_eps=1e-6),
    "65B": ModelConfig(8192, 80, 64, 64, 22016, max_seq_len=2048),
    "3B": ModelConfig(3200, 26, 32, 32, 8640, max_seq_len=2048, norm_eps=1e-6),
    "1.1B": ModelConfig(2048, 22, 32, 4, 5632, max_seq_len=2048),
    # tinyllamas, the models of llama2.c
    "110M": ModelConfig(768, 12, 12, 12, 2048, max_seq_len=1024, tie_embeddings=True),
    "42M": ModelConfig(512, 8, 8, 8, 1376, max_seq_len=1024, tie_embeddings=True),
    "15M": ModelConfig(288, 6, 6, 6, 768, max_seq_len=256, tie_embeddings=True),
    "260K": ModelConfig(64, 5, 8, 4, 172, vocab_size=512, max_seq_len=512, tie_embeddings=True),
    # for two laptop cores
    "laptop": ModelConfig(128, 4, 4, 4, 352, vocab_size=4096, max_seq_len=256, tie_embeddings=True),
}


class RMSNorm(nn.Module):
    """Divide each token by its root mean square, then scale every channel by a learned weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # a mean of squares needs more than the 8 bits of bf16
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x)


Rope = tuple[Tensor, Tensor]  # cosines and sines, see rope_table


def rope_table(config: ModelConfig, positions: Tensor) -> Rope:
    """Cosine and sine of the angle of every channel pair at these positions (…, T): two fp32 tensors (…, T, K/2).

    Computed where it is used, never stored: a stored table is rounded by `model.to(torch.bfloat16)`, which
    leaves 769 distinct positions of 4,096, and is garbage after initialisation on the meta device.
    """
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_wavelength = 1.0 / (config.rope_theta ** (channel / config.head_dim)) / config.rope_scale
    angles = positions[..., None].float() * inverse_wavelength
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn channel pairs (i, i + K/2) of x (B, T, heads, K) by the angles of their positions.

    This is the order of Hugging Face folders; Meta's and llama2.c's files pair neighbours (see `_halves`).
    """
    cos, sin = (table.unsqueeze(-2) for table in rope)  # (…, T, 1, K/2)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class KVCache:
    """The keys and values of the tokens read so far; row b holds the tokens 0 … lengths[b] - 1 of sequence b.

    Pass it to `Transformer.forward` with the next chunk (B, T) of tokens, of any size. Rows may differ in
    length: pad a chunk on the right, then `trim` to the true lengths; what was padding is overwritten by the
    next chunk and until then no query can see it, because its position lies in the future.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, device=None, dtype: torch.dtype = torch.float32):
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)  # (layers, B, G, S, K)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0  # the largest of lengths, known to the host without waiting for the device

    def begin(self, num_tokens: int) -> Tensor:
        """Positions (B, T) of the next chunk; sets the mask that its attention uses."""
        if (need := self.longest + num_tokens) > self.keys.size(3):
            raise ValueError(f"{need} tokens do not fit in a cache of {self.keys.size(3)}")
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        slots = torch.arange(need, device=self.lengths.device)
        self.positions = positions
        self.mask = None  # is causal
        if self.longest:  # else it is added to the scores, (B, 1, T, S); as booleans every layer would convert it
            hidden = slots > positions[..., None]
            self.mask = torch.zeros_like(hidden, dtype=self.keys.dtype).masked_fill_(hidden, -math.inf)[:, None]
        return positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk's k and v (B, G, T, K); return those of all tokens so far (B, G, S, K), without gradient."""
        slots = self.positions[:, None, :, None].expand_as(k)
        filled = self.longest + k.size(2)
        return tuple(
            store[layer].scatter_(2, slots, new.detach().to(store.dtype))[:, :, :filled]
            for store, new in ((self.keys, k), (self.values, v))
        )

    def end(self, num_tokens: int):
        self.lengths += num_tokens
        self.longest += num_tokens

    def trim(self, lengths: list[int]):
        """Forget all but the first lengths[b] tokens of each row b."""
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What q (B, H, T, K) reads from k and v (B, G, S, K); without a mask each query from its own past.

    is_causal is right only where queries and keys start together; a filled cache brings its mask.
    """
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=grouped
    )


class Attention(nn.Module):
    """Causal self-attention, H query heads sharing G key/value heads."""

    attend = staticmethod(causal_attention)  # lib/kernels.py has one to be compiled on a CPU

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, kv_dim, bias=False)
        self.value = nn.Linear(config.dim, kv_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None, documents: Documents | None) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.key(x).unflatten(-1, (-1, self.head_dim))    # (B, T, G, K)
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        q, k = rotate(q, rope), rotate(k, rope)
        if documents is not None:                             # packed rows
            return self.out(attend_within(q, k, v, documents).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)             # (B, G, S, K)
            mask = cache.mask
        y = self.attend(q, k, v, mask)                        # (B, H, T, K)
        return self.out(y.transpose(1, 2).flatten(2))         # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: a SiLU gate multiplies the up-projection, then project back down (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: each half normalises its input and adds its output to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None, documents: Documents | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, documents)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Unembedding(nn.Linear):
    """Turns the residual stream (B, T, D) into logits, or into what is made of them."""

    cross_entropy = CrossEntropy()  # train.py sets one that is compiled, smoothed or regularised

    def forward(self, x: Tensor, targets: Tensor | None = None, each: bool = False) -> Tensor:
        """Logits (B, T, V); with targets the sum of their losses, with `each` their log-probabilities."""
        if targets is None:
            return super().forward(x)
        loss = self.cross_entropy.log_probs if each else self.cross_entropy
        return loss(x, self.weight, targets)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.unembedding = Unembedding(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0):
        """Normal(0, 0.02); the two matrices that write to the residual stream get 0.02 / sqrt(2 * layers).

        Any number of processes, each drawing the rows that it holds, makes the same model.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                local_rows(weight)[1].fill_(1)
            elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                fill_normal(weight, 0.02 / (2 * len(self.blocks)) ** 0.5, f"{seed} {name}")
            else:
                fill_normal(weight, 0.02, f"{seed} {name}")

    def hidden(
        self, tokens: Tensor, cache: KVCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        """The normalised residual stream (B, T, D), which `unembedding` turns into logits.

        Raises ValueError when the tokens do not fit in the context window or in the cache.
        """
        num_tokens = tokens.size(1)
        if num_tokens > self.config.max_seq_len:
            window = self.config.max_seq_len
            raise ValueError(f"{num_tokens} tokens exceed the context window of {window}")
        if documents is not None:
            positions = documents.positions
        elif cache is not None:
            positions = cache.begin(num_tokens)
        else:
            positions = torch.arange(num_tokens, device=tokens.device)
        rope = rope_table(self.config, positions)
        x = self.embedding(tokens)                            # (B, T, D)
        for block in self.blocks:
            x = block(x, rope, cache, documents)
        if cache is not None:
            cache.end(num_tokens)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """fp32 logits (B, T, V) of the token after each of tokens (B, T); with targets, nats a target.

        Targets (B, T) are the tokens one later; `IGNORE` marks those that do not count and cost
        nothing. No targets at all is a loss of 0.
        """
        if targets is None:
            return self.unembedding(self.hidden(tokens, cache)).float()
        return self.loss(tokens, targets) / max(1, int((targets != IGNORE).sum()))

    def loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Nats of all targets together; train.py divides by the targets of the whole step."""
        return self.unembedding(self.hidden(tokens, None, documents), targets)

    def log_probs(
        self, tokens: Tensor, targets: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """The log-probability of each target (B, T), 0 where there is none."""
        return self.unembedding(self.hidden(tokens, None, documents), targets, each=True)


# ---- weights on disk ----

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

META_NAMES = {  # the same for Meta's release; the number is the dimension that model parallelism splits
    "embedding": ("tok_embeddings", 1),
    "norm": ("norm", None),
    "unembedding": ("output", 0),
    "blocks": ("layers", None),
    "attention_norm": ("attention_norm", None),
    "attention.query": ("attention.wq", 0),
    "attention.key": ("attention.wk", 0),
    "attention.value": ("attention.wv", 0),
    "attention.out": ("attention.wo", 1),
    "feed_forward_norm": ("ffn_norm", None),
    "feed_forward.gate": ("feed_forward.w1", 0),
    "feed_forward.up": ("feed_forward.w3", 0),
    "feed_forward.down": ("feed_forward.w2", 1),
}

Named = Iterator[tuple[str, Tensor]]


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's weights by name, in llama2.c's order."""
    dim, ffn_dim, kv_dim = config.dim, config.ffn_dim, config.num_kv_heads * config.head_dim
    return {
        "attention_norm": (dim,), "attention.query": (dim, dim), "attention.key": (kv_dim, dim),
        "attention.value": (kv_dim, dim), "attention.out": (dim, dim), "feed_forward_norm": (dim,),
        "feed_forward.gate": (ffn_dim, dim), "feed_forward.down": (dim, ffn_dim),
        "feed_forward.up": (ffn_dim, dim),
    }  # fmt: skip


def shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every weight of a model."""
    yield "embedding.weight", (config.vocab_size, config.dim)
    yield "norm.weight", (config.dim,)
    if not config.tie_embeddings:
        yield "unembedding.weight", (config.vocab_size, config.dim)
    for layer in range(config.num_layers):
        for name, shape in block_shapes(config).items():
            yield f"blocks.{layer}.{name}.weight", shape


def check_shapes(config: ModelConfig, found: dict[str, tuple[int, ...]], path: Path):
    """Raise ValueError naming the tensor where a config and the files at path differ.

    Done before anything is allocated: a config may ask for a million layers.
    """
    # of one more than there are, one is missing
    expected = dict(islice(shapes(config), len(found) + 1))
    for name, shape in found.items():
        if name not in expected and len(expected) <= len(found):
            raise ValueError(f"{path}: tensor {name} {shape} has no place in this model")
        if expected.get(name, shape) != shape:
            raise ValueError(f"{path}: tensor {name} should be {expected[name]} and is {shape}")
    for name in expected:
        if name not in found:
            raise ValueError(f"{path}: tensor {name} {expected[name]} is missing")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity.

    Either is among the extremes of a tensor, which are found in less time than copying it takes.
    """
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_finite(tensor: Tensor, name: str, path: Path):
    """Raise ValueError for NaN and infinity."""
    if not is_finite(tensor):
        raise ValueError(f"{path}: tensor {name} holds NaN or infinity, which no model can use")


def _translate(name: str, table: dict[str, str]) -> str:
    """`blocks.3.attention.out.weight` -> `model.layers.3.self_attn.o_proj.weight`, or back with the table reversed."""
    for ours, theirs in table.items():
        if name == f"{ours}.weight":
            return f"{theirs}.weight"
        if name.startswith(f"{ours}.") and name.split(".")[-1] == "weight":
            number, rest = name.removeprefix(f"{ours}.").split(".", 1)
            if number.isdigit():
                return f"{theirs}.{number}.{_translate(rest, table)}"
    return name


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key matrix from neighbouring rotary pairs to pairs K/2 apart."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _read_hugging_face(folder: Path) -> tuple[ModelConfig, Named]:
    from safetensors import safe_open

    config = config_from_hugging_face(read_json(folder / "config.json"), folder)
    table = {theirs: ours for ours, theirs in HF_NAMES.items()}

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = checked(read_json(index, "weight_map")["weight_map"], dict[str, str], index)
        names = sorted(set(weight_map.values()))
    inside, found = [], {}
    for path in [file_in(folder, name) for name in names]:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                # older conversions store the rotary wavelengths, and some the output of a tied model twice
                if name.endswith("rotary_emb.inv_freq") or config.tie_embeddings and name == "lm_head.weight":
                    continue
                inside.append((path, name))
                found[_translate(name, table)] = tuple(file.get_slice(name).get_shape())
    check_shapes(config, found, folder)

    def tensors() -> Named:
        for path, name in inside:
            # opened anew, so that what was read does not stay mapped
            with safe_open(path, "pt") as file:
                yield _translate(name, table), file.get_tensor(name)

    return config, tensors()


def _read_meta(folder: Path) -> tuple[ModelConfig, Named]:
    """Meta's release: params.json and one consolidated.NN.pth for each model-parallel rank."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise ValueError(f"{folder} has params.json but no consolidated.*.pth")
    params = read_params(folder / "params.json")
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
    config = ModelConfig(
        dim=params["dim"],
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn_dim=sum(part["layers.0.feed_forward.w1.weight"].size(0) for part in parts),
        vocab_size=sum(part["output.weight"].size(0) for part in parts),
        rope_theta=params.get("rope_theta") or 10_000.0,
        norm_eps=params["norm_eps"],
    )
    names = {theirs: ours for ours, (theirs, _) in META_NAMES.items()}
    split_dims = dict(META_NAMES.values())

    def pieces_of(name: str) -> tuple[str, int | None, list[Tensor]]:
        words = name.split(".")
        kind = ".".join(words[2:-1] if name.startswith("layers.") else words[:-1])
        return kind, split_dims.get(kind), [part[name] for part in parts]

    found = {}
    for name in filter("rope.freqs".__ne__, parts[0]):
        _, dim, pieces = pieces_of(name)
        shape = list(pieces[0].shape)
        if dim is not None:
            shape[dim] = sum(piece.size(dim) for piece in pieces)
        found[_translate(name, names)] = tuple(shape)
    check_shapes(config, found, folder)

    def tensors() -> Named:
        for name in parts[0]:
            if name == "rope.freqs":
                continue
            kind, dim, pieces = pieces_of(name)
            whole = pieces[0] if dim is None else torch.cat(pieces, dim)
            if kind in ("attention.wq", "attention.wk"):
                whole = _halves(whole, config.num_heads if kind == "attention.wq" else config.num_kv_heads)
            yield _translate(name, names), whole

    return config, tensors()


def _read_llama2c(path: Path) -> tuple[ModelConfig, Named]:
    """llama2.c's version 0: seven int32 (a negative vocabulary means untied), then fp32 matrices, layers stacked."""
    with open(path, "rb") as file:
        dim, ffn_dim, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", file.read(28))
    try:
        config = ModelConfig(dim, layers, heads, kv_heads, ffn_dim, abs(vocab), seq_len, tie_embeddings=vocab > 0)
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c version 0 file ({error})") from None
    stacks, rope_pairs = block_shapes(config), config.head_dim // 2
    ends = [("norm.weight", (dim,)), ("", (2 * seq_len * rope_pairs,))]  # its rotary tables too
    ends += [] if config.tie_embeddings else [("unembedding.weight", (abs(vocab), dim))]
    of_layers = layers * sum(map(math.prod, stacks.values()))
    expected = abs(vocab) * dim + of_layers + sum(math.prod(shape) for _, shape in ends)
    expected, found = 28 + 4 * expected, path.stat().st_size
    if expected != found:
        raise ValueError(f"{path}: {found} bytes, but its header asks for {expected}; is it a llama2.c version 0 file?")
    layout = [("embedding.weight", (abs(vocab), dim))]
    for name, shape in stacks.items():
        layout += [(f"blocks.{i}.{name}.weight", shape) for i in range(layers)]
    layout += ends

    def tensors() -> Named:
        data, start = np.memmap(path, "<f4", "r", offset=28), 0
        for name, shape in layout:
            values = torch.from_numpy(data[start : start + int(np.prod(shape))].copy()).view(shape)
            start += values.numel()
            if name.endswith(("query.weight", "key.weight")):
                values = _halves(values, heads if "query" in name else kv_heads)
            if name:
                yield name, values

    return config, tensors()


def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> "Transformer":
    """The model at path, its weights converted to dtype one tensor at a time.

    path is a Hugging Face style folder, Meta's folder (params.json, consolidated.*.pth), a llama2.c .bin, or a
    run or checkpoint folder of train.py. Meta's params.json names no context window; LLaMA-2's 4,096 is taken.
    Raises ValueError naming the tensor, the expected and the found shape where a file does not fit its config, and
    for files that cannot be read at all. No file can run code.
    """
    model = _empty(read_config(path), device, dtype)
    load_weights(model, path)
    return model


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model at path, which is what `load` takes. Raises ValueError like it."""
    path = checkpoint_folder(Path(path))
    with readable(path):
        return _open(path)[0]


def load_weights(model: Transformer, path: str | Path):
    """Fill a model of the right shape from path, as `load` does, only the rows that this process holds."""
    path = checkpoint_folder(Path(path))
    with readable(path):
        _fill(model, _open(path)[1], path)


@contextlib.contextmanager
def readable(path: Path):
    """Turn whatever a damaged file makes its reader raise into one ValueError."""
    try:
        yield
    except BaseException as error:  # the exceptions of sharded checkpoints are no Exceptions
        if type(error) is ValueError or isinstance(error, (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)):
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0 if isinstance(error, Exception) else -1]  # the latter end with their cause
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {reason})") from error


def _open(path: Path) -> tuple[ModelConfig, Named]:
    """The shape of a model and its tensors, which come one at a time."""
    if path.is_file():
        return _read_llama2c(path)
    if (path / "adapter_config.json").exists():
        return _read_adapted(path)
    if (path / ".metadata").exists():
        return _read_run(path)
    if (path / "params.json").exists():
        return _read_meta(path)
    if (path / "config.json").exists() and any(path.glob("model*.safetensors*")):
        return _read_hugging_face(path)
    raise ValueError(f"{path}: no model here (looked for config.json with safetensors, params.json, a checkpoint)")


@torch.no_grad()
def _fill(model: Transformer, tensors: Named, path: Path):
    missing = dict(model.named_parameters())
    for name in adapters(model):
        del missing[name]
    for name, tensor in _quantized(model, tensors, path):
        if name not in missing:
            raise ValueError(f"{path}: tensor {name} {tuple(tensor.shape)} has no place in this model")
        target = missing.pop(name)
        if target.shape != tensor.shape:
            raise ValueError(f"{path}: tensor {name} should be {tuple(target.shape)} and is {tuple(tensor.shape)}")
        first, local = local_rows(target)
        here = tensor[first : first + len(local)]
        if here.is_floating_point():  # the codes of NF4 are none
            check_finite(here, name, path)
        local.copy_(here)
    if missing:
        name, target = next(iter(missing.items()))
        raise ValueError(f"{path}: tensor {name} {tuple(target.shape)} is missing")


def _quantized(model: Transformer, tensors: Named, path: Path) -> Named:
    """The tensors, but of matrices that the model keeps in NF4 the three parts; on its device, which is faster."""
    devices = {name: module.codes.device for name, module in model.named_modules() if getattr(module, "nf4", False)}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if module not in devices:
            yield name, tensor
        else:
            check_finite(tensor, name, path)
            yield from ((f"{module}.{part}", t) for part, t in to_nf4(tensor.to(devices[module])).items())


def _empty(config: ModelConfig, device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.unembedding.weight = model.embedding.weight
    return model


def checkpoint_folder(path: Path) -> Path:
    """The last complete checkpoint of a run folder; any other path unchanged. Raises ValueError if there is nothing."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not (path / "run.json").exists():
        return path
    return last_checkpoint(path)


def _read_run(folder: Path) -> tuple[ModelConfig, Named]:
    """A checkpoint of train.py that holds a whole model."""
    from lib.checkpoint_index import read_index

    config = config_from_hugging_face(read_json(folder / "config.json"), folder)
    entries = read_index(folder).state_dict_metadata
    weights = {name: entry for name, entry in entries.items() if name.startswith("model.")}
    found = {name.removeprefix("model."): tuple(entry.size) for name, entry in weights.items()}
    check_shapes(config, found, folder)
    return config, _read_checkpoint(folder)


def _read_checkpoint(folder: Path) -> Named:
    """The weights in a checkpoint of train.py, read a gigabyte at a time; its moments stay unread."""
    import torch.distributed.checkpoint as dcp

    from lib.checkpoint_index import Reader

    check_hashes(folder)
    reader = Reader(folder)
    entries = reader.index.state_dict_metadata
    names = [name for name in entries if name.startswith("model.")]
    while names:
        part, used = {}, 0
        while names and used < 2**30:
            name = names.pop(0)
            part[name] = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
            used += part[name].nbytes
        with warnings.catch_warnings(action="ignore"):  # that each process reads for itself, as it should
            dcp.load(part, storage_reader=reader, no_dist=True)
        for name, tensor in part.items():
            yield name.removeprefix("model."), tensor


class Adapter(NamedTuple):
    """What LoRA has learned: a checkpoint of train.py, or a folder as PEFT writes it."""

    base: Path       # the model that it changes
    settings: dict   # adapter_config.json
    tensors: dict[str, Tensor]  # by name, as blocks.0.attention.query.lora_A


def adapter_settings(base: str | Path, rank: int, alpha: float, targets: list[str]) -> dict:
    """What PEFT needs to know about an adapter: adapter_config.json."""
    names = [HF_NAMES[f"{TARGETS[target]}.{target}"].rpartition(".")[2] for target in targets]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint_folder(Path(base)).resolve()),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": names,
        "inference_mode": True,
    }


def fingerprint(path: str | Path, of: Callable[[Named], str] = weights_sha256) -> str:
    """The SHA-256 of all weights of the model at path, to know it again by, or what else `of` makes of its tensors.

    It is computed once as long as the files stay the same, for it reads all of them. Raises ValueError like `load`.
    """
    path = checkpoint_folder(Path(path))
    with readable(path):
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        states = ((file.name, file.stat()) for file in files)
        return _fingerprint(path.resolve(), of, tuple((name, s.st_size, s.st_mtime_ns) for name, s in states))


@functools.cache
def _fingerprint(path: Path, of: Callable[[Named], str], files: tuple) -> str:
    return of(_open(path)[1])


def is_known(path: str | Path, known: str) -> bool:
    """Whether the model at path has the weights that a run wrote down, or an older run: of its first rows alone."""
    return known == fingerprint(path) or known == fingerprint(path, first_rows_sha256)


def code_probe(config: ModelConfig) -> list[float]:
    """What this code computes for models of this kind, see lib/probe.py."""
    return probe.probe(Transformer, config, functools.partial(_translate, table=HF_NAMES))


def check_code(path: str | Path, anyway: bool):
    """Raise ValueError where path is a run or checkpoint that was trained by code that computes something else.

    With anyway that is only said, on stderr. Other models do not say by what code they were trained.
    """
    folder = checkpoint_folder(Path(path))
    if (folder / probe.FILE).exists():
        with readable(folder):
            config = config_from_hugging_face(read_json(folder / "config.json"), folder)
        probe.check(folder, code_probe(config), anyway)


def find_base(settings: dict, path: Path) -> Path:
    """The folder of the model that the adapter at path changes. Raises ValueError if it is gone or another one."""
    base = Path(settings["base_model_name_or_path"])
    where = f"{path}: its base model {base}"
    if not base.exists():
        raise ValueError(f"{where} is not there; base_model_name_or_path in its adapter_config.json says where it is")
    if (known := settings.get("base_sha256")) and not is_known(base, known):
        raise ValueError(f"{where} holds other weights than those it was trained on")
    return checkpoint_folder(base)


def read_adapter(path: str | Path) -> Adapter:
    """The adapter of a run or of a PEFT folder. Raises ValueError where there is none, and for what LoRA has not."""
    path = checkpoint_folder(Path(path))
    with readable(path):
        if not (path / "adapter_config.json").exists():
            raise ValueError(f"{path}: no adapter here (looked for adapter_config.json)")
        settings = read_adapter_config(path / "adapter_config.json")
        named = _read_checkpoint(path) if (path / ".metadata").exists() else _read_peft(path)
        tensors = dict(named)
        if not tensors:
            raise ValueError(f"{path}: an adapter without a tensor")
        for name, tensor in tensors.items():
            check_finite(tensor, name, path)
        return Adapter(find_base(settings, path), settings, tensors)


PEFT_PREFIX = "base_model.model."
OUR_SETTINGS = ("base_sha256", "quantize")  # in the adapter_config.json of a run; PEFT does not know them


def _read_peft(folder: Path) -> Named:
    from safetensors.torch import load_file

    table = {theirs: ours for ours, theirs in HF_NAMES.items()}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        yield f"{_translate(f'{module}.weight', table).removesuffix('.weight')}.{part}", tensor.float()


def _read_adapted(path: Path) -> tuple[ModelConfig, Named]:
    """The base model with the adapter at path merged into it: W + (alpha / rank) B A, where W is in NF4 if it was so
    in training."""
    base, settings, learned = read_adapter(path)
    config, tensors = _open(base)
    if (path / "config.json").exists():  # a run may have changed its context window
        own = config_from_hugging_face(read_json(path / "config.json"), path)
        window = dict(max_seq_len=config.max_seq_len, rope_scale=config.rope_scale)
        if replace(own, **window) != config:
            raise ValueError(f"{path}: config.json is of another model than the base, {base}")
        config = own
    in_nf4 = settings.get("quantize") == "nf4"

    def merged() -> Named:
        for name, tensor in tensors:
            check_finite(tensor, name, base)
            module = name.removesuffix(".weight")
            if in_nf4 and module.rpartition(".")[2] in TARGETS:
                tensor = from_nf4(**to_nf4(tensor), dtype=torch.float32)
            if f"{module}.lora_A" in learned:
                a, b = (learned.pop(f"{module}.{part}") for part in ("lora_A", "lora_B"))
                if (b.size(0), a.size(1)) != tensor.shape or not a.size(0) == b.size(1) == settings["r"]:
                    raise ValueError(f"{path}: {module}'s adapter {tuple(a.shape)} does not fit {tuple(tensor.shape)}")
                tensor = tensor.float() + settings["lora_alpha"] / settings["r"] * (b @ a)
            yield name, tensor
        if learned:
            raise ValueError(f"{path}: tensor {next(iter(learned))} has no place in this model")

    return config, merged()


def save_adapter(adapter: Adapter, folder: str | Path, tokenizer=None):
    """Write an adapter as PEFT does, in a folder with adapter_config.json and adapter_model.safetensors.

    Raises ValueError if the folder exists.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_folder(folder) as aside:
        tensors = {}
        for name, tensor in adapter.tensors.items():
            module, _, part = name.rpartition(".")
            theirs = _translate(f"{module}.weight", HF_NAMES).removesuffix("weight")
            tensors[f"{PEFT_PREFIX}{theirs}{part}.weight"] = tensor.contiguous()
        with writing(aside / "adapter_model.safetensors", SafetensorError):
            save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        (aside / "adapter_model.safetensors").chmod(0o644)
        settings = {name: value for name, value in adapter.settings.items() if name not in OUR_SETTINGS}
        with writing(aside / "adapter_config.json"):
            (aside / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        if tokenizer is not None:
            tokenizer.save(aside)


def config_from_hugging_face(values: dict, path: Path) -> ModelConfig:
    """A ModelConfig from config.json, as written by transformers 4 or 5. Raises ValueError for what is not LLaMA."""
    required = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    for name in (*required, "max_position_embeddings", "rms_norm_eps"):
        if not isinstance(values.get(name), (int, float)):
            raise ValueError(f"{path}: config.json has no number {name}")
    values = checked(values, HuggingFace, path / "config.json")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    unfit = {
        "quantization_config": values.get("quantization_config"),
        "model_type": values.get("model_type", "llama") != "llama",
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "attention_bias": values.get("attention_bias", False),
        "mlp_bias": values.get("mlp_bias", False),
        "head_dim": (values.get("head_dim") or 0) * values["num_attention_heads"] not in (0, values["hidden_size"]),
    }
    for name in filter(unfit.get, unfit):
        raise ValueError(f"{path}: {name} {values[name]} is not LLaMA-2's")
    if rope_type not in ("default", "linear"):
        raise ValueError(f"{path}: rope_type {rope_type} is not supported (default and linear are)")
    if rope_type == "linear" and not rope.get("factor"):
        raise ValueError(f"{path}: config.json has rope_type linear, but no factor")
    shape = dict(
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        ffn_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_seq_len=values["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or values.get("rope_theta") or 10_000.0,
        rope_scale=rope["factor"] if rope_type == "linear" else 1.0,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings") or False,
    )
    try:
        return ModelConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{path}: config.json does not fit together ({error})") from None


def config_to_hugging_face(config: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scale == 1 else {"rope_type": "linear", "factor": config.rope_scale},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def save(model: Transformer, folder: str | Path, tokenizer=None, max_shard_bytes: int = 5_000_000_000):
    """Write the model in the Hugging Face layout, for `load`, transformers and vLLM; tokenizer is a data.Tokenizer.

    Written beside the folder and renamed when complete. Raises ValueError if it holds something.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, weight in model.named_parameters():  # a tied matrix is named once
        if shards[-1] and used + weight.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][_translate(name, HF_NAMES)] = weight.detach()
        used += weight.nbytes
    with new_folder(folder) as aside:
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: weight.cpu().contiguous() for name, weight in shard.items()}
            with writing(aside / file, SafetensorError):
                save_file(tensors, aside / file, {"format": "pt"})
            (aside / file).chmod(0o644)  # safetensors makes it readable for its owner alone
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(weight.nbytes for shard in shards for weight in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            with writing(aside / "model.safetensors.index.json"):
                (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        config = config_to_hugging_face(model.config) | {"torch_dtype": dtype}
        if tokenizer is not None:
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            tokenizer.save(aside)
        with writing(aside / "config.json"):
            (aside / "config.json").write_text(json.dumps(config, indent=2))
