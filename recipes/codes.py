"""Matrices as codes of four or eight bits in blocks, each with the largest magnitude in it as its scale, and what they
cost (QLoRA, Dettmers et al. 2023, sections 2 and 3; with double quantisation, in blocks of 64, NF4 is lib/nf4.py's).
"""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.errors import BadInput
from lib.lora import TARGETS

GROUP = 256  # scales with a common constant, where they are quantised too


class Form(NamedTuple):
    """How matrices are written: the values of a code, weights in a block, whether scales have eight bits."""

    code: str
    block: int = 64
    double: bool = False

    def __str__(self) -> str:
        return f"{self.code}, {self.block}{' DQ' if self.double else ''}"

    @property
    def bits(self) -> int:
        return 8 if self.code == "int8" else 4


def float_values(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """The magnitudes of a small floating-point number, as IEEE 754 would have them without infinity.

    >>> float_values(2, 1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits + (exponent > 0)
            found.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return found


def normal_values() -> Tensor:
    """NF4: quantiles of N(0, 1), 7 below and 8 above an exact 0 (section 3, with the offset of bitsandbytes)."""
    above, below = (torch.linspace(0.9677083, 0.5, count)[:-1].double() for count in (9, 8))
    return torch.cat((-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above)))


def values_of(code: str) -> Tensor:
    """The rising values of a code, the largest 1."""
    magnitudes = {
        "FP4": [0, 0.0625, 2, 3, 4, 6, 8, 12],  # of bitsandbytes
        "FP4 E2M1": float_values(2, 1),
        "FP4 E3M0": float_values(3, 0),
        "int4": range(8),
        "int8": range(128),
    }
    if code != "NF4" and code not in magnitudes:
        raise BadInput(f"{code} is none of NF4, {', '.join(magnitudes)}")
    if code == "NF4":
        found = normal_values()
    else:
        found = torch.tensor([sign * each for each in magnitudes[code] for sign in (1, -1)], dtype=torch.float64)
    return (found / found.max()).unique().float()


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Each of x as the nearest of rising values."""
    return values[torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)]


def with_scales(blocks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (N, size) as values times a scale, and the scales (N, 1)."""
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(blocks.dtype).tiny)
    return nearest(blocks / scales, values), scales


def restored(weight: Tensor, form: Form) -> Tensor:
    """The matrix that is read back from its codes. Raises BadInput where blocks do not divide it."""
    if weight.numel() % form.block:
        raise BadInput(f"blocks of {form.block} do not divide a matrix of {weight.numel():,} weights")
    codes, scales = with_scales(weight.reshape(-1, form.block), values_of(form.code))
    if form.double:
        scales = restored_scales(scales)
    return (codes * scales).view_as(weight)


def restored_scales(scales: Tensor) -> Tensor:
    """Double quantisation: scales (N, 1) less their mean in eight bits, in groups with a constant each."""
    from bitsandbytes.functional import create_dynamic_map

    mean = scales.mean()
    padded = nn.functional.pad((scales - mean).flatten(), (0, -len(scales) % GROUP)).view(-1, GROUP)
    codes, constants = with_scales(padded, create_dynamic_map())
    return (codes * constants).flatten()[: len(scales), None] + mean


def size(numel: int, form: Form) -> int:
    """Bits of a matrix of so many weights: codes and scales of fp32, or of eight bits with constants and their mean.

    >>> size(2**24, Form("NF4")) / 2**24, round(size(2**24, Form("NF4", 64, True)) / 2**24, 4)
    (4.5, 4.127)
    """
    scales = numel // form.block
    if not form.double:
        return form.bits * numel + 32 * scales
    return form.bits * numel + 8 * scales + 32 * -(-scales // GROUP) + 32


class Quantized(NamedTuple):
    model: nn.Module
    errors: list[float]  # of each matrix: the norm of what is wrong, over its own
    bits: float          # a weight


@torch.no_grad()
def quantized(model: nn.Module, form: Form) -> Quantized:
    """A copy of a model in which the matrices of the blocks are what is read back; embeddings stay, as in QLoRA."""
    model, errors, bits, numel = copy.deepcopy(model), [], 0, 0
    for block in model.blocks:
        for name, part in TARGETS.items():
            weight = getattr(getattr(block, part), name).weight
            again = restored(weight, form)
            errors.append(float((again - weight).norm() / weight.norm()))
            bits, numel = bits + size(weight.numel(), form), numel + weight.numel()
            weight.copy_(again)
    return Quantized(model, errors, bits / numel)
