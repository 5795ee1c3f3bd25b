"""Train a LLaMA-2: one loop for one laptop or many GPUs.

    python train.py                                             # the standard library, three minutes on two cores
    python train.py --data data/NAME --size 15M --out out/RUN
    torchrun --nproc_per_node 8 train.py --data data/NAME ...   # the same run on 8 GPUs
    python train.py --resume out/RUN                            # continues it exactly

    python train.py --plan --size 7B --seq_len 4096 --gpus 8 --gpu A100-80GB     # would it fit, how long would it take

Every run joins a process group and shards its model over it, also a run of one process. The batch of a step
is a pure function of (dataset, seed, step); processes and micro-batches only divide the work.
"""

from lib.cli import git_commit, run_command  # isort: skip (first: lib refuses old Pythons and Windows)

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from data import Batch, Mixture, Tokenizer, mixture_weights, read_meta
from lib import forecast as forecasts
from lib import kernels, lora, probe
from lib.checkpoint_index import Reader
from lib.checkpoints import (
    HASHES,
    check_hashes,
    has_checkpoint,
    hashes,
    named_by_last,
    newest_first,
    remove,
    remove_old,
)
from lib.datasets import changed_file
from lib.files import sync, write_whole
from lib.forecast import GPUS, count_parameters, flops_per_token, gpu_peak
from lib.kernels import IGNORE, Documents
from lib.lora import TARGETS, adapters, without_adapters
from lib.processes import end_with_parent
from lib.records import read_json
from lib.runs import append_row, held, is_record, read_log, read_run
from lib.tokenizer import find_tokenizer
from model import (
    SIZES,
    ModelConfig,
    Transformer,
    adapter_settings,
    check_code,
    checkpoint_folder,
    code_probe,
    config_to_hugging_face,
    find_base,
    fingerprint,
    is_finite,
    is_known,
    load_weights,
    read_config,
    readable,
)

HERE = Path(__file__).parent


@dataclass
class Config:
    """Train a LLaMA-2. The defaults suit the laptop size; larger models want a lower learning rate."""

    # where
    data: tuple[str, ...] = ("data/stdlib",)  # dataset folders made by data.py; FOLDER:WEIGHT draws from several
    out: str = "out/stdlib"             # the run's folder: checkpoints, log.jsonl, loss.png
    resume: str = ""                    # folder of a run to continue; its own flags are taken
    init_from: str = ""                 # model to start from: anything that model.load reads
    anyway: bool = False                # also go on with a run of code that computes something else than this
    # what
    size: str = "laptop"                # a name in model.SIZES; the vocabulary is always the dataset's
    dim: int = 0                        # width; 0 here and in the next four takes the number of --size
    num_layers: int = 0                 # blocks
    num_heads: int = 0                  # query heads
    num_kv_heads: int = 0               # key/value heads; with --num_heads given, as many
    ffn_dim: int = 0                    # width of the feed-forward layers
    rope_scale: float = 0.0             # position interpolation; 0 keeps the model's
    seq_len: int = 256                  # tokens of a sequence, and the context window of a new model
    pack: bool = False                  # fill sequences with whole documents that do not see each other
    # LoRA
    lora_rank: int = 0                  # train adapters of this rank on the frozen --init_from; 0 trains all weights
    lora_alpha: float = 16.0            # their product counts lora_alpha / lora_rank times
    lora_targets: str = ",".join(TARGETS)  # the matrices of each block that get one
    quantize: Literal["none", "nf4"] = "none"  # how the blocks' frozen matrices are kept; nf4 is QLoRA
    # how long
    steps: int = 1350                   # optimizer steps; the learning rate's schedule ends there
    epochs: float = 0.0                 # instead of --steps: so often as many sequences as the sources have together,
    #                                     rounded up to a step
    batch_size: int = 8                 # sequences in an optimizer step, over all processes
    micro_batch: int = 0                # sequences in a forward pass of one process; 0 takes its whole share
    stop_at: int = 0                    # leave after this step with a checkpoint, to be resumed; 0 is never
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon takes the blocks' matrices, AdamW keeps the rest
    learning_rate: float = 2e-3         # peak
    warmup: float = 0.02                # steps, or below 1 a fraction of all steps
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # after it; wsd: constant, then linear
    decay: float = 0.2                  # of wsd: the fraction of all steps in which the learning rate falls
    final_lr: float = 0.1               # fraction of the peak that is left at the last step
    weight_decay: float = 0.1           # of matrices; norms have none
    beta1: float = 0.9                  # of AdamW
    beta2: float = 0.99                 # of AdamW; small batches want it higher than LLaMA's 0.95
    grad_clip: float = 1.0              # largest norm of the gradient of all weights
    freeze: tuple[str, ...] = ()        # parameters that stay as they are: names such as 'embedding.*' 'blocks.[0-7].*'
    # regularization: in the gradient alone, the loss that is reported stays the plain one
    neftune: float = 0.0                # noise on the embeddings, uniform up to this / sqrt(tokens * width)
    label_smoothing: float = 0.0        # share of each target that is spread over the whole vocabulary
    z_loss: float = 0.0                 # weight of the squared logarithm of softmax's normalizer
    # preference pairs, which a dataset of pairs is trained on (DPO)
    dpo_beta: float = 0.1               # how much moving away from the first weights costs
    seed: int = 0                       # of the first weights and of the order of the data
    # when a step goes wrong
    max_bad_steps: int = 10             # stop after this many in a row whose loss or gradient is not finite, and after
    #                                     as many rollbacks to one checkpoint
    spike: float = 10.0                 # a loss or gradient norm this many standard deviations above its level
    on_spike: Literal["log", "skip", "rollback"] = "log"  # or no update, or the last checkpoint and on past that data
    # reporting
    log_every: int = 10                 # steps
    eval_every: int | str = 500         # steps, or `0.5epoch`; the last step is always evaluated
    eval_tokens: int = 131_072          # validation tokens, always the same ones
    save_every: int | str = 500         # steps, or `0.5epoch`; the last step is always saved
    keep: int = 2                       # newest checkpoints to keep
    keep_every: int = 0                 # steps; a checkpoint of a multiple of this is kept for good
    sample: str = "def "                # a text to continue when training ends; "" is none
    wandb: str = ""                     # project name; offline when nobody is logged in
    # machine
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic, weights stay fp32; auto: bf16 if it is faster
    compile: Literal["auto", "on", "off"] = "auto"   # auto: where a compiler is there and the run is long enough
    checkpointing: str = "none"         # activations computed again in the backward pass: none, selective, full, or 2
    #                                     for those of every second block, 3 for every third, ...
    shard_over: int = 0                 # neighbouring processes that share one copy of the model; 0 is all of them
    reshard_after_forward: bool = True  # give gathered weights back until the backward pass; costs time, saves memory
    reduce_each: bool = False           # reduce gradients with every micro-batch, not with the last; the same
    deterministic: bool = False         # on a GPU: the same bits again, slower; a CPU always does that
    # forecast
    plan: bool = False                  # only say what the run would need, on this hardware:
    gpus: int = 8                       # how many
    gpu: str = "A100-80GB"              # a name in lib.forecast.GPUS


# flags that may differ when a run is continued: but for rounding they do not change what is computed, and of --data
# the run's record knows the contents
FREE = {"resume", "out", "data", "micro_batch", "stop_at", "log_every", "eval_every", "save_every", "keep", "sample"}
FREE |= {"wandb", "compile", "checkpointing", "shard_over", "reshard_after_forward", "deterministic", "keep_every"}
FREE |= {"max_bad_steps", "reduce_each", "plan", "gpus", "gpu", "anyway"}


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up from zero to the peak, then down to final_lr of it as --schedule says; step counts from 0."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    begin = max(warmup, (1 - config.decay) * config.steps) if config.schedule == "wsd" else warmup
    last = config.steps - 1
    done = 1.0 if step >= last else max(0.0, step - begin) / max(1, last - begin)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}.get(config.schedule, 1 - done)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * left)


def in_steps(config: Config, epoch: float) -> Config:
    """The same run with all its lengths in steps, rounded up; an epoch has `epoch` of them.

    So the last step of --epochs takes what it lacks from the next epoch. Raises ValueError for a length it cannot read.
    """
    lengths = {}
    for name in ("eval_every", "save_every"):
        value = str(getattr(config, name))
        try:
            count = float(value.removesuffix("epoch")) * epoch if value.endswith("epoch") else int(value)
            lengths[name] = math.ceil(round(count, 6))
        except (ValueError, OverflowError):
            raise ValueError(f"--{name} {value} is neither a number of steps nor one of epochs (0.5epoch)") from None
    if config.epochs:
        lengths["steps"] = math.ceil(round(config.epochs * epoch, 6))
    return dataclasses.replace(config, **lengths)


# ---- set-up ----


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
        raise ValueError(answer[1])
    return answer[0]


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    if choice == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        choice = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]


def should_compile(choice: str, device: torch.device, run_flops: float) -> bool:
    """auto: on a GPU with Triton; on a CPU with a C++ compiler, where the run is long enough to earn the time back."""
    if choice != "auto":
        return choice == "on"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return shutil.which(os.environ.get("CXX", "g++")) is not None and run_flops > 1e15


def model_config(config: Config, vocab_size: int | None = None) -> ModelConfig:
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size} is not one of {', '.join(SIZES)}")
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale")
    changes = {name: getattr(config, name) for name in names if getattr(config, name)}
    if "num_heads" in changes:
        changes.setdefault("num_kv_heads", changes["num_heads"])
    if vocab_size:
        changes["vocab_size"] = vocab_size
    return dataclasses.replace(SIZES[config.size], max_seq_len=config.seq_len, **changes)


def first_config(config: Config, meta: dict) -> ModelConfig:
    """The shape of a new run's model. Raises ValueError where --init_from does not fit the other flags or the data."""
    if not config.init_from:
        if config.lora_rank:
            raise ValueError(f"--lora_rank {config.lora_rank} needs --init_from, the model to adapt")
        return model_config(config, meta["vocab_size"])
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
        if getattr(config, name):
            raise ValueError(f"--{name} {getattr(config, name)} does not go with --init_from, which brings its shape")
    if config.size != Config.size:
        raise ValueError(f"--size {config.size} does not go with --init_from, which brings its shape")
    check_code(config.init_from, config.anyway)
    shape = read_config(config.init_from)
    theirs = find_tokenizer(config.init_from)
    if theirs and Tokenizer(theirs).sha256 != meta["tokenizer"]["sha256"]:
        hint = f"make it with --tokenizer {theirs}"
        raise ValueError(f"--data {config.data[0]} was made with another tokenizer than {theirs}; {hint}")
    if shape.vocab_size < meta["vocab_size"]:
        sizes = f"{meta['vocab_size']}, larger than the model's {shape.vocab_size}"
        raise ValueError(f"--data {config.data[0]} has a vocabulary of {sizes}")
    if config.rope_scale:
        shape = dataclasses.replace(shape, rope_scale=config.rope_scale, max_seq_len=config.seq_len)
    if config.seq_len > shape.max_seq_len:
        raise ValueError(f"--seq_len {config.seq_len} exceeds the model's context window of {shape.max_seq_len}")
    return shape


def build(
    shape: ModelConfig, config: Config, device: torch.device, dtype: torch.dtype, compiled: bool, frozen: bool = False
) -> Transformer:
    """A model spread over all ranks, its weights yet to be set; the whole of it never exists anywhere.

    A frozen one is never trained, so its weights need no more digits than the arithmetic.
    """
    with torch.device("meta"):
        model = lora.prepare(Transformer(shape), config, dtype)
    if frozen:
        model.to(dtype).requires_grad_(False)
    model = shard(model, config, make_mesh(config, device), dtype, compiled).to_empty(device=device)
    if frozen:
        model.set_reshard_after_forward(True)  # no backward pass will do it
    if shape.tie_embeddings:
        model.unembedding.weight = model.embedding.weight
    return model


def make_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """All ranks in a row; with --shard_over in rows of that many, which share a copy and send each other gradients."""
    world, size = dist.get_world_size(), config.shard_over
    if not size or size == world:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: Transformer, config: Config, mesh: DeviceMesh, dtype: torch.dtype, compiled: bool) -> Transformer:
    """Checkpoint, compile, then shard every block, in this order: fp32 shards, dtype arithmetic, fp32 gradient sums.

    The loss is compiled too. The embedding is a unit apart, and the final norm one with the output layer, which the
    backward pass needs first.
    """
    # cast_forward_inputs would round the rotary tables to bf16 on their way into a block
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    unit = functools.partial(fully_shard, mp_policy=policy, mesh=mesh)
    for layer, block in enumerate(model.blocks):
        block.forward = checkpointed(block.forward, config.checkpointing, layer)
        if compiled:
            if mesh.device_type == "cpu":
                block.attention.attend = kernels.attend_on_cpu
            # the loop over documents that stands in for the GPU's kernel cannot be compiled
            block.forward = torch.compile(block.forward, fullgraph=not config.pack or mesh.device_type == "cuda")
        unit(block, reshard_after_forward=config.reshard_after_forward)
    if compiled:
        model.norm.forward = torch.compile(model.norm.forward, fullgraph=True)
    model.unembedding.cross_entropy = kernels.cross_entropy(config, compiled)
    if not model.config.tie_embeddings:
        unit(model.embedding, reshard_after_forward=config.reshard_after_forward)
        unit([model.norm, model.unembedding], reshard_after_forward=False)
    unit(model)
    for name in ("loss", "log_probs"):
        register_fsdp_forward_method(model, name)
    return model


def checkpointed(forward: Callable, mode: str, layer: int) -> Callable:
    """forward, but keeping less for the backward pass, which computes the rest again. The gradients are the same."""
    if mode == "none" or mode.isdigit() and layer % int(mode):
        return forward
    contexts = {"context_fn": kernels.keep_the_costly} if mode == "selective" else {}
    return lambda *inputs: torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **contexts)


def make_optimizers(model: Transformer, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, and with --optimizer muon also Muon (Jordan et al. 2024) for the blocks' matrices; moments are zero.

    What is frozen has no moments. Muon's steps are scaled to the size of AdamW's (Liu et al. 2025), so that one
    learning rate suits both.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = {p for p in model.blocks.parameters() if p.dim() >= 2 and config.optimizer == "muon"}
    hidden, others = [p for p in trained if p in blocks], [p for p in trained if p not in blocks]
    matrices = {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW([matrices, vectors], lr=config.learning_rate, betas=betas, fused=True)
    for p in others:
        step = torch.zeros((), device=p.device)
        adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(
        hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for p in hidden:
        muon.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return [adamw, muon]


# ---- a step ----


class MicroBatch(NamedTuple):
    tokens: Tensor    # (micro_batch, T) on the device
    targets: Tensor   # (micro_batch, T) on the host, where the loss finds what to leave out without waiting
    documents: Documents | None
    numbers: range = range(0)  # of the sequences in the run


def to_device(batch: Batch, device: torch.device, numbers: range = range(0)) -> MicroBatch:
    return batch._replace(numbers=numbers).to(device)


def step_batches(data: Mixture, config: Config, step: int, device: torch.device) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    numbers = data.numbers(step, config.batch_size, dist.get_rank(), dist.get_world_size())
    size = config.micro_batch or len(numbers)
    parts = (numbers[begin : begin + size] for begin in range(0, len(numbers), size))
    return [to_device(data.batch(part, config.seed), device, part) for part in parts]


def neftune(batch: MicroBatch, dim: int, config: Config) -> Tensor | None:
    """Noise (B, T, D) for the embeddings, uniform up to alpha / sqrt(T · D) (Jain et al. 2023), None without --neftune.

    On one kind of device that of a sequence is a function of the seed and of its number in the run alone.
    """
    if not config.neftune:
        return None
    noise = torch.empty(*batch.tokens.shape, dim, device=batch.tokens.device)
    for number, row in zip(batch.numbers, noise, strict=True):
        digest = hashlib.sha256(f"{config.seed} neftune {number}".encode()).digest()
        row.uniform_(-1, 1, generator=torch.Generator(noise.device).manual_seed(int.from_bytes(digest[:7])))
    return noise.mul_(config.neftune / math.sqrt(noise[0].numel()))


@contextlib.contextmanager
def added_noise(model: Transformer, noise: Tensor | None):
    """Inside, noise (B, T, D) is added to the embeddings."""
    if noise is None:
        yield
        return
    hook = model.embedding.register_forward_hook(lambda module, inputs, x: x + noise.to(x.dtype))
    try:
        yield
    finally:
        hook.remove()


def prefetch(make: Callable[[int], list[MicroBatch]], steps: range, device: torch.device) -> Iterator[list[MicroBatch]]:
    """make(step) for each step, one ahead of its use, in a thread beside the training."""
    set_device = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=set_device) as pool:
        ahead = pool.submit(make, steps[0]) if steps else None
        for step in steps:
            batches = ahead.result()
            ahead = pool.submit(make, step + 1) if step + 1 in steps else None
            yield batches


class Guard:
    """Judges a step by its loss and gradient norm before they do harm: on the device, so that nobody waits for it.

    The level of each is a running mean and variance, over about the last 50 steps. A spike lies more than `spike`
    standard deviations above (from step 100 on); it moves the level only as far as that, so one wild step does not hide
    the next, while a lasting change is followed in time.
    """

    SETTLED, MEMORY = 100, 50

    def __init__(self, spike: float, device: torch.device):
        self.spike = spike
        self.level = torch.zeros(5, device=device)  # steps judged; means of loss and norm; their variances
        self.passed_over = torch.zeros((), dtype=torch.long)  # steps' worth of data that rolling back has skipped

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(not finite, a spike), each true or false; the level has then taken notice."""
        count, mean, variance = self.level[0], self.level[1:3], self.level[3:5]
        values = torch.stack((loss, norm))
        bad = ~values.isfinite().all()
        limit = torch.where(count < self.SETTLED, math.inf, mean + self.spike * variance.sqrt())
        spike = ~bad & (values > limit).any()
        share = 1 / (count + 1).clamp(max=self.MEMORY)
        change = values.minimum(limit) - mean
        level = torch.cat((count[None] + 1, mean + share * change, (1 - share) * (variance + share * change.square())))
        self.level.copy_(torch.where(bad, self.level, level))
        return bad, spike


class Pairs(NamedTuple):
    """What n preference pairs came to, each (n,); or their sums."""

    loss: Tensor     # DPO's, nats
    margin: Tensor   # by how much the chosen answer's reward exceeds the rejected one's
    correct: Tensor  # 1 where the margin is above 0
    drift: Tensor    # log-probability of the chosen answer's targets, less that under the reference
    targets: Tensor  # how many these are

    def means(self, count: int) -> dict[str, float]:
        """Of sums over count pairs; kl is a proxy for the distance from the reference: the drift a target."""
        loss, margin, correct, drift, targets = (float(total) for total in self)
        return dict(loss=loss / count, margin=margin / count, accuracy=correct / count, kl=drift / max(1.0, targets))


def reference_log_probs(reference: Transformer, batch: MicroBatch) -> Tensor:
    """The log-probability of each target (B, T) under the model as it was before training; with LoRA, its base."""
    with torch.no_grad(), without_adapters(reference):
        return reference.log_probs(batch.tokens, batch.targets, batch.documents)


def compare(model: Transformer, reference: Transformer, batch: MicroBatch, beta: float) -> Pairs:
    """Direct preference optimization (Rafailov et al. 2023, equation 7) of rows that are chosen, rejected, chosen, …

    A reward is beta times the log-probability of an answer's targets, less that under the reference.
    """
    before = reference_log_probs(reference, batch)
    drifts = (model.log_probs(batch.tokens, batch.targets, batch.documents) - before).sum(1)
    chosen, rejected = drifts.unflatten(0, (-1, 2)).unbind(1)
    margin = beta * (chosen - rejected)
    counts = (batch.targets[::2] != IGNORE).sum(1).to(margin.device, non_blocking=True)
    moved = margin.detach()
    return Pairs(-F.logsigmoid(margin), moved, (moved > 0).float(), chosen.detach(), counts.float())


class Outcome(NamedTuple):
    """What a step came to, on the device until somebody reads it; the same on every rank."""

    loss: Tensor     # nats a target, over all ranks and micro-batches
    norm: Tensor     # of the loss's gradient, before clipping
    bad: Tensor      # loss or norm is not finite: there was no update
    spike: Tensor    # one of them is far above its level
    losses: Tensor   # (ranks, micro-batches): what each contributed
    counts: Tensor   # targets, and sequences without any
    pairs: Tensor | None = None  # the sums of Pairs


def train_step(
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    batches: list[MicroBatch],
    lr: float,
    config: Config,
    guard: Guard,
    reference: Transformer | None = None,
) -> Outcome:
    """One optimizer step over this rank's micro-batches; with a reference they are preference pairs.

    Loss and norm are, but for rounding, the same for every way to divide the same batch. Nothing here waits for the
    device: where the update must not happen, the device finds out by itself.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    is_target = [batch.targets != IGNORE for batch in batches]
    counts = torch.stack((sum(t.sum() for t in is_target), sum((~t.any(1)).sum() for t in is_target)))
    counts = counts.to(batches[0].tokens.device, non_blocking=True)
    dist.all_reduce(counts)
    losses = torch.zeros(world, len(batches), device=counts.device)
    num_pairs = world * sum(len(batch.tokens) // 2 for batch in batches)
    pairs = torch.zeros(len(Pairs._fields), device=counts.device) if reference else None
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(config.reduce_each or i == len(batches) - 1)  # once, with the last micro-batch
        # the reduction of the gradients divides by the world again
        if reference:
            sums = torch.stack([values.sum() for values in compare(model, reference, batch, config.dpo_beta)])
            loss = sums[0] * (world / num_pairs)
            pairs += sums.detach()
        else:
            num_targets = counts[0].clamp(min=1) / world
            with added_noise(model, neftune(batch, model.config.dim, config)):
                loss = model.loss(batch.tokens, batch.targets, batch.documents) / num_targets
        loss.backward()
        losses[rank, i] = loss.detach() / world
    dist.all_reduce(losses)
    if reference:
        dist.all_reduce(pairs)
    loss = losses.sum()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).full_tensor()
    excess = (norm / config.grad_clip).clamp(min=1)  # what the gradients are divided by, to clip them
    bad, spike = guard.judge(loss, norm)
    skip = bad | spike if config.on_spike == "skip" else bad
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if optimizer.defaults.get("fused"):  # its step divides by itself, and does nothing where it must not happen
            optimizer.grad_scale, optimizer.found_inf = excess, skip.float()
            optimizer.step()
        elif not skip:  # here the host has to wait for the answer
            torch._foreach_div_([p.grad for group in optimizer.param_groups for p in group["params"]], excess)
            optimizer.step()
        optimizer.zero_grad()
    return Outcome(loss, norm, bad, spike, losses, counts, pairs)


@torch.no_grad()
def evaluate(
    model, val: Mixture, config: Config, device: torch.device, reference: Transformer | None = None
) -> dict[str, float]:
    """Loss on a fixed set of validation sequences, in nats a token and bits a byte; any number of ranks agrees.

    Several sources take part by their weights, and each is listed too. Bits a byte are those of the targets over the
    bytes that the whole split has for a target: of its text, or of the answers in conversations. With a reference,
    what Pairs.means says of a fixed set of pairs.
    """
    if reference:
        return evaluate_pairs(model, val, config, device, reference)
    sums = torch.zeros(len(val.parts), 2, dtype=torch.float64, device=device)  # nats, targets
    for source, batch, _ in validation_batches(val, config, device):
        loss = model.loss(batch.tokens, batch.targets, batch.documents)
        sums[source] += torch.stack((loss, (batch.targets != IGNORE).sum().to(device)))
    dist.all_reduce(sums)
    sums = sums.cpu()
    num_bytes = sums[:, 1] @ torch.tensor([part.bytes_per_target for part in val.parts], dtype=sums.dtype)
    nats, targets = sums.sum(0)
    scores = {"val_loss": (nats / targets).item(), "val_bits_per_byte": (nats / math.log(2) / num_bytes).item()}
    if len(val.parts) > 1:
        scores |= {f"val_loss {name}": (a / b).item() for name, (a, b) in zip(val.folders, sums)}
    return scores


def evaluate_pairs(model, val: Mixture, config: Config, device: torch.device, reference: Transformer) -> dict:
    sums, count = torch.zeros(len(Pairs._fields), dtype=torch.float64, device=device), torch.zeros(1, device=device)
    for _, batch, num in validation_batches(val, config, device):
        pairs = compare(model, reference, batch, config.dpo_beta)
        sums += torch.stack([values[:num].double().sum() for values in pairs])
        count += num
    dist.all_reduce(sums)
    dist.all_reduce(count)
    means = Pairs(*sums).means(int(count))
    return {f"val_{name}": mean for name, mean in means.items()} | {"val_pairs": int(count)}


def validation_batches(val: Mixture, config: Config, device: torch.device) -> Iterator[tuple[int, MicroBatch, int]]:
    """This rank's part of --eval_tokens: the number of the source, a batch, and how many of its sequences count.

    Every rank makes the same number of passes over batches of one shape, filled up with what has no targets.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size, rows_each = config.micro_batch or max(1, config.batch_size // world), rows_of(val)
    for source, (part, weight) in enumerate(zip(val.parts, val.weights)):
        indices = part.spread_indices(max(1, int(config.eval_tokens * weight) // (rows_each * config.seq_len)))
        for start in range(0, len(indices), size * world):
            mine = indices[start : start + size * world][rank::world]
            rows = part.batch([*mine, *indices[:1] * (size - len(mine))])
            rows.targets[rows_each * len(mine) :] = IGNORE
            yield source, to_device(rows, device), len(mine)


def rows_of(data: Mixture) -> int:
    """How many rows a sequence that is drawn has in its batch: a pair has two."""
    return 2 if data.kind == "preference" else 1


# ---- checkpoints ----


class Checkpoints:
    """Saves a run in the background: training waits only until its tensors are copied to the host's memory.

    A checkpoint is written aside by all ranks, read again, synced, renamed, and only then pointed to by `last`; a kill
    at any moment leaves the one before. It holds tensors alone: weights, moments, and the state of the guard.
    """

    def __init__(
        self, folder: Path, config: Config, model, optimizers: list, guard: Guard, device: torch.device, adapter=None
    ):
        self.folder, self.config, self.model, self.adapter = folder, config, model, adapter
        # found now, for while FSDP has a layer's weights gathered, the model names others than the optimizer
        self.tensors = checkpoint_tensors(model, optimizers, guard)
        self.probe = code_probe(model.config)
        cuda = device.type == "cuda"
        how = dict(use_pinned_memory=cuda, use_non_blocking_copy=cuda, use_shared_memory=False, use_async_staging=False)
        self.stager = DefaultStager(StagingOptions(**how))
        self.group = dist.new_group(backend="gloo")  # what it says to other ranks must not mix with the training's
        self.saving, self.newest = None, -1

    def begin(self, step: int):
        """Begin to save, nothing else being saved any more."""
        staged = self.stager.stage(detached(self.tensors))
        thread = ThreadPoolExecutor(1)  # anew each time, so that its OpenMP threads end with it
        self.saving = step, thread.submit(self._write, step, staged)
        thread.shutdown(wait=False)

    def finish(self) -> ValueError | None:
        """Wait until nothing is being saved any more. Returns, on all ranks, what went wrong; nothing else is lost."""
        if not self.saving:
            return None
        (step, future), self.saving = self.saving, None
        try:
            future.result()
            self.newest = step
        except BaseException as error:  # the exceptions of torch's checkpoints are no Exceptions
            if isinstance(error, (KeyboardInterrupt, MemoryError)):
                raise
            space = f"{shutil.disk_usage(self.folder).free / 1e9:,.1f} GB free there"
            before = f"the last one is that of step {self.newest}" if self.newest >= 0 else "there is none yet"
            return ValueError(f"{self.folder}: no checkpoint of step {step} ({reason(error)}; {space}); {before}")
        return None

    def _write(self, step: int, staged: dict):
        name = f"step_{step:08d}"
        aside = self.folder / f"{name}.tmp"
        try:
            on_first_rank(functools.partial(self._begin, aside, self.folder / name), self.group)
            transfer(dcp.save, staged, aside, self.group)
            # raises for a missing or misshapen tensor
            transfer(dcp.load, staged, aside, self.group, storage_reader=Reader(aside))
            finite = all(is_finite(local(t)) for t in flat(staged))
            if not all_agree(finite, self.group):
                raise ValueError("it holds numbers that are not finite")
            parts = on_all(functools.partial(hashes, aside, my_share()), self.group)
            written = {name: digest for part in parts for name, digest in part.items()}
            on_first_rank(functools.partial(self._finish, aside, name, written), self.group)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # room for the next one
            raise

    def _begin(self, aside: Path, final: Path):
        for old in (aside, final):  # left by a kill, the second one before `last` pointed to it
            remove(old)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(config_to_hugging_face(self.model.config), indent=2))
        probe.write(aside, self.probe)
        if self.adapter:
            (aside / "adapter_config.json").write_text(json.dumps(self.adapter, indent=2))

    def _finish(self, aside: Path, name: str, written: dict[str, str]):
        (aside / HASHES).write_text(json.dumps(written, indent=2))
        for path in aside.iterdir():
            sync(path)
        os.rename(aside, self.folder / name)
        write_whole(self.folder / "last", name)
        remove_old(self.folder, name, self.config.keep, self.config.keep_every)


def reason(error: BaseException) -> str:
    """Why a checkpoint failed, in a line; a full disk, say, stands behind the first error that torch reports."""
    first = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
    cause = first
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__context__
    return (str(first).strip().splitlines() or [type(first).__name__])[-1]


def checkpoint_tensors(model: Transformer, optimizers: list, guard: Guard) -> dict:
    """What a checkpoint holds; a tied matrix once, and beside adapters no frozen weights.

    Learning rate, order of the data and so on follow from the flags.
    """
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: moments for optimizer in optimizers for p, moments in optimizer.state.items()}
    judged = {"level": guard.level, "passed_over": guard.passed_over}
    return {"model": adapters(model) or dict(model.named_parameters()), "optimizer": state, "guard": judged}


def transfer(
    action: Callable, tensors: dict, folder: Path, group: dist.ProcessGroup | None = None, **how
):
    """dcp.save of this rank's shards, or dcp.load with a Reader as its storage_reader.

    A single process is told that it is one: through gloo, the list of tensors would wake a second team of OpenMP
    threads, after which all training on a CPU is slower by 40 %.
    """
    with warnings.catch_warnings(action="ignore"):  # that it is a single process
        alone = dist.get_world_size() == 1
        action(tensors, checkpoint_id=folder, process_group=group, no_dist=alone, **how)


def detached(tensors: dict) -> dict:
    return {key: detached(t) if isinstance(t, dict) else t.detach() for key, t in tensors.items()}


def flat(tensors: dict) -> Iterator[Tensor]:
    for t in tensors.values():
        yield from flat(t) if isinstance(t, dict) else [t]


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def all_agree(mine: bool, group: dist.ProcessGroup | None = None) -> bool:
    flag = torch.tensor(int(mine))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)


def my_share() -> slice:
    """Every so manieth of a list that the processes divide among them."""
    return slice(dist.get_rank(), None, dist.get_world_size())


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
            raise ValueError(problem)
    return [value for value, _ in everybodys]


def restore(folder: Path, shape: ModelConfig, tensors: dict) -> int:
    """Read the last checkpoint, on any number of ranks, and return its step; -1 where there is none.

    One that is damaged is passed over, with a word about it, for the one before. Raises ValueError when none is whole,
    and for a checkpoint of another size.
    """
    if not has_checkpoint(folder):
        return -1
    problem = None
    if not named_by_last(folder):
        problem = ValueError(f"{folder / 'last'} is missing or names no checkpoint")
    for checkpoint in newest_first(folder):
        if problem and dist.get_rank() == 0:
            print(f"{problem}; going back to {checkpoint}", file=sys.stderr)
        problem = None
        try:
            _read_checkpoint(checkpoint, shape, tensors)
        except ValueError as error:
            problem = error
        if all_agree(problem is None):
            return int(checkpoint.name.removeprefix("step_"))
        problem = problem or ValueError(f"{checkpoint} cannot be read by another process")
    raise problem


def _read_checkpoint(checkpoint: Path, shape: ModelConfig, tensors: dict):
    reader = Reader(checkpoint)

    def check():
        with readable(checkpoint):
            found, expected = read_json(checkpoint / "config.json"), config_to_hugging_face(shape)
            for name in expected:
                if found.get(name) != expected[name]:
                    sizes = f"{name} {found.get(name)}, the run's is {expected[name]}"
                    raise ValueError(f"{checkpoint} is of another size: {sizes}")
            check_hashes(checkpoint, my_share())
            reader.read_metadata()

    on_all(check)  # before they read it together, and wait for each other
    with readable(checkpoint), torch.no_grad():
        transfer(dcp.load, tensors, checkpoint, storage_reader=reader)
        if not all(is_finite(local(t)) for t in flat(tensors)):
            raise ValueError(f"{checkpoint} holds numbers that are not finite")


# ---- forecast ----


def forecast(
    shape: ModelConfig, config: Config, world: int, compiled: bool, pairs: bool = False
) -> dict[str, int]:
    """Bytes on each rank at the peak of a step, by what they are for (lib/forecast.py)."""
    return forecasts.forecast(on_meta(shape, config), config, world, compiled, pairs)


def on_meta(shape: ModelConfig, config: Config) -> Transformer:
    """The model that a run trains, without memory."""
    with torch.device("meta"):
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        return lora.prepare(Transformer(shape), config, dtype)


def plan(config: Config) -> str:
    """What a run would need on --gpus of --gpu; nothing is run."""
    shape = read_config(config.init_from) if config.init_from else model_config(config)
    length = f"{config.batch_size} × {config.seq_len}"
    sources = mixture_weights(config.data)[0]
    found = [source for source in sources if (Path(source) / "meta.json").exists()]
    pairs = any(read_meta(source).get("kind") == "preference" for source in found)
    if config.epochs:
        data = Mixture(config.data, "train", config.seq_len, config.pack)
        config = in_steps(config, len(data) / config.batch_size)
        length += f", {config.epochs:g} epochs of {len(data):,} sequences"
    return forecasts.plan(on_meta(shape, config), config, length, pairs)


# ---- reporting ----


class Report:
    """What a run says of itself, on rank 0: the progress line, log.jsonl, loss.png and, when asked, wandb."""

    def __init__(self, config: Config, data: Mixture, start: int, step_flops: float, device: torch.device):
        self.config, self.folder, self.data, self.device, self.wandb = config, Path(config.out), data, device, None
        self.quiet = dist.get_rank() != 0
        of_pairs = data.kind == "preference"  # their rows have different lengths
        self.unit = "pairs" if of_pairs else "tokens"
        self.in_step = config.batch_size * (1 if of_pairs else config.seq_len)
        peak = None if of_pairs else gpu_peak(device)
        self.mfu_of_speed = step_flops / self.in_step / peak / dist.get_world_size() if peak else None
        self.begin(start)
        if config.wandb and not self.quiet:
            self._start_wandb()

    def begin(self, start: int):
        """What was logged after step start is forgotten: it will be done again, or differently."""
        self.logged, self.clock, self.bad_in_a_row = start, time.perf_counter(), 0
        if self.quiet:
            return
        log = self.folder / "log.jsonl"
        try:
            rows = [row for row in read_log(log) if row["step"] <= start]
            write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:  # as when a line is written
            print(f"log.jsonl: what follows step {start} is still there ({error.strerror})", file=sys.stderr)

    def introduce(self, shape: ModelConfig, compiled: bool):
        """The first words of a run: what, where, how much, and what it will need."""
        config, world, kind = self.config, dist.get_world_size(), self.device.type
        where = f"{config.dtype} arithmetic on {kind}, {world} process{'es' * (world > 1)}{', compiled' * compiled}"
        each = "pairs" if self.unit == "pairs" else f"× {config.seq_len} tokens"
        size = f"{config.steps} steps of {config.batch_size} {each}, saved every {config.save_every}"
        epochs = self.data.epochs(config.steps * config.batch_size)
        read = ", ".join(f"{count:.2f} epochs of {folder}" for folder, count in epochs.items())
        self.say(f"{count_parameters(shape):,} parameters, {where}; {size}, {read}")
        needs = forecast(shape, config, world, compiled, pairs=self.unit == "pairs")
        self.say(forecasts.describe(needs))

    def read(self, pending: list[tuple[int, float, int, Outcome]], last: int, log_now: bool) -> int | None:
        """Read the outcomes of the steps since the last reading, on every rank: log the last, and each that went wrong.

        Returns the first step that was a spike, None without one. Raises ValueError after --max_bad_steps in a row.
        """
        spike = None
        for step, _, passed_over, outcome in pending:
            bad = bool(outcome.bad)
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            if bad or outcome.spike:
                self._went_wrong(step, passed_over, outcome)
                spike = step if spike is None and not bad else spike
            if self.bad_in_a_row >= self.config.max_bad_steps:
                what = f"{self.bad_in_a_row} steps in a row up to {step} without a finite loss and gradient"
                raise ValueError(f"{what}; a lower --learning_rate usually helps, or a look at the data named above")
        if log_now:
            step, lr, _, outcome = pending[-1]
            self._step(step, last, lr, outcome)
        pending.clear()
        return spike

    def _went_wrong(self, step: int, passed_over: int, outcome: Outcome):
        """Log a bad step or a spike with the data it read: of the micro-batches to blame, where these are known."""
        kind = "bad step" if outcome.bad else "spike"
        skipped = bool(outcome.bad) or self.config.on_spike == "skip"
        loss, norm = outcome.loss.item(), outcome.norm.item()
        blamed = ~outcome.losses.cpu().isfinite()
        blamed = blamed if blamed.any() else torch.ones_like(blamed)
        numbers = self.data.numbers(step - 1 + passed_over, self.config.batch_size)
        each = len(numbers) // blamed.numel()
        places = [
            self.data.place(number, self.config.seed)
            for i in blamed.flatten().nonzero().squeeze(1).tolist()
            for number in numbers[i * each : (i + 1) * each]
        ]
        self.write(step=step, event=kind, skipped=skipped, loss=loss, grad_norm=norm, data=places)
        more = f" and {len(places) - 1} more places" if len(places) > 1 else ""
        update = "no update" if skipped else "update made"
        self.say(f"step {step}: {kind}, loss {loss:.4g}, gradient norm {norm:.4g}, {update}; {places[0]}{more}")

    def _step(self, done: int, last: int, lr: float, outcome: Outcome):
        """Log a step; the speed is that of the steps since the last one logged."""
        seconds = (time.perf_counter() - self.clock) / (done - self.logged)
        speed, left = self.in_step / seconds, round(seconds * (last - done))
        self.logged, self.clock = done, time.perf_counter()
        loss, (targets, without) = outcome.loss.item(), outcome.counts.tolist()
        of_pairs = {} if outcome.pairs is None else Pairs(*outcome.pairs).means(self.config.batch_size)
        self.write(
            **of_pairs | dict(step=done, loss=loss),
            lr=lr,
            grad_norm=outcome.norm.item(),
            **{self.unit: done * self.in_step, f"{self.unit}_per_s": round(speed, 0 if speed > 100 else 2)},
            targets=targets,
            sequences_without_target=without,
            epochs=self.data.epochs(done * self.config.batch_size),
            mfu=self.mfu_of_speed and speed * self.mfu_of_speed,
            memory=memory(self.device),
        )
        progress = f"step {done}/{self.config.steps}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} {self.unit}/s"
        self.say(f"{progress}  {left // 60}:{left % 60:02} left", passing=True)

    def validation(self, done: int, scores: dict[str, float]):
        self.write(step=done, **scores)
        if self.unit == "pairs":
            more = f"accuracy {scores['val_accuracy']:.1%} of {scores['val_pairs']}, margin {scores['val_margin']:.4f}"
        else:
            more = f"{scores['val_bits_per_byte']:.4f} bits a byte"
        words = f"validation {scores['val_loss']:.4f} nats a {self.unit[:-1]}, {more}"
        self.say(f"step {done}/{self.config.steps}  {words}")

    @contextlib.contextmanager
    def paused(self):
        """Evaluating and saving do not count in the speed."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def _start_wandb(self):
        try:
            import wandb

            mode = None if wandb.api.api_key else "offline"
            self.wandb = wandb.init(
                project=self.config.wandb, name=self.folder.name, dir=self.folder, mode=mode, config=vars(self.config)
            )
        except Exception as error:  # whatever fails in there, training goes on
            print(f"wandb is off: {error}", file=sys.stderr)

    def write(self, **fields):
        if self.quiet:
            return
        try:
            append_row(self.folder / "log.jsonl", fields)
        except OSError as error:  # a full disk, say, may have room again for the next checkpoint
            print(f"log.jsonl: step {fields['step']} is missing ({error.strerror})", file=sys.stderr)
        if self.wandb:
            try:
                self.wandb.log(fields, step=fields["step"])
            except Exception as error:
                print(f"wandb is off: {error}", file=sys.stderr)
                self.wandb = None

    def say(self, text: str, passing: bool = False):
        """Print a line; a passing one is overwritten by the next where the output is a terminal."""
        if not self.quiet:
            terminal = sys.stdout.isatty()
            print(("\r\033[K" if terminal else "") + text, end="" if terminal and passing else "\n", flush=True)

    def draw(self):
        """loss.png: training and validation loss against the step, from log.jsonl."""
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # a full disk costs the picture, not the run
            self._draw()

    def _draw(self):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = read_log(self.folder / "log.jsonl")
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1)
        axes.set(xlabel="step", ylabel=f"loss (nats a {self.unit[:-1]})", title=str(self.folder))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.folder / "loss.png", dpi=120)
        plt.close(figure)

    def close(self):
        if self.wandb:
            self.wandb.finish()


def describe_run(config: Config, shape: ModelConfig, metas: list[dict], device: torch.device) -> dict:
    """run.json: everything needed to know later what was run."""
    first = str(checkpoint_folder(Path(config.init_from)).resolve()) if config.init_from else ""
    of_pairs = any(meta.get("kind") == "preference" for meta in metas)
    return {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(shape),
        "probe": code_probe(shape),
        "init_from": first,
        "init_sha256": from_first_rank(functools.partial(fingerprint, first)) if first and of_pairs else "",
        "dataset": describe_data(config, metas),
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(device),
        "processes": dist.get_world_size(),
    } | ({"adapter": describe_adapter(config)} if config.lora_rank else {})


def describe_adapter(config: Config) -> dict:
    """The adapter_config.json of every checkpoint, by which the base model is found again."""
    settings = adapter_settings(config.init_from, config.lora_rank, config.lora_alpha, config.lora_targets.split(","))
    known = from_first_rank(functools.partial(fingerprint, config.init_from))
    return settings | {"base_sha256": known, "quantize": config.quantize}


def device_name(device: torch.device) -> str:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def describe_data(config: Config, metas: list[dict]) -> list[dict]:
    """What makes up the data; sample.py finds the template of a chat here."""
    shares, names = mixture_weights(config.data)[1], ("tokenizer", "splits", "template")
    return [
        {"share": share} | {name: meta[name] for name in names if name in meta} for share, meta in zip(shares, metas)
    ]


# ---- the run ----


def resumed(first: Config) -> Config:
    """The flags of the run that --resume names, as the defaults of those typed beside it. Raises ValueError."""
    if not first.resume:
        return Config()
    saved = Config(**read_run(Path(first.resume), config=Config)["config"])
    return dataclasses.replace(saved, resume=first.resume, out=first.resume, stop_at=0, anyway=False)


def choose_run(config: Config) -> dict | None:
    """The record of the run that config continues, None for a new one. Raises ValueError where the two differ."""
    folder = Path(config.out)
    # not begun; run.json may be that of a start that failed
    if not has_checkpoint(folder) and not config.resume:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        ours = "run.json" in names and is_record(folder / "run.json")
        if not ours and any(not name.endswith(".tmp") for name in names):
            raise ValueError(f"--out {folder} holds other files; choose another folder")
        return None
    if config.resume and folder != Path(config.resume):
        raise ValueError(f"--out {folder} does not go with --resume {config.resume}, which is the run's folder")
    record = read_run(folder, config=Config, model=ModelConfig)
    for name, theirs in record["config"].items():
        mine = getattr(config, name)
        if name not in FREE and mine != theirs and not (name == "dtype" and mine == "auto"):
            flag = "--resume" if config.resume else "--out"
            raise ValueError(f"{flag} {folder} holds a run with --{name} {theirs}, not {mine}; choose another --out")
    return record


def check(config: Config, world: int):
    """Raise ValueError for a flag out of range; the message names the flag, its value and the bound."""
    shape = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale", "lora_rank")
    terms = ("weight_decay", "neftune", "z_loss")
    for name in ("epochs", "micro_batch", "stop_at", "keep_every", "shard_over", "warmup", *terms, *shape):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name} {getattr(config, name)} must be a number that is not negative")
    lengths = in_steps(config, 1.0)  # how long an epoch is, the data will tell
    every = ("log_every", "eval_every", "save_every")
    finite = ("learning_rate", "lora_alpha", "dpo_beta")
    positive = ("keep", *finite, "grad_clip", "max_bad_steps", "spike", "gpus")
    for name in ("seq_len", "steps", "batch_size", *every, *positive):
        if not getattr(lengths, name) > 0:
            raise ValueError(f"--{name} {getattr(config, name)} must be above 0")
        if name in finite and getattr(config, name) == math.inf:
            raise ValueError(f"--{name} {getattr(config, name)} must be a finite number")
    if config.epochs and config.steps != Config.steps:
        raise ValueError(f"--steps {config.steps} does not go with --epochs {config.epochs}")
    for name in ("final_lr", "decay", "label_smoothing", "beta1", "beta2"):
        if not 0 <= getattr(config, name) <= (0.999999 if name.startswith("beta") else 1):
            raise ValueError(f"--{name} {getattr(config, name)} must lie between 0 and 1")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed} must lie between 0 and 2^63")
    if config.eval_tokens < config.seq_len:
        raise ValueError(f"--eval_tokens {config.eval_tokens} is less than one window of --seq_len {config.seq_len}")
    if config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} must be a multiple of the {world} processes")
    share = config.batch_size // world
    if config.micro_batch and share % config.micro_batch:
        raise ValueError(f"--micro_batch {config.micro_batch} must divide --batch_size / processes = {share}")
    if config.shard_over and world % config.shard_over:
        raise ValueError(f"--shard_over {config.shard_over} must divide the {world} processes")
    mode = config.checkpointing
    if mode not in ("none", "selective", "full") and not (mode.isdecimal() and int(mode)):
        raise ValueError(f"--checkpointing {mode} is not none, selective, full or a number of blocks")
    unknown = [name for name in config.lora_targets.split(",") if name not in TARGETS]
    if unknown:
        raise ValueError(f"--lora_targets {config.lora_targets}: {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    if config.quantize != "none" and not config.lora_rank:
        raise ValueError(f"--quantize {config.quantize} needs --lora_rank, for what is quantised cannot be trained")
    if config.lora_rank and mode == "selective":
        raise ValueError("--checkpointing selective does not go with --lora_rank; none, full and numbers do")
    if config.gpu not in GPUS:
        raise ValueError(f"--gpu {config.gpu} is not one of {', '.join(GPUS)}")


def prepare_default():
    """Make the dataset that a run without flags trains on, by the command that anybody could type."""
    (folder,) = Config.data
    command = [sys.executable, str(HERE / "data.py"), "--source", "stdlib", "--out", folder]
    print(f"first the data: python data.py --source stdlib --out {folder}", flush=True)
    if subprocess.run(command).returncode:
        raise ValueError(f"--data {folder} could not be prepared")


def show_sample(config: Config):
    words = ["sample.py", "--model", config.out, f"--prompt={config.sample}", "--max_new_tokens", "200"]
    words += ["--anyway"] * config.anyway
    print(f"\npython {shlex.join(words)}\n", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sample is drawn by a process of its own
    subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]])


class Stop:
    """SIGTERM or SIGINT, sent to any process, ends the run on all of them after the same step, with a checkpoint.

    SIGINT is obeyed at once when it comes again after a while; torchrun passes on what the terminal has sent already.
    """

    PATIENCE = 3.0  # seconds

    def __enter__(self):
        self.signal, self.since = 0, math.inf
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame):
        if number == signal.SIGINT and time.monotonic() > self.since + self.PATIENCE:
            raise KeyboardInterrupt
        self.signal, self.since = number, min(self.since, time.monotonic())

    def ask_others(self):
        """Begin to find out whether any rank was told to stop; on the host, beside the work of the step."""
        self.flag = torch.tensor(self.signal)
        self.answer = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> str:
        """The name of the signal that all ranks now obey; empty without one."""
        self.answer.wait()
        return signal.Signals(int(self.flag)).name if self.flag else ""


def main(config: Config):
    if config.plan:
        check(config, config.gpus)
        print(plan(config))
        return
    device, lock = join_world(config.deterministic), contextlib.ExitStack()
    try:
        on_first_rank(lambda: lock.enter_context(held(Path(config.out))))  # of all, until they have left
        record = choose_run(config)
        check(config, dist.get_world_size())
        if dist.get_rank() == 0 and config.data == Config.data and not Path(config.data[0]).exists():
            prepare_default()
        dist.barrier()
        with Stop() as stop:
            finished = train(config, record, device, stop)
        rank = dist.get_rank()
    finally:
        dist.destroy_process_group()
        lock.close()
    if rank == 0 and finished and config.sample:
        show_sample(config)


def train(config: Config, record: dict | None, device: torch.device, stop: Stop) -> bool:
    """Take the run in config.out from its last checkpoint, or from nothing, to its end. False if it ends before."""
    folder, metas = Path(config.out), [read_meta(source) for source in mixture_weights(config.data)[0]]
    if record and record["dataset"] != describe_data(config, metas):
        raise ValueError(f"--data {' '.join(config.data)} is another dataset than when {config.out} began")
    data, val = (Mixture(config.data, split, config.seq_len, config.pack) for split in ("train", "val"))
    check_files(data)
    for name in ("neftune", "label_smoothing", "z_loss"):
        if data.kind == "preference" and getattr(config, name):
            raise ValueError(f"--{name} {getattr(config, name)} does not go with preference pairs")

    shape = ModelConfig(**record["model"]) if record else first_config(config, metas[0])
    dtype = compute_dtype(record["config"]["dtype"] if record else config.dtype, device)
    config = dataclasses.replace(config, dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype])
    record = record or describe_run(config, shape, metas, device)  # with the flags as they were typed
    config = in_steps(config, len(data) / config.batch_size)
    token_flops = flops_per_token(shape, config.seq_len, config.lora_rank > 0)
    step_flops = token_flops * config.batch_size * config.seq_len
    compiled = should_compile(config.compile, device, step_flops * config.steps)
    model = build(shape, dataclasses.replace(config, pack=data.packed), device, dtype, compiled)
    optimizers, guard = make_optimizers(model, config), Guard(config.spike, device)
    on_first_rank(lambda: prepare_folder(config, record))
    adapter = record.get("adapter")
    checkpoints = Checkpoints(folder, config, model, optimizers, guard, device, adapter)
    start = restore(folder, shape, checkpoints.tensors)
    if start >= 0:
        check_code(folder / f"step_{start:08d}", config.anyway)

    report = Report(config, data, max(0, start), step_flops, device)
    report.introduce(shape, compiled)
    last = min(config.stop_at or config.steps, config.steps)
    if start >= last:
        done = "finished; to train again, delete it or choose another --out"
        report.say(f"{folder} is {done if start >= config.steps else f'already at step {start}'}")
        return start >= config.steps
    if adapter:
        first_weights(model, config, from_first_rank(lambda: str(find_base(adapter, folder))))
    reference = None
    if data.kind == "preference":
        reference = model
        if not adapter:
            from_first_rank(lambda: check_reference(record, folder))
            reference = build(shape, dataclasses.replace(config, freeze=()), device, dtype, compiled, frozen=True)
            first_weights(reference, config, record["init_from"])
    run = Run(config, device, data, val, model, optimizers, guard, checkpoints, report, reference)
    if start >= 0:
        checkpoints.newest = start
        report.say(f"continuing {folder} after step {start}")
    else:
        first_weights(model, config, "" if adapter else record["init_from"])
        run.rehearse()
    gc.disable()  # Python's garbage collector works at the pauses of Run.steps instead of anywhere
    try:
        done = run.steps(max(0, start), last, stop)
    except Exception:  # a checkpoint that is under way is not lost with the run; Ctrl-C does not wait for it
        if problem := checkpoints.finish():
            report.say(str(problem))
        raise
    finally:
        gc.enable()
    report.close()
    return done == config.steps


def check_reference(record: dict, folder: Path) -> str:
    """The model that the run in folder began with and does not move away from; ValueError if it is another by now."""
    first = record["init_from"]
    if first and not is_known(first, record["init_sha256"]):
        raise ValueError(f"{first} holds other weights than when {folder} began")
    return first


def first_weights(model: Transformer, config: Config, path: str):
    """The weights that a run begins with: those at path, or if it is empty random ones."""
    if path:
        on_all(functools.partial(load_weights, model, path))
    elif lora.adapters(model):
        lora.init_adapters(model, config.seed)
    else:
        model.init_weights(config.seed)


def check_files(data: Mixture):
    """Raise ValueError on all ranks where a file of the data is not as prepared; those of one machine share the work.

    All files are read once, also those for validation.
    """
    sources = [(Path(part.folder), part.meta) for part in data.parts]
    place = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, changed_file(sources, place, count))
    if any(problems):
        raise ValueError(max(problems))


def prepare_folder(config: Config, record: dict):
    folder, tokenizer = Path(config.out), Tokenizer(mixture_weights(config.data)[0][0])
    begun = has_checkpoint(folder)
    if not begun:
        write_whole(folder / "run.json", json.dumps(record, indent=2))
    if not begun or not (folder / tokenizer.file).exists():  # a full disk would leave half of one that was whole
        tokenizer.save(folder)


@dataclass
class Run:
    """What the steps of a run work with."""

    config: Config
    device: torch.device
    data: Mixture
    val: Mixture
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    guard: Guard
    checkpoints: Checkpoints
    report: Report
    reference: Transformer | None  # of preference pairs: what the model was or, with LoRA, the model, adapters aside
    rolled_back_to: Counter = field(default_factory=Counter)  # how often, by step

    def rehearse(self):
        """Save, evaluate and sample before the first step: what would fail after days fails now."""
        self.checkpoints.begin(0)
        if problem := self.checkpoints.finish():
            raise problem
        short = dataclasses.replace(self.config, eval_tokens=self.config.seq_len)
        evaluate(self.model, self.val, short, self.device, self.reference)
        if self.config.sample:
            tokenizer, window = Tokenizer(self.data.folders[0]), self.model.config.max_seq_len
            ids = tokenizer.encode_prompt(self.config.sample)
            if len(ids) > window:
                raise ValueError(f"--sample has {len(ids)} tokens, more than the context window of {window}")
            with torch.no_grad():
                logits = self.model(torch.tensor([ids], device=self.device))
            tokenizer.decode([logits[0, -1].argmax().item()])

    def steps(self, step: int, last: int, stop: Stop) -> int:
        """Go from `step` steps done to `last`. Returns the number done, less than `last` after a signal."""
        config, report = self.config, self.report
        batches, pending = self.batches(step, last), []
        while step < last:
            stop.ask_others()
            lr, passed_over = learning_rate(step, config), int(self.guard.passed_over)
            outcome = train_step(self.model, self.optimizers, next(batches), lr, config, self.guard, self.reference)
            step += 1
            pending.append((step, lr, passed_over, outcome))
            stopped_by = stop.agreed()
            ends = step == last or bool(stopped_by)
            log_now, save_now = (step % every == 0 or ends for every in (config.log_every, config.save_every))
            evaluate_now = step % config.eval_every == 0 or step == config.steps
            if not log_now and not save_now and not evaluate_now:
                continue
            spike = report.read(pending, last, log_now)
            with report.paused():
                if spike and config.on_spike == "rollback":
                    step = self.roll_back(spike)
                    batches = self.batches(step, last)
                    continue
                if evaluate_now:
                    report.validation(step, evaluate(self.model, self.val, config, self.device, self.reference))
                if save_now:
                    self.save(step, ends)
                gc.collect(1)
            if stopped_by:
                report.say(f"{stopped_by}: stopped after step {step}; the same command continues {config.out}")
                break
        return step

    def batches(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        shift = int(self.guard.passed_over)
        make = functools.partial(step_batches, self.data, self.config, device=self.device)
        return prefetch(make, range(first + shift, last + shift), self.device)

    def save(self, step: int, ends: bool):
        """Begin a checkpoint. One that failed is reported and the run goes on, but at its end that is an error."""
        if problem := self.checkpoints.finish():
            self.report.say(f"{problem}; the run goes on")
        self.checkpoints.begin(step)
        self.report.draw()
        if ends:
            if problem := self.checkpoints.finish():
                raise problem
            self.report.say(f"{self.config.out}: checkpoint of step {step}, log.jsonl, loss.png")

    def roll_back(self, spike: int) -> int:
        """Return to the last checkpoint, to go on past the data between it and the spike (PaLM, section 5.1)."""
        self.checkpoints.finish()
        passed_over = int(self.guard.passed_over)
        step = restore(Path(self.config.out), self.model.config, self.checkpoints.tensors)
        self.rolled_back_to[step] += 1
        if self.rolled_back_to[step] > self.config.max_bad_steps:
            what = f"a spike at step {spike} again after going back to step {step} {self.config.max_bad_steps} times"
            raise ValueError(f"{what}; a lower --learning_rate usually helps, or a higher --spike")
        self.guard.passed_over.fill_(passed_over + spike - step)
        self.report.begin(step)
        self.report.write(step=step, event="rollback", spike=spike, passed_over=int(self.guard.passed_over))
        self.report.say(f"back to step {step}, and on past the data of {spike - step} steps")
        return step


def memory(device: torch.device) -> int:
    """Most bytes held so far by this rank: of GPU memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def leave():
    """End the process without Python's own ending, in which a thread of gloo that still holds a tensor can abort it
    (pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_command(main, Config, resumed)
    leave()
