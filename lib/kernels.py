"""What is faster than the plain formula and not different: attention in packed rows, attention compiled for a CPU, and
the loss and log-probabilities of targets, whose logits exist for a few tokens at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

IGNORE = -100      # a target with this id is not trained on
LOSS_CHUNK = 1024  # tokens whose logits exist at a time in the loss


@dataclass
class Flags:
    # regularization: in the gradient alone, the loss that is reported stays the plain one
    label_smoothing: float = 0.0        # share of each target that is spread over the whole vocabulary
    z_loss: float = 0.0                 # weight of the squared logarithm of softmax's normalizer


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


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Stands in for model.causal_attention where training on a CPU is compiled."""
    assert mask is None  # training has no cache
    return CompiledOnCPU.apply(q, k, v)


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


class CrossEntropy:
    """The loss of targets (B, T) under the logits x @ weight.T, x (B, T, D), weight (V, D).

    smoothing and z_loss are in its gradient alone; of_logits may be a compiled `loss_of_logits`.
    """

    def __init__(self, smoothing: float = 0.0, z_loss: float = 0.0, of_logits: Callable = loss_of_logits):
        self.of_logits, self.terms = of_logits, (smoothing, z_loss)

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross-entropies, in nats."""
        x, targets = x.flatten(0, 1), targets.flatten()
        kept = targets != IGNORE  # on the host where the targets are there: then nothing waits for the device
        if not kept.all():
            kept = kept.nonzero().squeeze(1)
            x, targets = x[kept.to(x.device, non_blocking=True)], targets[kept]
        targets = targets.to(x.device, non_blocking=True)
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return ChunkedLoss.apply(x, weight, targets, training, self.of_logits, self.terms)

    def log_probs(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The log-probability of each target (B, T), 0 where there is none."""
        kept = (targets != IGNORE).nonzero(as_tuple=True)
        places = [axis.to(x.device, non_blocking=True) for axis in kept]
        wanted = targets[kept].to(x.device, non_blocking=True)
        found = ChunkedLogProbs.apply(x[tuple(places)], weight, wanted, self.of_logits)
        return found.new_zeros(targets.shape).index_put(places, found)


def choose(model, config, compiled: bool, device_type: str):
    """Put the kernels that suit a run into its model: its loss, and compiled on a CPU its attention."""
    of_logits = torch.compile(loss_of_logits, fullgraph=True) if compiled else loss_of_logits
    model.unembedding.cross_entropy = CrossEntropy(config.label_smoothing, config.z_loss, of_logits)
    if compiled:
        model.norm.forward = torch.compile(model.norm.forward, fullgraph=True)
    if compiled and device_type == "cpu":
        for block in model.blocks:
            block.attention.attend = attend_on_cpu
