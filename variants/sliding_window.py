"""A query sees the last `window` tokens alone (Longformer, Beltagy et al. 2020, arXiv:2004.05150; Mistral 7B,
Jiang et al. 2023, arXiv:2310.06825)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import model


@dataclass(frozen=True)
class ModelConfig(model.ModelConfig):
    window: int = 64  # tokens that a query sees, with its own


class Attention(model.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window = config.window

    def attend(self, q, k, v, mask):
        slots = torch.arange(k.size(2), device=q.device)
        place = slots[-q.size(2) :, None]
        if mask is not None:  # with the cache a query sees all keys up to its own
            place = (mask == 0).sum(-1)[..., None] - 1
        distance = place - slots
        seen = (distance >= 0) & (distance < self.window)
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.size(1) != k.size(1))
