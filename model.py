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
import hashlib
import json
import math
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from lib import probe
from lib.files import new_folder
from lib.identity import first_rows_sha256, weights_sha256
from lib.records import read_json

IGNORE = -100  # a target with this id is not trained on
LOSS_CHUNK = 1024  # tokens whose logits exist at a time in the loss
INIT_ROWS = 128  # rows of a matrix that are drawn from one seed


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


class Documents(NamedTuple):
    """The documents in packed rows (B, T): no token attends to another document than its own."""

    positions: Tensor  # (B, T): of a token in its document
    bounds: Tensor     # (N + 1,) int32: of the rows laid end to end, document n is bounds[n] … bounds[n + 1] - 1


# PyTorch 2.11 and 2.13 say "causal" differently
VARLEN_CAUSAL = {"window_size": (-1, 0)} if "window_size" in signature(varlen_attn).parameters else {"is_causal": True}


def attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, of q (B, T, H, K) on k and v (B, T, G, K)."""
    rows, row_len = q.shape[:2]
    k, v = (heads.repeat_interleave(q.size(2) // k.size(2), 2) for heads in (k, v))
    q, k, v = (heads.flatten(0, 1) for heads in (q, k, v))    # (B · T, H, K)
    if q.is_cuda and q.dtype != torch.float32:
        bounds = documents.bounds
        y = varlen_attn(q, k, v, bounds, bounds, row_len, row_len, **VARLEN_CAUSAL)
    else:
        y = _attend_one_by_one(q, k, v, documents.bounds)
    return y.unflatten(0, (rows, row_len))


@torch.compiler.disable
def _attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """What varlen_attn does, without its kernel: to the last bit as if each document stood alone."""
    parts = zip(*(heads.transpose(0, 1).split(bounds.diff().tolist(), 1) for heads in (q, k, v)))
    outs = [F.scaled_dot_product_attention(*(part[None] for part in qkv), is_causal=True)[0] for qkv in parts]
    return torch.cat(outs, 1).transpose(0, 1)


QUERIES = 256  # that one product takes of each head, in the backward pass below


class CompiledOnCPU(torch.autograd.Function):
    """Causal attention with a backward pass to be compiled: on a CPU, in bf16, twice as fast as PyTorch's own.

    PyTorch's goes by tiles too small for the matrix units. Each product here takes 256 queries and all keys before
    them, of all heads. The gradients are those of FlashAttention (Dao et al. 2022, appendix B.2).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, normalizer)         # normalizer (B, H, T), fp32
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, normalizer = ctx.saved_tensors
        groups, scale = k.size(1), q.size(-1) ** -0.5
        k, v = (heads.repeat_interleave(q.size(1) // groups, 1) for heads in (k, v))
        dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
        normalizer, drift = normalizer[..., None], (dy.float() * y.float()).sum(-1, keepdim=True)
        for begin in range(0, q.size(2), QUERIES):
            end = min(begin + QUERIES, q.size(2))
            rows, past = (slice(None), slice(None), slice(begin, end)), (slice(None), slice(None), slice(end))
            logits = (q[rows] @ k[past].mT).float() * scale
            p = (logits - normalizer[rows]).exp().tril(begin)
            dlogits = (p * ((dy[rows] @ v[past].mT).float() - drift[rows]) * scale).to(q.dtype)
            dq[rows] = dlogits @ k[past]
            dk[past] += dlogits.mT @ q[rows]
            dv[past] += p.to(q.dtype).mT @ dy[rows]
        return dq, *(heads.unflatten(1, (groups, -1)).sum(2) for heads in (dk, dv))


class Attention(nn.Module):
    """Causal self-attention, H query heads sharing G key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, kv_dim, bias=False)
        self.value = nn.Linear(config.dim, kv_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache | None, documents: Documents | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.query, self.key, self.value))
        q, k = rotate(q, rope), rotate(k, rope)               # (B, T, H, K), (B, T, G, K)
        if documents is not None:
            return self.out(attend_within(q, k, v, documents).flatten(2))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)             # (B, G, S, K)
            mask = cache.mask
        # is_causal is right only where queries and keys start together; a filled cache brings its mask
        if mask is None and q.device.type == "cpu" and torch.compiler.is_compiling():
            y = CompiledOnCPU.apply(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))
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


def loss_of_logits(
    logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of targets (n,) under logits (n, V), and its gradient (n, V): the probabilities,
    less one at the target. All in fp32, in place where it can be; the gradient comes in the type of the logits.

    The gradient, not the loss, is also that of z_loss * log² of softmax's normalizer (PaLM, section 5), and of a target
    that is spread over the vocabulary by the share `smoothing`.
    """
    dtype, logits, answers = logits.dtype, logits.float(), targets[:, None]
    largest, chosen = logits.amax(-1, keepdim=True), logits.gather(1, answers)
    exps = logits.sub_(largest).exp_()
    sums = exps.sum(-1, keepdim=True)
    normalizers = sums.log() + largest
    loss = (normalizers - chosen).sum()
    if smoothing or z_loss:
        scale, share = (1 + 2 * z_loss * normalizers) / sums, smoothing / logits.size(-1)
        of_target = (chosen - largest).exp() * scale - share - (1 - smoothing)
        return loss, exps.mul_(scale).sub_(share).to(dtype).scatter_(1, answers, of_target.to(dtype))
    of_target = (chosen - largest).exp() / sums - 1
    return loss, exps.div_(sums).to(dtype).scatter_(1, answers, of_target.to(dtype))


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of targets (n,) under the logits x @ weight.T, x (n, D), weight (V, D).

    All logits together would be the largest tensor of a training step. Here LOSS_CHUNK tokens' logits exist at a
    time, and their gradient is turned at once into those of x and weight. Compiled, of_logits needs no fp32 copy of
    bf16 logits, and four chunks at a time are faster.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, training: bool, of_logits: Callable, terms: tuple[float, float]
    ) -> Tensor:
        compiled = of_logits is not loss_of_logits
        size = 4 * LOSS_CHUNK if compiled and x.dtype == torch.bfloat16 else LOSS_CHUNK
        total, (smoothing, z_loss) = torch.zeros((), device=x.device), terms
        x_grad = torch.empty_like(x) if training else None
        weight_grad = None
        for begin in range(0, len(x), size):
            chunk = slice(begin, begin + size)
            loss, logits_grad = of_logits(F.linear(x[chunk], weight), targets[chunk], smoothing, z_loss)
            total += loss
            if training:
                torch.mm(logits_grad, weight, out=x_grad[chunk])
            if training and weight.requires_grad:
                of_chunk = logits_grad.T @ x[chunk]
                weight_grad = of_chunk.float() if weight_grad is None else weight_grad.add_(of_chunk)
                del of_chunk
            del logits_grad  # before the next chunk's is made
        if len(x) == 0 and training:
            weight_grad = torch.zeros_like(weight)
        ctx.grads, ctx.weight_dtype = (x_grad, weight_grad), weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        x_grad, weight_grad = ctx.grads
        if weight_grad is not None:
            weight_grad = torch.mul(weight_grad, scale, out=torch.empty_like(weight_grad, dtype=ctx.weight_dtype))
        return x_grad * scale, weight_grad, None, None, None, None


class ChunkedLogProbs(torch.autograd.Function):
    """The log-probabilities (n,) of targets (n,) under the logits x @ weight.T, also LOSS_CHUNK tokens at a time.

    What each of them counts is known only in the backward pass, so it computes the logits again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, of_logits: Callable) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.of_logits = of_logits
        parts = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
        return -torch.cat([F.cross_entropy(F.linear(a, weight).float(), b, reduction="none") for a, b in parts])

    @staticmethod
    def backward(ctx, scale: Tensor):
        x, weight, targets = ctx.saved_tensors
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(x), LOSS_CHUNK):
            chunk = slice(begin, begin + LOSS_CHUNK)
            _, logits_grad = ctx.of_logits(F.linear(x[chunk], weight), targets[chunk])
            logits_grad = (logits_grad * -scale[chunk, None]).to(x.dtype)
            torch.mm(logits_grad, weight, out=x_grad[chunk])
            if ctx.needs_input_grad[1]:
                weight_grad += logits_grad.T @ x[chunk]
        return x_grad, weight_grad.to(weight.dtype), None, None


class Unembedding(nn.Linear):
    """Turns the residual stream into logits; with targets into their loss, or into the log-probability of each."""

    loss_of_logits = staticmethod(loss_of_logits)
    terms = (0.0, 0.0)  # its smoothing and z_loss, in training

    def forward(self, x: Tensor, targets: Tensor | None = None, each: bool = False) -> Tensor:
        if targets is None:
            return super().forward(x)
        shape, x, targets = targets.shape, x.flatten(0, 1), targets.flatten()
        kept = targets != IGNORE  # on the host where the targets are there: then nothing waits for the device
        if each or not kept.all():
            kept = kept.nonzero().squeeze(1)
            x, targets = x[places := kept.to(x.device, non_blocking=True)], targets[kept]
        targets = targets.to(x.device, non_blocking=True)
        if each:
            log_probs = ChunkedLogProbs.apply(x, self.weight, targets, self.loss_of_logits)
            return log_probs.new_zeros(shape).index_put((places // shape[1], places % shape[1]), log_probs)
        training = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return ChunkedLoss.apply(x, self.weight, targets, training, self.loss_of_logits, self.terms)


TARGETS = {  # the matrices of a block that adapters may go on, by the last word of their names
    "query": "attention", "key": "attention", "value": "attention", "out": "attention",
    "gate": "feed_forward", "up": "feed_forward", "down": "feed_forward",
}  # fmt: skip


NF4_BLOCK, NF4_GROUP = 64, 256  # weights with a common scale, and scales with a common constant


class FrozenLinear(nn.Module):
    """A matrix W (out, in) that stays as it is, with an adapter if rank > 0: y = x W^T + (alpha / rank) (x A^T) B^T,
    A (rank, in), B (out, rank) (LoRA, Hu et al. 2021, section 4.1).

    A starts random and B at zero, so training starts from the base model. W has the type that it came with, or is kept
    in NF4 (QLoRA, Dettmers et al. 2023, section 3); A and B are fp32.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, nf4: bool):
        super().__init__()
        num_out, num_in = base.weight.shape
        self.nf4, self.scale = nf4, alpha / rank if rank else 0.0
        if nf4:
            if num_in % NF4_BLOCK:
                raise ValueError(f"--quantize nf4 takes blocks of {NF4_BLOCK}, which do not divide a width of {num_in}")
            groups = -(-num_out * num_in // NF4_BLOCK // NF4_GROUP)
            shapes = {"codes": num_in // 2, "scales": num_in // NF4_BLOCK}
            shapes = {name: (num_out, width) for name, width in shapes.items()} | {"constants": (groups + 1, 4)}
            for name, shape in shapes.items():
                empty = torch.empty(shape, dtype=torch.uint8, device=base.weight.device)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        else:
            self.weight = base.weight.requires_grad_(False)
        if rank:
            like = dict(dtype=torch.float32, device=base.weight.device)
            self.lora_A = nn.Parameter(torch.zeros(rank, num_in, **like))
            self.lora_B = nn.Parameter(torch.zeros(num_out, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        if self.nf4:
            y = nf4_product(x, self.codes, self.scales, self.constants, False)
        else:
            y = F.linear(x, self.weight)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.scale else y


def to_nf4(weight: Tensor) -> dict[str, Tensor]:
    """A matrix in NF4 with double quantisation, by bitsandbytes, as bytes in rows: two weights a byte; one scale a
    block; an fp32 constant (4 bytes) a group of scales, and at the end the mean of all scales.

    Raises ValueError where bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise ValueError("NF4 is made by bitsandbytes; pip install bitsandbytes") from None

    codes, state = quantize_4bit(weight.float().contiguous(), None, None, NF4_BLOCK, True, "nf4")
    constants = torch.cat((state.state2.absmax, state.offset[None]))[:, None].view(torch.uint8)
    rows = len(weight)
    return {"codes": codes.view(rows, -1), "scales": state.absmax.view(rows, -1), "constants": constants}


def from_nf4(codes: Tensor, scales: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that `to_nf4` packed."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    constants = constants.view(torch.float32).squeeze(1)
    group = QuantState(constants[:-1], code=_scale_values(codes.device), blocksize=NF4_GROUP, dtype=torch.float32)
    shape = torch.Size((len(codes), 2 * codes.size(1)))
    state = QuantState(scales.flatten(), shape, None, NF4_BLOCK, "nf4", dtype, constants[-1], group)
    return dequantize_4bit(codes.view(-1, 1), state)


@functools.cache
def _scale_values(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


@torch.library.custom_op("plainllama::nf4_product", mutates_args=())
def nf4_product(x: Tensor, codes: Tensor, scales: Tensor, constants: Tensor, backwards: bool) -> Tensor:
    """x W^T for W in NF4, or x W. An operator of its own, so that neither autograd nor the compiler keeps the whole of
    W for the backward pass, which makes it again."""
    weight = from_nf4(codes, scales, constants, x.dtype)
    return F.linear(x, weight.T if backwards else weight)


@nf4_product.register_fake
def _(x, codes, scales, constants, backwards):
    return x.new_empty(*x.shape[:-1], 2 * codes.size(1) if backwards else codes.size(0))


nf4_product.register_autograd(
    lambda ctx, grad: (nf4_product(grad.contiguous(), *ctx.saved_tensors, True), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:4]),
)


def add_adapters(model: "Transformer", rank: int, alpha: float, targets: list[str], nf4: bool) -> "Transformer":
    """Freeze the model and give the target matrices of every block an adapter; with nf4, all matrices of the blocks
    are kept in NF4. Raises ValueError for a width that NF4's blocks do not divide."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, parent in ((name, getattr(block, part)) for name, part in TARGETS.items()):
            setattr(parent, name, FrozenLinear(getattr(parent, name), rank if name in targets else 0, alpha, nf4))
    return model


@contextlib.contextmanager
def without_adapters(model: nn.Module):
    """Inside, the model computes as if it had no adapters."""
    modules = [(part, part.scale) for part in model.modules() if isinstance(part, FrozenLinear)]
    try:
        for part, _ in modules:
            part.scale = 0.0
        yield
    finally:
        for part, scale in modules:
            part.scale = scale


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, none for a model without."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


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
    def init_weights(self, seed: int = 0, rows: "Rows | None" = None):
        """Normal(0, 0.02); the two matrices that write to the residual stream get 0.02 / sqrt(2 * layers).

        Every INIT_ROWS rows of a matrix are drawn from a seed of their own, so that any number of processes, each
        drawing the rows that it holds, makes the same model. Where there are adapters, they alone are set.
        """
        for name, weight in (adapters(self) or dict(self.named_parameters())).items():
            first, mine = (rows or all_rows)(weight)
            if weight.dim() == 1 or name.endswith("lora_B"):
                mine.fill_(weight.dim() == 1)
                continue
            writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = 0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02
            if name.endswith("lora_A"):
                std = (3 * weight.size(1)) ** -0.5  # that of PEFT's uniform numbers
            for begin in range(first - first % INIT_ROWS, first + len(mine), INIT_ROWS):
                digest = hashlib.sha256(f"{seed} {name} {begin}".encode()).digest()
                generator = torch.Generator(mine.device).manual_seed(int.from_bytes(digest[:7]))
                shape = (min(INIT_ROWS, weight.size(0) - begin), weight.size(1))
                drawn = torch.normal(0.0, std, shape, generator=generator, device=mine.device)
                target = mine[max(0, begin - first) : begin - first + INIT_ROWS]
                target.copy_(drawn[max(0, first - begin) :][: len(target)])

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Documents | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The normalised residual stream (B, T, D), which `unembedding` turns into logits.

        noise (B, T, D) is added to the embeddings. Raises ValueError when the tokens do not fit in the context window
        or in the cache.
        """
        num_tokens = tokens.size(1)
        if num_tokens > self.config.max_seq_len:
            raise ValueError(f"{num_tokens} tokens exceed the context window of {self.config.max_seq_len}")
        if documents is not None:
            positions = documents.positions
        else:
            positions = torch.arange(num_tokens, device=tokens.device) if cache is None else cache.begin(num_tokens)
        rope = rope_table(self.config, positions)
        x = self.embedding(tokens)                            # (B, T, D)
        if noise is not None:
            x = x + noise.to(x.dtype)
        for block in self.blocks:
            x = block(x, rope, cache, documents)
        if cache is not None:
            cache.end(num_tokens)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        num_targets: Tensor | float | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
        noise: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """fp32 logits (B, T, V) of the token after each of tokens (B, T); with targets (B, T), the loss in nats.

        Targets are the tokens one later; `IGNORE` marks those that do not count and cost nothing. The loss is the
        sum over the targets divided by num_targets: the number of targets given, unless the caller counts over more
        than this batch (train.py divides by those of the whole step). No targets at all is a loss of 0.
        With `each`, instead of the loss, the log-probability of each target (B, T), 0 where there is none.
        """
        x = self.hidden(tokens, cache, documents, noise)
        if targets is None:
            return self.unembedding(x).float()
        if each:
            return self.unembedding(x, targets, each)
        if num_targets is None:
            num_targets = max(1, int((targets != IGNORE).sum()))
        return self.unembedding(x, targets) / num_targets


# ---- weights on disk ----

# Where a parameter's weights are in this process: the first row, and the rows from there on as a plain tensor. A model
# spread over several processes (train.py) has only some rows of each parameter in each.
Rows = Callable[[nn.Parameter], tuple[int, Tensor]]


def all_rows(weight: nn.Parameter) -> tuple[int, Tensor]:
    return 0, weight.data


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
    config = config_from_hugging_face(json.loads((folder / "config.json").read_text()), folder)
    table = {theirs: ours for ours, theirs in HF_NAMES.items()}

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise ValueError(f"{folder}: {name} is missing")

    def tensors() -> Named:
        from safetensors import safe_open

        for path in (folder / name for name in names):
            with safe_open(path, "pt") as file:
                inside = list(file.keys())
            for name in inside:
                # older conversions store the rotary wavelengths, and some the output of a tied model twice
                if name.endswith("rotary_emb.inv_freq") or config.tie_embeddings and name == "lm_head.weight":
                    continue
                with safe_open(path, "pt") as file:  # opened anew, so that what was read does not stay mapped
                    yield _translate(name, table), file.get_tensor(name)

    return config, tensors()


def _read_meta(folder: Path) -> tuple[ModelConfig, Named]:
    """Meta's release: params.json and one consolidated.NN.pth for each model-parallel rank."""
    params = json.loads((folder / "params.json").read_text())
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise ValueError(f"{folder} has params.json but no consolidated.*.pth")
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
    config = ModelConfig(
        dim=params["dim"],
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn_dim=sum(part["layers.0.feed_forward.w1.weight"].size(0) for part in parts),
        vocab_size=sum(part["output.weight"].size(0) for part in parts),
        rope_theta=params.get("rope_theta", 10_000.0),
        norm_eps=params["norm_eps"],
    )
    names = {theirs: ours for ours, (theirs, _) in META_NAMES.items()}
    split_dims = dict(META_NAMES.values())

    def tensors() -> Named:
        for name in parts[0]:
            if name == "rope.freqs":
                continue
            kind = ".".join(name.split(".")[2:-1] if name.startswith("layers.") else name.split(".")[:-1])
            dim = split_dims.get(kind)
            pieces = [part[name] for part in parts]
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
    kv_dim, rope_pairs = kv_heads * config.head_dim, config.head_dim // 2
    stacks = [
        ("attention_norm", (dim,)), ("attention.query", (dim, dim)), ("attention.key", (kv_dim, dim)),
        ("attention.value", (kv_dim, dim)), ("attention.out", (dim, dim)), ("feed_forward_norm", (dim,)),
        ("feed_forward.gate", (ffn_dim, dim)), ("feed_forward.down", (dim, ffn_dim)),
        ("feed_forward.up", (ffn_dim, dim)),
    ]  # fmt: skip
    layout = [("embedding.weight", (abs(vocab), dim))]
    layout += [(f"blocks.{i}.{name}.weight", shape) for name, shape in stacks for i in range(layers)]
    layout += [("norm.weight", (dim,)), ("", (2 * seq_len * rope_pairs,))]  # llama2.c stores its rotary tables too
    layout += [] if config.tie_embeddings else [("unembedding.weight", (abs(vocab), dim))]
    expected, found = 28 + 4 * sum(int(np.prod(shape)) for _, shape in layout), path.stat().st_size
    if expected != found:
        raise ValueError(f"{path}: {found} bytes, but its header asks for {expected}; is it a llama2.c version 0 file?")

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


def load_weights(model: Transformer, path: str | Path, rows: Rows = all_rows):
    """Fill a model of the right shape from path, as `load` does; of a Hugging Face folder only the rows are read."""
    path = checkpoint_folder(Path(path))
    with readable(path):
        _fill(model, _open(path)[1], path, rows)


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
        return config_from_hugging_face(json.loads((path / "config.json").read_text()), path), _read_checkpoint(path)
    if (path / "params.json").exists():
        return _read_meta(path)
    if (path / "config.json").exists() and any(path.glob("model*.safetensors*")):
        return _read_hugging_face(path)
    raise ValueError(f"{path}: no model here (looked for config.json with safetensors, params.json, a checkpoint)")


@torch.no_grad()
def _fill(model: Transformer, tensors: Named, path: Path, rows: Rows):
    missing = dict(model.named_parameters())
    for name in adapters(model):
        del missing[name]
    for name, tensor in _quantized(model, tensors):
        if name not in missing:
            raise ValueError(f"{path}: tensor {name} {tuple(tensor.shape)} has no place in this model")
        target = missing.pop(name)
        if target.shape != tensor.shape:
            raise ValueError(f"{path}: tensor {name} should be {tuple(target.shape)} and is {tuple(tensor.shape)}")
        first, mine = rows(target)
        mine.copy_(tensor[first : first + len(mine)])
    if missing:
        name, target = next(iter(missing.items()))
        raise ValueError(f"{path}: tensor {name} {tuple(target.shape)} is missing")


def _quantized(model: Transformer, tensors: Named) -> Named:
    """The tensors, but of matrices that the model keeps in NF4 the three parts; on its device, which is faster."""
    devices = {name: module.codes.device for name, module in model.named_modules() if getattr(module, "nf4", False)}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if module not in devices:
            yield name, tensor
        else:
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
    if not (path / "last").exists():
        raise ValueError(f"{path}: this run has no complete checkpoint yet")
    folder = path / (path / "last").read_text().strip()
    if not (folder / ".metadata").exists():
        raise ValueError(f"{folder}: no checkpoint there, though {path / 'last'} names it")
    return folder


class _Metadata(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, a pickle, letting it name nothing but descriptions of tensors."""

    DESCRIPTIONS = """Metadata TensorStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta
        _MEM_FORMAT_ENCODING""".split()

    def find_class(self, module: str, name: str):
        known = {
            "torch.distributed.checkpoint.metadata": self.DESCRIPTIONS,
            "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
            "torch.serialization": ["_get_layout"],
            "torch": ["Size", "float32", "bfloat16", "int64"],
            "pathlib": ["PosixPath", "WindowsPath"],
            "pathlib._local": ["PosixPath", "WindowsPath"],
        }
        if name not in known.get(module, ()):
            raise ValueError(f"its index names {module}.{name}, which does not describe tensors")
        return super().find_class(module, name)


def check_checkpoint(folder: Path):
    """Raise ValueError unless it holds tensors alone: from other entries PyTorch's reader would run code."""
    with readable(folder), open(folder / ".metadata", "rb") as file:
        _Metadata(file).load()


def _read_checkpoint(folder: Path) -> Named:
    """The weights in a checkpoint of train.py, read a gigabyte at a time; its moments stay unread."""
    import torch.distributed.checkpoint as dcp

    check_checkpoint(folder)
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name in entries if name.startswith("model.")]
    while names:
        part, used = {}, 0
        while names and used < 2**30:
            name = names.pop(0)
            part[name] = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
            used += part[name].nbytes
        with warnings.catch_warnings(action="ignore"):  # that each process reads for itself, as it should
            dcp.load(part, checkpoint_id=folder, no_dist=True)
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
    """The SHA-256 of all weights of the model at path, to know it again by; or what else `of` makes
    of its tensors.

    It reads all of them, so it is computed once as long as the files stay the same. Raises
    ValueError like `load`.
    """
    path = checkpoint_folder(Path(path))
    with readable(path):
        files = [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir()))
        states = ((file.name, file.stat()) for file in files)
        states = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
        return _fingerprint(path.resolve(), of, states)


@functools.cache
def _fingerprint(path: Path, of: Callable[[Named], str], files: tuple) -> str:
    return of(_open(path)[1])


def is_known(path: str | Path, known: str) -> bool:
    """Whether the model at path has the fingerprint that a run wrote down, also an older run's, of
    the first rows alone."""
    return known == fingerprint(path) or known == fingerprint(path, first_rows_sha256)


def code_probe(config: ModelConfig) -> list[float]:
    """What this code computes for models of this kind, see lib/probe.py."""
    return probe.probe(Transformer, config, functools.partial(_translate, table=HF_NAMES))


def check_code(path: str | Path, anyway: bool):
    """Raise ValueError where path is a run or checkpoint of code that computes something else.

    With anyway that is only said, on stderr. Other models do not say what code trained them.
    """
    folder = checkpoint_folder(Path(path))
    if (theirs := probe.read(folder)) is not None:
        with readable(folder):
            config = config_from_hugging_face(read_json(folder / "config.json"), folder)
        probe.check(folder, theirs, code_probe(config), anyway)


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
        settings = json.loads((path / "adapter_config.json").read_text())
        plain = {"peft_type": "LORA", "bias": "none"}
        other = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
        for name in (*plain, *other):
            if settings.get(name) and settings[name] != plain.get(name):
                raise ValueError(f"{path}: an adapter with {name} {settings[name]} cannot be read")
        named = _read_checkpoint(path) if (path / ".metadata").exists() else _read_peft(path)
        return Adapter(find_base(settings, path), settings, dict(named))


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
        config = config_from_hugging_face(json.loads((path / "config.json").read_text()), path)
    in_nf4 = settings.get("quantize") == "nf4"

    def merged() -> Named:
        for name, tensor in tensors:
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
    from safetensors.torch import save_file

    with new_folder(folder) as aside:
        tensors = {}
        for name, tensor in adapter.tensors.items():
            module, _, part = name.rpartition(".")
            theirs = _translate(f"{module}.weight", HF_NAMES).removesuffix("weight")
            tensors[f"{PEFT_PREFIX}{theirs}{part}.weight"] = tensor.contiguous()
        save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        (aside / "adapter_model.safetensors").chmod(0o644)
        settings = {name: value for name, value in adapter.settings.items() if name not in OUR_SETTINGS}
        (aside / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        if tokenizer is not None:
            tokenizer.save(aside)


def config_from_hugging_face(values: dict, path: Path) -> ModelConfig:
    """A ModelConfig from config.json, as written by transformers 4 or 5. Raises ValueError for what is not LLaMA."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    required = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    for name in (*required, "max_position_embeddings", "rms_norm_eps"):
        if not isinstance(values.get(name), (int, float)):
            raise ValueError(f"{path}: config.json has no number {name}")
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
    return ModelConfig(
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
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


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

    Written beside the folder and renamed when complete. Raises ValueError if the folder exists.
    """
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
            save_file(tensors, aside / file, {"format": "pt"})
            (aside / file).chmod(0o644)  # safetensors makes it readable for its owner alone
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(weight.nbytes for shard in shards for weight in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        config = config_to_hugging_face(model.config) | {"torch_dtype": dtype}
        if tokenizer is not None:
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            tokenizer.save(aside)
        (aside / "config.json").write_text(json.dumps(config, indent=2))
