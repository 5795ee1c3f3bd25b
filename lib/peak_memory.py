"""Memory: how much a step takes at most, and how much is there."""

import contextlib
import os

import numpy as np
import torch

from lib.world import local


def peak_memory(trial, device: torch.device) -> int:
    """Most bytes that tensors hold during one more step of trial: a model, optimizers and step().

    On a CPU: weights and moments, which are there before, and on top what the allocator gives out
    and takes back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trial.step()
        return torch.cuda.max_memory_allocated(device)
    before = list(trial.model.parameters())
    for optimizer in trial.optimizers:
        for state in optimizer.state.values():
            before += state.values()
    with no_stderr(), torch.profiler.profile(profile_memory=True) as recorded:
        trial.step()
    events = recorded.profiler.kineto_results.events()
    memory_events = [event for event in events if event.name() == "[memory]"]
    memory_events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in memory_events]
    return sum(local(tensor).nbytes for tensor in before) + int(np.cumsum(changes).max())


@contextlib.contextmanager
def no_stderr():
    """The profiler has things to say that do not concern the reader of a table."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def capacity(device: torch.device) -> int:
    """Bytes of memory for this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
