"""The rows of a parameter that this process holds."""

import hashlib

import torch
from torch import Tensor

INIT_ROWS = 128  # rows of a matrix that are drawn from one seed


def local_rows(weight: Tensor) -> tuple[int, Tensor]:
    """The number of the first row that this process holds of a parameter, sharded or whole, and
    the rows."""
    if not hasattr(weight, "to_local"):  # it is no DTensor
        return 0, weight.data
    # only here: it takes half a second
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return offset[0], weight.detach().to_local()


def fill_normal(weight: Tensor, std: float, key: str):
    """Draw a matrix from normal(0, std), every INIT_ROWS rows from a seed of their own, of key.

    So any number of processes, each drawing the rows that it holds, makes the same matrix.
    """
    first, local = local_rows(weight)
    device = local.device
    num_rows, width = weight.shape
    first_begin = first - first % INIT_ROWS
    for begin in range(first_begin, first + len(local), INIT_ROWS):
        text = f"{key} {begin}"
        digest = hashlib.sha256(text.encode()).digest()
        seed = int.from_bytes(digest[:7])
        generator = torch.Generator(device).manual_seed(seed)
        shape = (min(INIT_ROWS, num_rows - begin), width)
        drawn = torch.normal(0.0, std, shape, generator=generator, device=device)
        place = begin - first  # of the drawn rows in local; below 0 some are another process's
        target = local[max(0, place) : place + INIT_ROWS]
        held = drawn[max(0, first - begin) :]
        target.copy_(held[: len(target)])
