"""GPUs that a run can be planned for, and what they do."""

import re
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
    "A10G-24GB": GPU(70e12, 22.0, 0.55),
    "RTX4090-24GB": GPU(165.2e12, 23.5, 0.55),  # GeForce sums in fp32 at half the speed of fp16
    "RTX3090-24GB": GPU(71e12, 23.5, 0.55),
}
OTHERS = {  # words by which CUDA tells a card of another speed from one above
    "H100": {"PCIe", "NVL"},
    "RTX4090": {"D", "Laptop"},
    "RTX3090": {"Ti", "Laptop"},
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
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))  # NVIDIA GeForce RTX 4090
    for name, gpu in GPUS.items():
        card = name.split("-")[0]
        if card.removeprefix("RTX") in words and not words & OTHERS.get(card, set()):
            return gpu.peak
    return None
