"""The most bytes that tensors hold during a training step, on one rank of many, without having the memory.

A fake process group and fake tensors (which have shapes, but no data) take the place of the GPUs.

    python tests/simulate.py --size 7B --seq_len 4096 --micro_batch 1 --checkpointing full --gpus 8
"""

import contextlib
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from conftest import forecast_of
from lib import lora
from lib.tensors import DTYPES
from lib.world import make_mesh
from model import SIZES, ModelConfig, Transformer


@contextlib.contextmanager
def fake_tensors():
    """Tensors made inside have no data; where code asks one of them yes or no (all targets count?), it says yes."""
    before = FakeTensor.__bool__
    FakeTensor.__bool__ = lambda self: True
    try:
        with FakeTensorMode():
            yield
    finally:
        FakeTensor.__bool__ = before


def kept_for_backward(forward, constants) -> int:
    """Bytes that autograd keeps when forward is called, as its hooks see them; constants are not counted."""
    known, kept = {t.untyped_storage().data_ptr() for t in constants}, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = forward()
    assert y.requires_grad
    return sum(kept.values())


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors' storages that are made while it is entered, and their largest sum."""

    def __enter__(self):
        self.now = self.peak = 0
        self.sizes = {}
        self.resize = torch.UntypedStorage.resize_  # FSDP empties and refills storages
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on its shards come here on their own
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self._gone, key)
            self._set(key, storage.size())

    def _resized(self, storage: torch.UntypedStorage, size: int):
        self.resize(storage, size)
        if storage._cdata in self.sizes:
            self._set(storage._cdata, size)

    def _set(self, key: int, size: int):
        self.now += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int):
        self.now -= self.sizes.pop(key)


def peak(shape: ModelConfig, config: train.Config, world: int, fake: bool) -> int:
    """Bytes at the peak of the second of two steps; with fake=False the work is really done, by a world of one."""
    backend, store = ("fake", FakeStore()) if fake else ("gloo", dist.HashStore())
    dist.init_process_group(backend, rank=0, world_size=world, store=store)
    try:
        device, dtype = torch.device("cpu"), DTYPES[config.dtype]
        mesh = make_mesh(config.shard_over, device)
        with fake_tensors() if fake else contextlib.nullcontext(), Allocated() as allocated:
            torch.set_default_dtype(dtype if config.lora_rank else torch.float32)
            model = Transformer(shape)
            torch.set_default_dtype(torch.float32)
            model.to = lambda dtype: model  # fake weights cannot be converted, and have this type already
            model = lora.prepare(model, config, dtype)
            model = train.shard(model, config, mesh)
            optimizers, guard = train.make_optimizers(model, config), train.Guard(config.spike, device)
            tokens = torch.ones(config.micro_batch, config.seq_len, dtype=torch.long)
            batch = train.Batch(tokens, tokens, None, range(config.micro_batch))
            batches = [batch] * (config.batch_size // world // config.micro_batch)
            for _ in range(2):
                allocated.peak = 0
                train.train_step(model, optimizers, batches, 1e-4, config, guard)
            return allocated.peak
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    import tyro

    settings = tyro.cli(train.Config, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    found = peak(SIZES[settings.size], settings, settings.gpus, fake=True)
    expected = sum(forecast_of(SIZES[settings.size], settings, settings.gpus, compiled=False).values())
    print(f"simulated {found / 2**30:.2f} GiB, forecast {expected / 2**30:.2f} GiB")
