"""GPUs that a run can be planned for, and what they do."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    peak: float        # bf16 FLOP/s without sparsity
    memory: float      # GiB
    efficiency: float  # the share of its FLOP/s that training is taken to reach


GPUS = {
    "A100-40GB": GPU(312e12, 39.5, 0.55),
    "A100-80GB": GPU(312e12, 79.2, 0.55),
    "H100-80GB": GPU(989e12, 79.1, 0.40),
    "H200": GPU(989e12, 139.8, 0.40),
    "A6000-48GB": GPU(154.8e12, 47.5, 0.55),
}


@dataclass
class Flags:
    # forecast
    plan: bool = False                  # only say what the run would need, on this hardware:
    gpus: int = 8                       # how many
    gpu: str = "A100-80GB"              # a name in lib.gpus.GPUS


def gpu_peak(device: torch.device) -> float | None:
    """bf16 FLOP/s of this GPU, where it is known."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_name(device)
    return next((gpu.peak for name, gpu in GPUS.items() if name.split("-")[0] in found), None)
