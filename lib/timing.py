"""How long something takes, and what the machine reaches today."""

import functools
import gc
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from lib.world import compute_dtype


def timed(action: Callable, times: int, device: torch.device) -> float:
    """Seconds that so many times take, the same answer in every process.

    Python's garbage collector waits meanwhile.
    """
    dist.barrier()
    gc.disable()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    gc.enable()
    dist.broadcast(seconds, src=0)
    return seconds.item()


def wait(device: torch.device):
    """Until a GPU has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def matrix_product(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large square matrix product: what this machine reaches today."""
    size = 8192 if device.type == "cuda" else 2048
    kind = compute_dtype(dtype, device)
    first, second = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    seconds = [timed(lambda: first @ second, 1, device) for _ in range(7)]
    return 2 * size**3 / median(seconds)


def read_speed(device: torch.device) -> float:
    """Bytes a second at which a matrix of 1 GiB, larger than any cache, is read: memory's speed."""
    matrix = torch.ones(2**14, 2**14, device=device)
    matrix.sum()  # its pages are there
    seconds = [timed(matrix.sum, 1, device) for _ in range(7)]
    return matrix.nbytes / median(seconds)
