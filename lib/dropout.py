"""Dropout whose masks are a function of where a number stands in a run, of no random generator.

So a run that is resumed, divided otherwise, or computed again by activation checkpointing leaves
out the same numbers.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 2**32 - 1


@functools.lru_cache(4096)  # the names are asked for again with every batch
def _digest(words: str) -> int:
    digest = hashlib.sha256(words.encode()).digest()
    return int.from_bytes(digest[:4], "big")


def row_keys(names: list[str], numbers: Sequence[int], rows: int, seed: int) -> np.ndarray:
    """(names, rows): 32 bits for each row of a batch at each place where something is left out.

    numbers are those of the batch's sequences in the run. A sequence of several rows, as a pair of
    answers is, has a key for each of them.
    """
    rows_each = rows // len(numbers)
    of_rows = []
    for number in numbers:
        for row in range(rows_each):
            of_rows.append(_digest(f"{seed} dropout {number} {row}"))
    of_names = np.array([_digest(name) for name in names])
    return np.bitwise_xor.outer(of_names, np.array(of_rows))


def mixed(x: Tensor) -> Tensor:
    """32 bits that look like random ones for each number of 32 bits, both in int64.

    Chris Wellons' lowbias32. Its second factor is taken less 2^32, which changes none of the lowest
    32 bits and keeps the products within int64.
    """
    x = x ^ x >> 16
    x = x * 0x7FEB352D & BITS
    x = x ^ x >> 15
    x = x * (0x846CA68B - 2**32) & BITS
    return x ^ x >> 16


def kept(keys: Tensor, num_tokens: int, dim: int, share: float) -> Tensor:
    """Which of dim numbers a token stay, (B, T, dim), where keys (B,) are those of the rows and a
    share is left out."""
    places = torch.arange(num_tokens, device=keys.device)
    channels = torch.arange(dim, device=keys.device)
    tokens = mixed(keys[:, None] ^ mixed(places))              # (B, T)
    numbers = mixed(tokens[..., None] ^ mixed(channels))       # (B, T, dim)
    return numbers >= round(share * 2**32)


class DroppedProduct(torch.autograd.Function):
    """x W^T for x (B, T, in) of which a share is left out, and W (out, in), without the factor
    1 / (1 - share) for what stays.

    The backward pass makes the mask again, so that nothing but x is kept for it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, keys: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(x, weight, keys)
        ctx.share = share
        mask = kept(keys, x.size(1), x.size(2), share)
        return F.linear(x * mask, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, keys = ctx.saved_tensors
        mask = kept(keys, x.size(1), x.size(2), ctx.share)
        dropped = (x * mask).flatten(0, 1)
        weight_grad = grad.flatten(0, 1).T @ dropped
        x_grad = grad @ weight * mask
        return x_grad, weight_grad, None, None
