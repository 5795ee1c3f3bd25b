"""Types of numbers as flags name them, and arrays of the host as tensors, without waiting for the
device.
"""

import numpy as np
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of arithmetic


def pinned(values: np.ndarray, device: torch.device) -> Tensor:
    """On the host; pinned memory lets a copy to a GPU run beside its work."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


class OnHost:
    """A tensor that stays on the host on its way through FSDP, which copies what it is given to the
    GPU, and waits for it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def unwrapped(tensor: Tensor | OnHost) -> Tensor:
    return tensor.tensor if isinstance(tensor, OnHost) else tensor


def copied(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device."""
    return pinned(values, device).to(device, non_blocking=True)
