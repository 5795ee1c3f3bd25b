"""What is faster than the plain formula and not different: the loss and log-probabilities of
targets, whose logits exist for a few tokens at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu_attention import attend_on_cpu
from lib.errors import BadInput
from lib.packed import attend_within, each_alone, one_by_one
from lib.tensors import OnHost, unwrapped

IGNORE = -100      # a target with this id is not trained on
LOSS_CHUNK = 1024  # tokens whose logits exist at a time in the loss


@dataclass
class Flags:
    # regularization: in the gradient alone, the loss that is reported stays the plain one
    label_smoothing: float = 0.0  # share of each target that is spread over the whole vocabulary
    z_loss: float = 0.0           # weight of the squared logarithm of softmax's normalizer
    # plain: attention as it is written, softmax(QKᵀ/√d)V, slower; fast: the same in one kernel
    attention: Literal["fast", "plain"] = "fast"


def loss_and_gradient(
    logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of targets (n,) under logits (n, V), and its gradient (n, V):
    the probabilities, less one at the target. All in fp32, in place where it can be; the gradient
    comes in the type of the logits.

    The gradient, not the loss, is also that of z_loss * log² of softmax's normalizer (PaLM,
    section 5), and of a target that is spread over the vocabulary by the share `smoothing`.
    """
    dtype = logits.dtype
    logits = logits.float()
    answers = targets[:, None]
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, answers)
    exps = logits.sub_(largest).exp_()
    sums = exps.sum(-1, keepdim=True)
    normalizers = sums.log() + largest
    loss = (normalizers - chosen).sum()
    if smoothing or z_loss:
        scale = (1 + 2 * z_loss * normalizers) / sums
        share = smoothing / logits.size(-1)
        at_target = (chosen - largest).exp() * scale - share - (1 - smoothing)
        gradient = exps.mul_(scale).sub_(share)
    else:
        at_target = (chosen - largest).exp() / sums - 1
        gradient = exps.div_(sums)
    gradient = gradient.to(dtype)
    rows = torch.arange(len(targets), device=targets.device)
    gradient[rows, targets] = at_target.to(dtype)[:, 0]  # scatter_ would copy all of bf16 on a CPU
    return loss, gradient


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of targets (n,) under the logits x @ weight.T.

    x is (n, D), weight (V, D).

    All logits together would be the largest tensor of a training step. Here LOSS_CHUNK tokens'
    logits exist at a time, and their gradient is turned at once into those of x and weight.
    Compiled, that needs no fp32 copy of half as wide logits, and four chunks at a time are faster.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        training: bool,
        kernel: "CrossEntropy",
    ) -> Tensor:
        size = LOSS_CHUNK
        if kernel.compiled and x.dtype.itemsize == 2:
            size = 4 * LOSS_CHUNK
        total = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x) if training else None
        weight_grad = None
        for begin in range(0, len(x), size):
            chunk = slice(begin, begin + size)
            loss, logits_grad = kernel.loss_and_gradient(
                F.linear(x[chunk], weight),  # without a name here, which would keep its memory
                targets[chunk],
                kernel.smoothing,
                kernel.z_loss,
            )
            total += loss
            if training:
                torch.mm(logits_grad, weight, out=x_grad[chunk])
            if training and weight.requires_grad:
                chunk_grad = logits_grad.T @ x[chunk]
                if weight_grad is None:
                    weight_grad = chunk_grad.float()
                else:
                    weight_grad.add_(chunk_grad)
                del chunk_grad
            del logits_grad  # before the next chunk's is made
        if len(x) == 0 and training:
            weight_grad = torch.zeros_like(weight)
        ctx.grads = (x_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        x_grad, weight_grad = ctx.grads
        if weight_grad is not None:
            scaled = torch.empty_like(weight_grad, dtype=ctx.weight_dtype)
            weight_grad = torch.mul(weight_grad, scale, out=scaled)
        return x_grad * scale, weight_grad, None, None, None


class ChunkedLogProbs(torch.autograd.Function):
    """The log-probabilities (n,) of targets (n,) under the logits x @ weight.T, also LOSS_CHUNK
    tokens at a time.

    What each of them counts is known only in the backward pass, so it computes the logits again.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, kernel: "CrossEntropy"
    ) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.loss_and_gradient = kernel.loss_and_gradient
        losses = []
        for inputs, wanted in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            losses.append(
                F.cross_entropy(F.linear(inputs, weight).float(), wanted, reduction="none")
            )
        return -torch.cat(losses)

    @staticmethod
    def backward(ctx, scale: Tensor):
        x, weight, targets = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(x), LOSS_CHUNK):
            chunk = slice(begin, begin + LOSS_CHUNK)
            _, logits_grad = ctx.loss_and_gradient(F.linear(x[chunk], weight), targets[chunk])
            logits_grad = (logits_grad * -scale[chunk, None]).to(x.dtype)
            torch.mm(logits_grad, weight, out=x_grad[chunk])
            if ctx.needs_input_grad[1]:
                weight_grad += logits_grad.T @ x[chunk]
        return x_grad, weight_grad.to(weight.dtype), None, None


class CrossEntropy:
    """The loss of targets (B, T) under the logits x @ weight.T, x (B, T, D), weight (V, D).

    smoothing and z_loss are in its gradient alone.
    """

    def __init__(self, smoothing: float = 0.0, z_loss: float = 0.0, compiled: bool = False):
        self.smoothing, self.z_loss, self.compiled = smoothing, z_loss, compiled
        self.loss_and_gradient = loss_and_gradient
        if compiled:
            self.loss_and_gradient = torch.compile(loss_and_gradient, fullgraph=True)

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor | OnHost) -> Tensor:
        """The sum of the cross-entropies, in nats."""
        x, targets = x.flatten(0, 1), unwrapped(targets).flatten()
        kept = targets != IGNORE  # on the host where the targets are there: nothing waits for a GPU
        if not kept.all():
            kept = kept.nonzero().squeeze(1)
            targets = targets[kept]
            x = x[kept.to(x.device, non_blocking=True)]
        targets = targets.to(x.device, non_blocking=True)
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return ChunkedLoss.apply(x, weight, targets, training, self)

    def log_probs(self, x: Tensor, weight: Tensor, targets: Tensor | OnHost) -> Tensor:
        """The log-probability of each target (B, T), 0 where there is none."""
        targets = unwrapped(targets)
        kept = (targets != IGNORE).nonzero(as_tuple=True)
        places = [axis.to(x.device, non_blocking=True) for axis in kept]
        inputs = x[tuple(places)]
        wanted = targets[kept].to(x.device, non_blocking=True)
        log_probs = ChunkedLogProbs.apply(inputs, weight, wanted, self)
        return log_probs.new_zeros(targets.shape).index_put(places, log_probs)


def in_one_graph(block, config, device_type: str) -> bool:
    """Whether a block can be compiled as a whole, as the loop in place of the GPU's kernel cannot."""
    fast = getattr(block.attention, "attend_within", None) is attend_within
    return not config.pack or (device_type == "cuda" and config.dtype != "fp32" and fast)


def lacks_kernel(attention: nn.Module) -> bool:
    """Whether this GPU cannot run attention's kernel for packed rows, which begins with Ampere."""
    usual = getattr(attention, "attend_within", None) is attend_within
    return usual and torch.cuda.get_device_capability() < (8, 0)


def install(model, config, device_type: str, plain_attention: Callable):
    """Put the kernels that suit a run into its model: loss, and compiled on a CPU attention.

    Raises ValueError where --attention plain meets a variant with an attention of its own.
    """
    compiled = config.compile == "on"
    model.unembedding.cross_entropy = CrossEntropy(
        config.label_smoothing, config.z_loss, compiled
    )
    if compiled:
        model.norm.forward = torch.compile(model.norm.forward, fullgraph=True)
    for block in model.blocks:
        attention = block.attention
        attend = getattr(attention, "attend", None)  # a variant may do without
        own = getattr(attend, "__name__", "") != "causal_attention"
        if own and config.attention == "plain":
            raise BadInput("--attention plain does not go with a variant's own attention")
        if config.attention == "plain":
            attention.attend = plain_attention
            attention.attend_within = each_alone(plain_attention)
        elif compiled and device_type == "cpu" and not own:
            attention.attend = attend_on_cpu
        elif device_type == "cuda" and lacks_kernel(attention):
            attention.attend_within = one_by_one


def blocks_together(block: nn.Module) -> int:
    """How many blocks like this one are gathered together: as many as make a million parameters.

    A gathering costs as much time for a small block as for one of a million.
    """
    return math.ceil(1_000_000 / sum(p.numel() for p in block.parameters()))


def sharding_units(model: nn.Module) -> list[list[nn.Module]]:
    """Modules whose weights are gathered together: neighbouring blocks, see `blocks_together`, and
    an embedding that is not the output too."""
    blocks = list(model.blocks)
    size = blocks_together(blocks[0])
    units = [blocks[i : i + size] for i in range(0, len(blocks), size)]
    return units if model.config.tie_embeddings else [*units, [model.embedding]]
