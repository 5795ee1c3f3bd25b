"""A model is known again by names, shapes and values of all its weights, however it is stored."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

PART = 2**24  # numbers that are converted at a time


@torch.no_grad()
def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of every number of a model's named tensors, in hexadecimal digits.

    They may come in any order, one at a time, and of any type: each number counts as the fp32
    number that it becomes, so a model in bf16 and its copy in fp32 are the same. A tied matrix is
    named once.
    """
    lines = []
    for name, tensor in tensors:
        digest = hashlib.sha256()
        for part in tensor.to_dense().reshape(-1).split(PART):  # lib/decoding.py has packed ones
            digest.update(part.float().cpu().numpy().astype("<f4", copy=False))
        lines.append(f"{name} {tuple(tensor.shape)} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@torch.no_grad()
def first_rows_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What older runs know a model by: the first row of each tensor, in the order of its files."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor[:1].float().numpy().tobytes())
    return digest.hexdigest()
