"""Training in a few lines, for models that train.py does not make; used by recipes/llava.py."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def fit(model: nn.Module, config, losses: Iterator[Tensor]):
    """AdamW without decay; the rate rises over 3 % of the steps and falls as a cosine, as LLaVA's does.

    config has steps and learning_rate.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    for step in range(config.steps):
        rise = min(1.0, (step + 1) / (0.03 * config.steps))
        share = rise * (1 + math.cos(math.pi * step / config.steps)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * share
        optimizer.zero_grad()
        next(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
