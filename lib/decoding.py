"""What a model is given so that it writes fast: on a CPU matrices that are read fast for one row, or
as whole numbers; on a GPU steps that are recorded."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import BadInput
from lib.recording import Recorded

Quantize = Literal["none", "int8"]
FEW = 16    # rows up to which the product with whole numbers is the faster one
WIDTH = 32  # what it wants the matrix's rows to be a multiple of


def prepare(model: nn.Module, quantize: Quantize) -> nn.Module:
    """The model, made ready to read and write: see `lay_out`, `Int8Linear`, and lib/recording.py.

    Raises ValueError for int8 on a GPU, which has no product for it here.
    """
    on_gpu = model.norm.weight.device.type == "cuda"
    if on_gpu and quantize != "none":
        raise BadInput("--quantize int8 is for a CPU")
    if on_gpu:
        model.hidden = Recorded(model)
    if quantize == "none":
        lay_out(model)
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model


def lay_out(model: nn.Module):
    """Let the matrices of fp32 on a CPU lie column by column.

    A product with one row, the states of one token, then reads them up to five times as fast; one
    with many rows takes as long as before. Shapes and values stay.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            if weight.device.type == "cpu" and weight.itemsize == 4:
                weight.data = weight.data.t().contiguous().t()


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
