"""LLaMA whose training rounds what fp16 or bf16 would store; a variant for train.py, used by recipes/incite.py.

    python train.py --variant recipes/rounded.py --mantissa 10 --loss_scale 4096 --dtype fp32 --out out/RUN

CPUs have no fast fp16, and those that have some add up in fp32, as a V100 does. So products are made in fp32 here, and
rounded are weights, what goes into and comes out of each matrix, norm and residual sum, the logits, and all their
gradients. Attention itself, from rotated queries to its result, is fp32, as are the weights that the optimizer moves.
The loss is multiplied by loss_scale before its backward pass, each weight's gradient divided by it after rounding.
Without gradients, as in evaluation, it is the plain model.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import model

_DTYPES = {23: torch.float32, 10: torch.float16, 7: torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig(model.ModelConfig):
    mantissa: int = 10        # bits: fp16 has 10, bf16 7, fp32 23
    loss_scale: float = 1.0   # of the gradients while they are rounded


class _Round(torch.autograd.Function):
    """Rounds x, and its gradient, which is multiplied before that and divided after it."""

    @staticmethod
    def forward(ctx, x, dtype, before, after):
        ctx.how = dtype, before, after
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx, gradient):
        dtype, before, after = ctx.how
        return (gradient * before).to(dtype).float() / after, None, None, None


def _kept(x, config, before: float = 1.0, after: float = 1.0):
    return _Round.apply(x, _DTYPES[config.mantissa], before, after) if torch.is_grad_enabled() else x


def _weight(weight, config):
    return _kept(weight, config, 1.0, config.loss_scale)


def _linear(module, config, x):
    return _kept(F.linear(_kept(x, config), _weight(module.weight, config)), config)


def _norm(module, config, x):
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps)
    return _kept(_weight(module.weight, config) * _kept(unit, config), config)


class Block(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.config = config

    def forward(self, x, rope, cache, documents):
        x = _kept(x + self.attention(self.attention_norm(x), rope, cache, documents), self.config)
        return _kept(x + self.feed_forward(self.feed_forward_norm(x)), self.config)


class Unembedding(model.Unembedding):
    def forward(self, x, targets=None, each=False):
        if targets is None or each or not torch.is_grad_enabled():
            return super().forward(x, targets, each)
        logits = F.linear(_kept(x, self.config), _weight(self.weight, self.config))
        logits = _kept(logits, self.config, self.config.loss_scale)  # where gradients begin
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=model.IGNORE, reduction="sum")


class Transformer(model.Transformer):
    def __init__(self, config):
        super().__init__(config)
        self.unembedding.config = config
        for module in self.modules():
            if type(module) is nn.Linear:
                module.forward = partial(_linear, module, config)
            elif isinstance(module, model.RMSNorm):
                module.forward = partial(_norm, module, config)

    def embed(self, tokens, positions):
        return _kept(F.embedding(tokens, _weight(self.embedding.weight, self.config)), self.config)
