"""GPUs that a run can be planned for, and what they do."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    peak: float        # FLOP/s of bf16, or else fp16, that is added up in fp32, without sparsity
    memory: float      # GiB that CUDA has of it
    efficiency: float  # the share of its FLOP/s that training is taken to reach
    bf16: bool = True  # whether it has units for it


# Peaks are from NVIDIA's data sheets of A10, A100, H100, H200, L4 (there twice as much, with
# sparsity), T4 and V100 SXM2, and for the others from the white papers of their architectures
# (GA102, Ada, RTX Blackwell: "Peak FP16 Tensor TFLOPS with FP32 Accumulate"). They are
# multiprocessors times boost clock times 1,024 for a clock, 512 for GeForce and A10G, which add up
# in fp32 at half the speed of fp16. Memory is less than on the box where some keeps errors (ECC).
GPUS = {
    "A100-40GB": GPU(312e12, 39.5, 0.55),
    "A100-80GB": GPU(312e12, 79.2, 0.55),
    "H100-80GB": GPU(989e12, 79.1, 0.40),
    "H200": GPU(989e12, 139.8, 0.40),
    "A6000-48GB": GPU(154.8e12, 47.5, 0.55),
    "A10G-24GB": GPU(70e12, 22.0, 0.55),
    "RTX5090-32GB": GPU(209.5e12, 31.3, 0.55),
    "RTX4090-24GB": GPU(165.2e12, 23.5, 0.55),
    "RTX3090-24GB": GPU(71e12, 23.5, 0.55),
    # 150, 72 and 70 W do not last for the boost clock; how far they do is a guess
    "A10-24GB": GPU(125e12, 22.0, 0.45),
    "L4-24GB": GPU(121e12, 22.0, 0.40),
    "T4-16GB": GPU(65e12, 14.5, 0.40, bf16=False),
    "V100-32GB": GPU(125e12, 31.7, 0.50, bf16=False),
}
OTHERS = {  # words by which CUDA tells a card of another speed from one above
    "H100": {"PCIe", "NVL"},
    "V100": {"PCIE", "FHHL"},
    "RTX5090": {"D", "Laptop"},
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
    """FLOP/s of this GPU, of bf16 where it has that, else fp16; None where it is not known."""
    if device.type != "cuda":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))  # NVIDIA GeForce RTX 4090
    for name, gpu in GPUS.items():
        card = name.split("-")[0]
        if card.removeprefix("RTX") in words and not words & OTHERS.get(card, set()):
            return gpu.peak
    return None
