"""The processes of a run and the machine that each is on: joining them, agreeing, and what the hardware does well."""

import contextlib
import ctypes
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lib.errors import BadInput
from lib.processes import end_with_parent
from lib.tensors import DTYPES


@dataclass
class Flags:
    # machine
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """of the arithmetic, weights stay fp32; auto: bf16 where it is faster, else fp32; fp16, with a scaled loss, is for
    GPUs without bf16 (T4, V100, RTX 20)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: where there is a compiler, if the run is long enough"""
    reshard_after_forward: bool = True
    """give gathered weights back until the backward pass; costs time, saves memory"""
    reduce_each: bool = False           # reduce gradients with every micro-batch, not the last; the same
    shard_over: int = 0                 # neighbouring processes that share one copy of the model; 0 is all of them
    deterministic: bool = False         # on a GPU: the same bits again, slower; a CPU always does that


def join_world(deterministic: bool = False) -> torch.device:
    """Join the process group that torchrun describes; without torchrun, a world of one. Returns the device."""
    cuda = torch.cuda.is_available()
    if cuda:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.use_deterministic_algorithms(deterministic)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()  # torchrun, which cannot end its processes when it is killed itself
        store, rank, world = next(dist.rendezvous("env://"))
        # after --max-restarts the keys of the last attempt are still in the store
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if cuda:
        return torch.device("cuda", torch.cuda.current_device())
    tune_cpu()
    return torch.device("cpu")


def tune_cpu():
    """Two things without which a CPU of several cores trains at two thirds of its speed.

    gloo's threads must not get OpenMP threads of their own: once there are more of these than cores, all of them go to
    sleep between any two operations. A thread keeps the number that is set when it first has work to share. And
    large tensors must come from memory that was used before, not from new pages of the system (glibc's mallopt).
    """
    num_threads = torch.get_num_threads()
    if num_threads > 1:
        torch.set_num_threads(1)
        works, part, world = [], torch.zeros(2**18), dist.get_world_size()
        for _ in range(24):
            works.append(dist.all_reduce(part.clone(), async_op=True))
            works.append(dist.all_gather([torch.empty_like(part) for _ in range(world)], part, async_op=True))
            works.append(dist.reduce_scatter(part.clone(), [part.clone() for _ in range(world)], async_op=True))
        for work in works:
            work.wait()
        torch.set_num_threads(num_threads)
    keep_freed_memory(True)


def keep_freed_memory(keep: bool):
    """Let glibc keep what is freed for the next tensor, up to 2 GB, or go back to its defaults."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            glibc = ctypes.CDLL("libc.so.6")
            glibc.mallopt(-4, 0 if keep else 65_536)             # M_MMAP_MAX: allocations with pages of their own
            glibc.mallopt(-1, 2**31 - 1 if keep else 128 * 1024)  # M_TRIM_THRESHOLD: bytes that are not given back


def leave():
    """End the process without Python's own ending, in which a thread of gloo that still holds a tensor can abort it
    (pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_first_rank(action: Callable[[], None], group: dist.ProcessGroup | None = None):
    """Run action on the first rank while the others wait. Raises OSError or ValueError on all where it does there."""
    problem = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [OSError(error.errno, error.strerror, error.filename and str(error.filename))]
        except ValueError as error:
            problem = [error]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0]:
        raise problem[0]


def from_first_rank(find: Callable[[], str]) -> str:
    """What `find` returns on the first rank, on all of them. Raises ValueError on all where it does so there."""
    found, problem = "", ""
    if dist.get_rank() == 0:
        try:
            found = find()
        except ValueError as error:
            problem = str(error)
    answer = [found, problem]
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise BadInput(answer[1])
    return answer[0]


def on_all(action: Callable, group: dist.ProcessGroup | None = None) -> list:
    """What action returns on each process. ValueError or OSError on one is a ValueError on all."""
    value = problem = None
    try:
        value = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, (value, problem), group=group)
    for _, problem in everybodys:
        if problem:
            raise BadInput(problem)
    return [value for value, _ in everybodys]


def all_agree(mine: bool, group: dist.ProcessGroup | None = None) -> bool:
    flag = torch.tensor(int(mine))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)


def my_share() -> slice:
    """Every so manieth of a list that the processes divide among them."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def make_mesh(shard_over: int, device: torch.device) -> DeviceMesh:
    """All ranks in a row; with shard_over in rows of that many, which share a copy and send each other gradients."""
    world, size = dist.get_world_size(), shard_over
    if not size or size == world:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def settled_dtype(choice: str, device: torch.device) -> str:
    """The name of the arithmetic that --dtype means on this device."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    return DTYPES[settled_dtype(choice, device)]


def arithmetic(config) -> torch.dtype:
    """The type of a run's arithmetic; bf16 while auto is not settled, as on the GPUs of a plan."""
    return DTYPES.get(config.dtype, torch.bfloat16)


def should_compile(choice: str, device: torch.device, run_flops: float) -> bool:
    """auto: on a GPU with Triton; on a CPU with a C++ compiler, where the run is long enough to earn the time back."""
    if choice != "auto":
        return choice == "on"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return shutil.which(os.environ.get("CXX", "g++")) is not None and run_flops > 1e15


def device_name(device: torch.device) -> str:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def memory(device: torch.device) -> int:
    """Most bytes held so far by this rank: of GPU memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
