"""Attention in packed rows, where no token sees another document than its own."""

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """The documents in packed rows (B, T): no token attends to another document than its own."""

    positions: Tensor  # (B, T): of a token in its document
    bounds: Tensor     # (N + 1,) int32: rows laid end to end, n is bounds[n] … bounds[n + 1] - 1


if torch.backends.cuda.is_built():  # elsewhere it is of no use, and takes a second to import
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in signature(varlen_attn).parameters:
        VARLEN_CAUSAL = {"window_size": (-1, 0)}  # PyTorch 2.13 and 2.11 say "causal" differently
    else:
        VARLEN_CAUSAL = {"is_causal": True}


def attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, of q (B, T, H, K) on k and v (B, T, G, K)."""
    if not q.is_cuda or q.dtype == torch.float32:
        return one_by_one(q, k, v, documents)
    row_len, bounds = q.size(1), documents.bounds
    heads = _end_to_end(q, k, v)
    y = varlen_attn(*heads, bounds, bounds, row_len, row_len, **VARLEN_CAUSAL)
    return y.view_as(q)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """`attend_within` without its kernel, one document at a time."""
    return _attend_one_by_one(_causal, *_end_to_end(q, k, v), documents.bounds).view_as(q)


def _end_to_end(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Each (B · T, H, K), with a key and value for every query head."""
    queries_per_key = q.size(2) // k.size(2)
    k, v = (heads.repeat_interleave(queries_per_key, 2) for heads in (k, v))
    return [heads.flatten(0, 1) for heads in (q, k, v)]


def each_alone(attend: Callable) -> Callable:
    """`attend_within` by another attention, such as a variant's, one document at a time."""

    def attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        rows = [heads.flatten(0, 1) for heads in (q, k, v)]
        return _attend_one_by_one(attend, *rows, documents.bounds).view_as(q)

    return attend_within


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch._disable_dynamo  # torch.compiler.disable, but it loads the compiler when it is called
def _attend_one_by_one(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor
) -> Tensor:
    """What varlen_attn does, without its kernel: bit by bit as if each document stood alone."""
    lengths = bounds.diff().tolist()
    q, k, v = (heads.transpose(0, 1).split(lengths, 1) for heads in (q, k, v))
    outs = []
    for document in zip(q, k, v):
        one_row = (heads[None] for heads in document)         # (1, H, tokens, K)
        outs.append(attend(*one_row, None)[0])
    return torch.cat(outs, 1).transpose(0, 1)
