"""Low-rank adapters on frozen matrices (LoRA), these in four bits (QLoRA), and parameters that stay
as they are.
"""

import contextlib
import fnmatch
import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import BadInput
from lib.rows import fill_normal, local_rows


@dataclass
class Flags:
    # LoRA

    # train adapters of this rank on the frozen --init_from; 0 trains all weights
    lora_rank: int = 0
    # their product counts lora_alpha / lora_rank times
    lora_alpha: float = 16.0
    # the matrices of each block that get one
    lora_targets: str = "query,key,value,out,gate,up,down"
    # how the blocks' frozen matrices are kept; nf4 is QLoRA
    quantize: Literal["none", "nf4"] = "none"
    # parameters that stay as they are: names such as 'embedding.*' 'blocks.[0-7].*'
    freeze: tuple[str, ...] = ()


TARGETS = {  # the matrices of a block that adapters may go on, by the last word of their names
    "query": "attention", "key": "attention", "value": "attention", "out": "attention",
    "gate": "feed_forward", "up": "feed_forward", "down": "feed_forward",
}  # fmt: skip


NF4_BLOCK, NF4_GROUP = 64, 256  # weights with a common scale, and scales with a common constant


class FrozenLinear(nn.Module):
    """A matrix W (out, in) that stays as it is, with an adapter if rank > 0:
    y = x W^T + (alpha / rank) (x A^T) B^T, A (rank, in), B (out, rank) (LoRA, Hu et al. 2021,
    section 4.1).

    A starts random and B at zero, so training starts from the base model. W has the type that it
    came with, or is kept in NF4 (QLoRA, Dettmers et al. 2023, section 3); A and B are fp32.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, nf4: bool):
        super().__init__()
        num_out, num_in = base.weight.shape
        self.nf4, self.scale = nf4, alpha / rank if rank else 0.0
        if nf4:
            if num_in % NF4_BLOCK:
                problem = f"which do not divide a width of {num_in}"
                raise BadInput(f"--quantize nf4 takes blocks of {NF4_BLOCK}, {problem}")
            groups = -(-num_out * num_in // NF4_BLOCK // NF4_GROUP)
            shapes = {  # of what `to_nf4` gives
                "codes": (num_out, num_in // 2),
                "scales": (num_out, num_in // NF4_BLOCK),
                "constants": (groups + 1, 4),
            }
            for name, shape in shapes.items():
                empty = torch.empty(shape, dtype=torch.uint8, device=base.weight.device)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        else:
            self.weight = base.weight.requires_grad_(False)
        if rank:
            like = dict(dtype=torch.float32, device=base.weight.device)
            self.lora_A = nn.Parameter(torch.zeros(rank, num_in, **like))
            self.lora_B = nn.Parameter(torch.zeros(num_out, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        if self.nf4:
            y = nf4_product(x, self.codes, self.scales, self.constants, False)
        else:
            y = F.linear(x, self.weight)
        if not self.scale:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


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


def add_adapters(
    model: nn.Module, rank: int, alpha: float, targets: list[str], nf4: bool
) -> nn.Module:
    """Freeze the model and give the target matrices of every block an adapter; with nf4, all
    matrices of the blocks are kept in NF4.

    Raises ValueError for a width that NF4's blocks do not divide.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for name, part in TARGETS.items():
            parent = getattr(block, part)
            if hasattr(parent, name):  # a variant may lack it
                rank_here = rank if name in targets else 0
                frozen = FrozenLinear(getattr(parent, name), rank_here, alpha, nf4)
                setattr(parent, name, frozen)
    return model


@contextlib.contextmanager
def without_adapters(model: nn.Module):
    """Inside, the model computes as if it had no adapters."""
    modules = [(part, part.scale) for part in model.modules() if isinstance(part, FrozenLinear)]
    try:
        for part, _ in modules:
            part.scale = 0.0
        yield
    finally:
        for part, scale in modules:
            part.scale = scale


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, none for a model without."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            found[name] = parameter
    return found


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int):
    """A as wide as PEFT's uniform numbers, B zero; any number of processes draws the same."""
    for name, weight in adapters(model).items():
        if name.endswith("lora_A"):
            fill_normal(weight, (3 * weight.size(1)) ** -0.5, f"{seed} {name}")
        else:
            local_rows(weight)[1].zero_()


def prepare(model: nn.Module, config, dtype: torch.dtype) -> nn.Module:
    """Give a new model adapters, if --lora_rank asks for them, and freeze what --freeze names.

    Beside adapters, frozen weights need no more digits than the arithmetic.
    """
    if config.lora_rank:
        targets, nf4 = config.lora_targets.split(","), config.quantize == "nf4"
        add_adapters(model.to(dtype), config.lora_rank, config.lora_alpha, targets, nf4)
    freeze(model, config.freeze)
    return model


def freeze(model: nn.Module, patterns: tuple[str, ...]):
    """Take the parameters whose names fit a pattern out of training.

    Raises ValueError where none does, or all do.
    """
    for pattern in patterns:
        names = fnmatch.filter(dict(model.named_parameters()), pattern)
        if not names:
            example = "blocks.0.attention.out.weight"
            raise BadInput(f"--freeze {pattern} fits no parameter such as {example}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"--freeze {' '.join(patterns)} leaves nothing to train")
