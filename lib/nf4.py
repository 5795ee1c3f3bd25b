"""Matrices in four bits, NF4 with double quantisation (QLoRA, Dettmers et al. 2023, section 3), and
products with them.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import BadInput

NF4_BLOCK, NF4_GROUP = 64, 256  # weights with a common scale, and scales with a common constant


def packed_shapes(num_out: int, num_in: int) -> dict[str, tuple[int, int]]:
    """Of what `to_nf4` gives for a matrix (out, in).

    Raises ValueError for a width that the blocks do not divide.
    """
    if num_in % NF4_BLOCK:
        problem = f"which do not divide a width of {num_in}"
        raise BadInput(f"--quantize nf4 takes blocks of {NF4_BLOCK}, {problem}")
    groups = -(-num_out * num_in // NF4_BLOCK // NF4_GROUP)
    return {
        "codes": (num_out, num_in // 2),
        "scales": (num_out, num_in // NF4_BLOCK),
        "constants": (groups + 1, 4),
    }


def to_nf4(weight: Tensor) -> dict[str, Tensor]:
    """A matrix in NF4 with double quantisation, by bitsandbytes, as bytes in rows: two weights a
    byte; one scale a block; an fp32 constant (4 bytes) a group of scales, and at the end the mean
    of all scales.

    Raises ValueError where bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise BadInput("NF4 is made by bitsandbytes; pip install bitsandbytes") from None

    codes, state = quantize_4bit(
        weight.float().contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    constants = torch.cat((state.state2.absmax, state.offset[None]))
    rows = len(weight)
    return {
        "codes": codes.view(rows, -1),
        "scales": state.absmax.view(rows, -1),
        "constants": constants[:, None].view(torch.uint8),
    }


def from_nf4(codes: Tensor, scales: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that `to_nf4` packed."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    constants = constants.view(torch.float32).squeeze(1)
    group_state = QuantState(
        absmax=constants[:-1],
        code=_scale_values(codes.device),
        blocksize=NF4_GROUP,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=scales.flatten(),
        shape=torch.Size((len(codes), 2 * codes.size(1))),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=constants[-1],
        state2=group_state,
    )
    return dequantize_4bit(codes.view(-1, 1), state)


@functools.cache
def _scale_values(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


@torch.library.custom_op("plainllama::nf4_product", mutates_args=())
def nf4_product(
    x: Tensor, codes: Tensor, scales: Tensor, constants: Tensor, backwards: bool
) -> Tensor:
    """x W^T for W in NF4, or x W.

    An operator of its own, so that neither autograd nor the compiler keeps the whole of W for the
    backward pass, which makes it again.
    """
    weight = from_nf4(codes, scales, constants, x.dtype)
    return F.linear(x, weight.T if backwards else weight)


@nf4_product.register_fake
def _(x, codes, scales, constants, backwards):
    width = 2 * codes.size(1) if backwards else codes.size(0)
    return x.new_empty(*x.shape[:-1], width)


def _keep_nf4(ctx, inputs, output):
    _, codes, scales, constants, _ = inputs
    ctx.save_for_backward(codes, scales, constants)


def _nf4_gradients(ctx, grad):
    """Of x alone: W stays as it is."""
    x_grad = nf4_product(grad.contiguous(), *ctx.saved_tensors, True)
    return x_grad, None, None, None, None


nf4_product.register_autograd(_nf4_gradients, setup_context=_keep_nf4)
