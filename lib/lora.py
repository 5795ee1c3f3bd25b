"""Low-rank adapters on frozen matrices (LoRA), these in four bits (QLoRA), and parameters that stay
as they are.
"""

import contextlib
import fnmatch
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dropout import DroppedProduct, row_keys
from lib.errors import BadInput
from lib.nf4 import nf4_product, packed_shapes
from lib.rows import fill_normal, local_rows
from lib.tensors import copied


@dataclass
class Flags:
    # LoRA

    # train adapters of this rank on the frozen --init_from; 0 trains all weights
    lora_rank: int = 0
    # their product counts lora_alpha / lora_rank times
    lora_alpha: float = 16.0
    # the matrices of each block that get one
    lora_targets: str = "query,key,value,out,gate,up,down"
    # share of an adapter's inputs that are left out in training
    lora_dropout: float = 0.0
    # how the blocks' frozen matrices are kept; nf4 is QLoRA
    quantize: Literal["none", "nf4"] = "none"
    # parameters that stay as they are: names such as 'embedding.*' 'blocks.[0-7].*'
    freeze: tuple[str, ...] = ()


TARGETS = {  # the matrices of a block that adapters may go on, by the last word of their names
    "query": "attention", "key": "attention", "value": "attention", "out": "attention",
    "gate": "feed_forward", "up": "feed_forward", "down": "feed_forward",
}  # fmt: skip


class FrozenLinear(nn.Module):
    """A matrix W (out, in) that stays as it is, with an adapter if rank > 0:
    y = x W^T + (alpha / rank) (x A^T) B^T, A (rank, in), B (out, rank) (LoRA, Hu et al. 2021,
    section 4.1).

    A starts random and B at zero, so training starts from the base model. W has the type that it
    came with, or is kept in NF4 (QLoRA, Dettmers et al. 2023, section 3); A and B are fp32. In
    training A may miss some of x, see `choose_dropped`.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, nf4: bool):
        super().__init__()
        num_out, num_in = base.weight.shape
        self.nf4, self.scale = nf4, alpha / rank if rank else 0.0
        self.dropout, self.keys = 0.0, None
        if nf4:
            for name, shape in packed_shapes(num_out, num_in).items():
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
        scale = self.scale
        if torch.is_grad_enabled() and self.dropout:
            low = DroppedProduct.apply(x, self.lora_A, self.keys, self.dropout)
            scale = self.scale / (1 - self.dropout)
        else:
            low = F.linear(x, self.lora_A)
        return y + scale * F.linear(low, self.lora_B)


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


def choose_dropped(model: nn.Module, batch, config):
    """Choose which inputs the adapters miss in the forward and backward pass over a batch.

    A share of config.lora_dropout, and what stays counts as much more, as in PEFT. What is left out
    of a row is a function of config.seed, the sequence's number in the run, the matrix, the place
    in the row and the channel. Where no gradient is asked for, as in evaluation, all of it is there.
    """
    if not config.lora_dropout:
        return
    found = model.named_modules()
    adapted = {name: m for name, m in found if isinstance(m, FrozenLinear) and m.scale}
    keys = row_keys(list(adapted), batch.numbers, len(batch.tokens), config.seed)
    for part, of_rows in zip(adapted.values(), copied(keys, batch.tokens.device)):
        part.dropout, part.keys = config.lora_dropout, of_rows


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
