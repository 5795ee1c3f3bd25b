"""Activation checkpointing: what the backward pass computes again instead of keeping it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


@dataclass
class Flags:
    checkpointing: str = "none"
    """activations computed again in the backward pass: none, selective, full, or 2 for those of
    every second block, 3 for every third, ..."""


def wrap(forward: Callable, mode: str, layer: int) -> Callable:
    """A block's forward, but keeping less for the backward pass, which computes the same again."""
    if mode == "none" or mode.isdigit() and layer % int(mode):
        return forward
    contexts = {"context_fn": keep_the_costly} if mode == "selective" else {}
    return functools.partial(checkpoint, forward, use_reentrant=False, **contexts)


# of attention, in the names of operators
KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "varlen_attn")


def keep_the_costly():
    """Of selective checkpointing: keep the outputs of attention and of every second matrix product."""
    products = {False: 0, True: 0}  # seen in the forward pass, and when computing again

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = any(name in str(op) for name in KERNELS)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
