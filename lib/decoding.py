"""What a model is given so that it writes fast: on a CPU matrices that lie as their products want
them, or whole numbers, and one thread for little work; on a GPU steps that are recorded."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import BadInput
from lib.recording import Recorded

Quantize = Literal["none", "int8"]
FEW = 16    # rows up to which the product with whole numbers is the faster one
WIDTH = 32  # what it wants the matrix's rows to be a multiple of
LITTLE = 2**26  # multiplications up to which one thread is faster than waking others for each part


@contextlib.contextmanager
def threads_for(work: int) -> Iterator[None]:
    """One thread for so many multiplications, where they are few. Others may be busy elsewhere."""
    threads = torch.get_num_threads()
    if threads == 1 or work > LITTLE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(model: nn.Module, quantize: Quantize) -> nn.Module:
    """The model, made ready to read and write, not to train or save: see the classes below, and
    lib/recording.py.

    Raises ValueError for int8 on a GPU, which has no product for it here.
    """
    on_gpu = model.norm.weight.device.type == "cuda"
    if on_gpu and quantize != "none":
        raise BadInput("--quantize int8 is for a CPU")
    if on_gpu:
        model.hidden = Recorded(model)
    elif quantize == "int8":
        replace_matrices(model, Int8Linear)
    elif torch.backends.mkldnn.is_available():  # oneDNN
        if model.norm.weight.dtype == torch.float32:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    lay_out(module)
        elif model.norm.weight.dtype == torch.bfloat16 and has_packed():
            replace_matrices(model, PackedLinear)
            for module in model.modules():
                if not isinstance(module, nn.Embedding | PackedLinear):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.float()
    return model


def has_packed() -> bool:
    """Whether this CPU multiplies packed matrices of bf16."""
    onednn = torch.backends.mkldnn.is_available()
    return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def replace_matrices(model: nn.Module, kind: type):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN, which for fp32, too, may be twice as fast as what PyTorch calls."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class ColumnLinear(nn.Linear):
    """A matrix of fp32 that lies column by column; shape and values are as before.

    One row, the states of one token, reads it up to five times as fast so. More rows are
    multiplied by oneDNN.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if rows < 2 or torch.is_grad_enabled():  # oneDNN's has no gradient
            return super().forward(x)
        return product(x, self.weight)


def lay_out(linear: nn.Linear):
    """Make it a ColumnLinear; one of a class of its own keeps that, and inherits the product."""
    kind = type(linear)
    own = () if kind is nn.Linear else (kind,)
    linear.__class__ = type(kind.__name__, (*own, ColumnLinear), {})
    linear.weight.data = linear.weight.data.t().contiguous().t()


class PackedLinear(nn.Module):
    """A matrix (out, in) of bf16 in the order in which oneDNN reads it fastest.

    Products are in bf16; x may be fp32, and what comes out is of its type. So the states of a model
    are fp32, and its cache, with which attention on a CPU is up to six times as fast.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x.bfloat16(), self.weight).to(x.dtype)


class Int8Linear(nn.Module):
    """A matrix (out, in) as whole numbers from -127 to 127, each of its rows with a scale.

    Products are in bf16; those of few rows are PyTorch's own for such matrices.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1).clamp(min=1e-30)
        scales = (largest / 127).bfloat16()
        codes = weight / scales.float()[:, None]
        codes = codes.round().clamp(-127, 127).to(torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrix in fp32, as it counts."""
        return self.codes.float() * self.scales.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        # PyTorch's product reads past rows of another width, and may crash
        if len(rows) > FEW or rows.size(1) % WIDTH:
            products = F.linear(x.bfloat16(), self.codes.bfloat16())
            return (products * self.scales).to(x.dtype)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.codes, self.scales)
        return y.view(*x.shape[:-1], -1).to(x.dtype)
