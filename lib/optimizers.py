"""Muon, and the moments that optimizers begin with."""

import torch
from torch import nn


def zero_moments(adamw: torch.optim.AdamW) -> torch.optim.AdamW:
    """Give AdamW the moments of its first step now, so that a checkpoint can be read into them."""
    for group in adamw.param_groups:
        for p in group["params"]:
            adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return adamw


def matrices(blocks: nn.ModuleList) -> list[nn.Parameter]:
    """What Muon trains: the matrices of the blocks that are not frozen."""
    return [p for p in blocks.parameters() if p.requires_grad and p.dim() >= 2]


def muon(hidden: list[nn.Parameter], config) -> list[torch.optim.Muon]:
    """Muon for these matrices (Jordan et al. 2024), its moments zero; without any, no optimizer.

    Its steps are scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate suits
    both.
    """
    if not hidden:
        return []
    optimizer = torch.optim.Muon(
        hidden,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    for p in hidden:
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return [optimizer]
