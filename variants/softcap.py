"""Bound the logits by cap · tanh(logits / cap) (Gemma 2, 2024, arXiv:2408.00118)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import model


@dataclass(frozen=True)
class ModelConfig(model.ModelConfig):
    cap: float = 30.0  # the largest logit


class Transformer(model.Transformer):
    def __init__(self, config):
        super().__init__(config)
        self.unembedding.cap = config.cap


class Unembedding(model.Unembedding):
    def forward(self, x, targets=None, each=False):
        logits = self.cap * torch.tanh(super().forward(x).float() / self.cap)
        if targets is None:
            return logits
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=model.IGNORE, reduction="none"
        )
        return -losses.view_as(targets) if each else losses.sum()
