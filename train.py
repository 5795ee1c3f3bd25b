"""Train a LLaMA-2: one loop for one laptop or many GPUs.

    python train.py                                             # the standard library, three minutes on two cores
    python train.py --data data/NAME --size 15M --out out/RUN
    torchrun --nproc_per_node 8 train.py --data data/NAME ...   # the same run on 8 GPUs
    python train.py --resume out/RUN                            # continues it exactly

    python train.py --plan --size 7B --seq_len 4096 --gpus 8 --gpu A100-80GB     # would it fit, how long would it take

Every run joins a process group and shards its model over it, also a run of one process. The batch of a step
is a pure function of (dataset, seed, step); processes and micro-batches only divide the work.
"""

from lib.cli import git_commit, run_command  # isort: skip (lib refuses old Pythons, Windows)

import contextlib
import ctypes
import dataclasses
import fnmatch
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from data import Batch, Mixture, Tokenizer, find_tokenizer, mixture_weights, read_meta
from lib import probe
from lib.files import sync, write_whole
from lib.records import read_json
from model import (
    IGNORE,
    LOSS_CHUNK,
    SIZES,
    TARGETS,
    Documents,
    ModelConfig,
    Transformer,
    adapter_settings,
    adapters,
    add_adapters,
    check_checkpoint,
    check_code,
    checkpoint_folder,
    code_probe,
    config_to_hugging_face,
    find_base,
    fingerprint,
    is_known,
    load_weights,
    read_config,
    readable,
    without_adapters,
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
    anyway: bool = False                # also go on with a run of code that computes something else
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
    gpu: str = "A100-80GB"              # a name in train.GPUS


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
    done = max(0.0, step - begin) / max(1, config.steps - begin)
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
    """Run action on the first rank while the others wait. Raises OSError on all where it does so there."""
    problem = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [(error.errno, error.strerror, error.filename and str(error.filename))]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0]:
        raise OSError(*problem[0])


def from_first_rank(find: Callable[[], str]) -> str:
    """What find returns on the first rank, on all. Raises ValueError on all where it does there."""
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
        model = set_trainable(Transformer(shape), config, dtype)
    if frozen:
        model.to(dtype).requires_grad_(False)
    model = shard(model, config, make_mesh(config, device), dtype, compiled).to_empty(device=device)
    if frozen:
        model.set_reshard_after_forward(True)  # no backward pass will do it
    if shape.tie_embeddings:
        model.unembedding.weight = model.embedding.weight
    return model


def set_trainable(model: Transformer, config: Config, dtype: torch.dtype) -> Transformer:
    """Give the model adapters, if --lora_rank asks for them, and freeze what --freeze names.

    Beside adapters, frozen weights need no more digits than the arithmetic.
    """
    if config.lora_rank:
        targets, nf4 = config.lora_targets.split(","), config.quantize == "nf4"
        add_adapters(model.to(dtype), config.lora_rank, config.lora_alpha, targets, nf4)
    freeze(model, config.freeze)
    return model


def freeze(model: Transformer, patterns: tuple[str, ...]):
    """Take the parameters whose names fit a pattern out of training. Raises ValueError where none does, or all do."""
    for pattern in patterns:
        if not (names := fnmatch.filter(dict(model.named_parameters()), pattern)):
            raise ValueError(f"--freeze {pattern} fits no parameter such as blocks.0.attention.out.weight")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train")


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
            # the loop over documents that stands in for the GPU's kernel cannot be compiled
            block.forward = torch.compile(block.forward, fullgraph=not config.pack or mesh.device_type == "cuda")
        unit(block, reshard_after_forward=config.reshard_after_forward)
    if compiled:
        model.norm.forward = torch.compile(model.norm.forward, fullgraph=True)
        model.unembedding.loss_of_logits = torch.compile(model.unembedding.loss_of_logits, fullgraph=True)
    model.unembedding.terms = (config.label_smoothing, config.z_loss)
    if not model.config.tie_embeddings:
        unit(model.embedding, reshard_after_forward=config.reshard_after_forward)
        unit([model.norm, model.unembedding], reshard_after_forward=False)
    return unit(model)


def checkpointed(forward: Callable, mode: str, layer: int) -> Callable:
    """forward, but keeping less for the backward pass, which computes the rest again. The gradients are the same."""
    if mode == "none" or mode.isdigit() and layer % int(mode):
        return forward
    contexts = {"context_fn": keep_the_costly} if mode == "selective" else {}
    return lambda *inputs: torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **contexts)


ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "varlen_attn")  # in the names of kernels


def keep_the_costly():
    """For selective checkpointing: keep the outputs of attention and of every second matrix product."""
    products = {False: 0, True: 0}  # seen in the forward pass, and when computing again

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = any(name in str(op) for name in ATTENTION)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def local_rows(weight: DTensor) -> tuple[int, Tensor]:
    """The rows of a sharded parameter that this rank holds: the number of the first, and the rows."""
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[0], weight.detach().to_local()


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
    """Pinned memory lets the copies run beside the device's work."""

    def host(values) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    documents = None
    if batch.bounds is not None:
        positions, bounds = (host(values).to(device, non_blocking=True) for values in batch.documents())
        documents = Documents(positions, bounds)
    return MicroBatch(host(batch.tokens).to(device, non_blocking=True), host(batch.targets), documents, numbers)


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
        return reference(batch.tokens, batch.targets, documents=batch.documents, each=True)


def compare(model: Transformer, reference: Transformer, batch: MicroBatch, beta: float) -> Pairs:
    """Direct preference optimization (Rafailov et al. 2023, equation 7) of rows that are chosen, rejected, chosen, …

    A reward is beta times the log-probability of an answer's targets, less that under the reference.
    """
    before = reference_log_probs(reference, batch)
    drifts = (model(batch.tokens, batch.targets, documents=batch.documents, each=True) - before).sum(1)
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
            num_targets, noise = counts[0].clamp(min=1) / world, neftune(batch, model.config.dim, config)
            loss = model(batch.tokens, batch.targets, num_targets, documents=batch.documents, noise=noise)
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
        loss = model(batch.tokens, batch.targets, num_targets=1, documents=batch.documents)
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
            yield source, to_device(rows if val.packed else rows._replace(bounds=None), device), len(mine)


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
            transfer(dcp.load, staged, aside, self.group)  # raises for a missing or misshapen tensor
            finite = all(bool(local(t).isfinite().all()) for t in flat(staged))
            if not all_agree(finite, self.group):
                raise ValueError("it holds numbers that are not finite")
            on_first_rank(functools.partial(self._finish, aside, name), self.group)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # room for the next one
            raise

    def _begin(self, aside: Path, final: Path):
        for old in (aside, final):  # left by a kill, the second one before `last` pointed to it
            _remove(old)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(config_to_hugging_face(self.model.config), indent=2))
        probe.write(aside, self.probe)
        if self.adapter:
            (aside / "adapter_config.json").write_text(json.dumps(self.adapter, indent=2))

    def _finish(self, aside: Path, name: str):
        for path in aside.iterdir():
            sync(path)
        os.rename(aside, self.folder / name)
        write_whole(self.folder / "last", name)
        steps = sorted(path.name for path in self.folder.glob("step_????????") if path.name <= name)
        kept = steps[-self.config.keep :]
        if self.config.keep_every:
            kept += [other for other in steps if int(other[5:]) % self.config.keep_every == 0]
        for old in self.folder.glob("step_*"):
            if old.name not in kept:
                _remove(old)


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


def transfer(action: Callable, tensors: dict, folder: Path, group: dist.ProcessGroup | None = None):
    """dcp.save or dcp.load, of this rank's shards.

    A single process is told that it is one: through gloo, the list of tensors would wake a second team of OpenMP
    threads, after which all training on a CPU is slower by 40 %.
    """
    with warnings.catch_warnings(action="ignore"):  # that it is a single process
        action(tensors, checkpoint_id=folder, process_group=group, no_dist=dist.get_world_size() == 1)


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


def _remove(folder: Path):
    """Delete a checkpoint, which loses its name first, so that a kill leaves no half of it behind."""
    if folder.exists():
        nameless = folder.with_suffix(".tmp")
        if folder != nameless:
            shutil.rmtree(nameless, ignore_errors=True)
            os.rename(folder, nameless)
        shutil.rmtree(nameless)


def restore(folder: Path, shape: ModelConfig, tensors: dict) -> int:
    """Read the last checkpoint, on any number of ranks, and return its step; -1 where there is none.

    One that is damaged is passed over, with a word about it, for the one before. Raises ValueError when none is whole,
    and for a checkpoint of another size.
    """
    if not (folder / "last").exists():
        return -1
    last = (folder / "last").read_text().strip()
    names = {path.name for path in folder.glob("step_????????") if path.name <= last} | {last}
    problem = None
    for name in sorted(names, reverse=True):
        if problem and dist.get_rank() == 0:
            print(f"{problem}; going back to {folder / name}", file=sys.stderr)
        problem = None
        try:
            _read_checkpoint(folder / name, shape, tensors)
        except ValueError as error:
            problem = error
        if all_agree(problem is None):
            return int(name.removeprefix("step_"))
        problem = problem or ValueError(f"{folder / name} cannot be read by another process")
    raise problem


def _read_checkpoint(checkpoint: Path, shape: ModelConfig, tensors: dict):
    found, expected = read_json(checkpoint / "config.json"), config_to_hugging_face(shape)
    for name in expected:
        if found.get(name) != expected[name]:
            sizes = f"{name} {found.get(name)}, the run's is {expected[name]}"
            raise ValueError(f"{checkpoint} is of another size: {sizes}")
    check_checkpoint(checkpoint)
    with readable(checkpoint), torch.no_grad():
        transfer(dcp.load, tensors, checkpoint)


# ---- forecast ----

GPUS = {  # bf16 FLOP/s without sparsity, GiB of memory, share of the FLOP/s that training is taken to reach
    "A100-40GB": (312e12, 39.5, 0.55),
    "A100-80GB": (312e12, 79.2, 0.55),
    "H100-80GB": (989e12, 79.1, 0.40),
    "H200": (989e12, 139.8, 0.40),
    "A6000-48GB": (154.8e12, 47.5, 0.55),
}


def kept_bytes(shape: ModelConfig, mode: str, compiled: bool, size: int, rank: int = 0, targets: str = "") -> int:
    """Bytes that one block keeps of a token for its backward pass; size is that of a number in the arithmetic, rank and
    targets are LoRA's."""
    dim, kv_dim, ffn_dim = shape.dim, shape.num_kv_heads * shape.head_dim, shape.ffn_dim
    attention = 4 * shape.num_heads  # its fp32 normalizers
    if mode == "full":
        return size * dim  # the input
    if mode == "selective":  # input, attention's output, and of the seven products query, value, gate and down
        return size * (4 * dim + kv_dim + ffn_dim) + attention
    of_adapters = 0
    if rank:  # x A^T; but frozen matrices need no inputs, and frozen norms no normed ones, which eager code keeps
        unneeded = dim * (not {"query", "key", "value"} & {*targets.split(",")})
        unneeded += dim * (not {"gate", "up"} & {*targets.split(",")}) + ffn_dim * ("down" not in targets)
        of_adapters = size * (rank * len(targets.split(",")) - unneeded - 2 * dim * (not compiled))
    if compiled:  # input, two normed inputs, query, key, value, attention's output, out, gate, up, their product
        return size * (6 * dim + 2 * kv_dim + 3 * ffn_dim) + attention + 8 + of_adapters
    # the norms keep an fp32 copy, the normed and the scaled input; SiLU keeps its input, the product its factors
    return 2 * (4 + 2 * size) * dim + size * (2 * dim + 2 * kv_dim + 4 * ffn_dim) + attention + 8 + of_adapters


class Tally(NamedTuple):
    """What the parameters of a model or a block come to, before sharding."""

    stored: int    # bytes
    gathered: int  # bytes as the arithmetic takes them
    trained: int   # numbers that have a gradient

    @classmethod
    def of(cls, part: torch.nn.Module, size: int) -> "Tally":
        parameters = list(part.parameters())
        gathered = sum(p.numel() * (size if p.is_floating_point() else 1) for p in parameters)
        return cls(sum(p.nbytes for p in parameters), gathered, sum(p.numel() for p in parameters if p.requires_grad))


def forecast(
    shape: ModelConfig, config: Config, world: int, compiled: bool, of_pairs: bool = False
) -> dict[str, int]:
    """Bytes on each rank at the peak of a step, by what they are for. What the allocator and NCCL add is not in it.

    Pairs have two rows each, here of full length, and a frozen reference.

    The peak is at one of three moments: in the loss, when all activations are kept; in the backward pass of the last
    block, the same; or in that of the first, when the gradients of all others are there instead.
    """
    size = 4 if config.dtype == "fp32" else 2
    with torch.device("meta"):
        model = set_trainable(Transformer(shape), config, torch.float32 if size == 4 else torch.bfloat16)
    whole, block = (Tally.of(part, size) for part in (model, model.blocks[0]))
    of_ends = shape.vocab_size * shape.dim
    share = config.batch_size // world
    tokens = (config.micro_batch or share) * config.seq_len * (2 if of_pairs else 1)
    ranks = config.shard_over or world
    shard = whole.trained // ranks

    modes = [config.checkpointing] * shape.num_layers
    if config.checkpointing.isdigit():
        modes = ["none" if layer % int(config.checkpointing) else "full" for layer in range(shape.num_layers)]
    lora = (config.lora_rank, config.lora_targets)
    kept = tokens * sum(kept_bytes(shape, mode, compiled, size, *lora) for mode in modes)
    # a block whose forward pass is computed again then has all it keeps, and gradients of it
    again = kept_bytes(shape, "none", compiled, size, *lora) + size * (2 * shape.ffn_dim + shape.dim)
    again = tokens * again if set(modes) != {"none"} else 0
    of_logit = {(2, False): 6, (4, False): 4, (2, True): 4, (4, True): 12}[size, compiled]
    chunk = 4 * LOSS_CHUNK if compiled and size == 2 else LOSS_CHUNK
    in_chunk = min(tokens, chunk) * shape.vocab_size
    of_product = 4 if size == 4 and tokens <= chunk else 4 + size  # the weight's gradient, and a chunk's beside it
    trained_ends = of_ends if model.unembedding.weight.requires_grad else 0
    logits = max(of_logit * in_chunk + 4 * trained_ends * (tokens > chunk), size * in_chunk + of_product * trained_ends)
    of_gradients = (4 + size) * block.trained  # as they are computed, and as they are reduced
    # of earlier micro-batches: whole until the last one reduces them
    earlier = 0 if config.micro_batch in (0, share) else 4 * (shard if config.reduce_each else whole.trained)
    gathered = 2 * block.gathered + size * of_ends if config.reshard_after_forward else whole.gathered
    if config.quantize == "nf4":  # the largest matrix, unpacked
        gathered += size * shape.dim * max(shape.dim, shape.ffn_dim)
    moments = [
        dict(gradients=earlier, activations=kept, logits=logits),
        dict(gradients=earlier + of_gradients, activations=kept + again, logits=0),
        dict(gradients=max(earlier, 4 * shard) + of_gradients, activations=again, logits=0),
    ]
    peak = max(moments, key=lambda parts: sum(parts.values()))
    of_moments = 8 * shard
    if config.optimizer == "muon":  # one moment for the blocks' matrices instead of two
        matrices = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() >= 2)
        of_moments -= 4 * matrices // ranks
    reference = {"reference": whole.gathered // ranks} if of_pairs and not config.lora_rank else {}
    return {"weights": whole.stored // ranks, "moments": of_moments, "gathered": gathered} | reference | peak


def plan(config: Config) -> str:
    """What a run would need on --gpus of --gpu: memory by part, whether it fits, speed and time; nothing is run."""
    shape = read_config(config.init_from) if config.init_from else model_config(config)
    peak_flops, capacity, efficiency = GPUS[config.gpu]
    length = f"{config.batch_size} × {config.seq_len}"
    found = [source for source in mixture_weights(config.data)[0] if (Path(source) / "meta.json").exists()]
    of_pairs = any(read_meta(source).get("kind") == "preference" for source in found)
    if config.epochs:
        data = Mixture(config.data, "train", config.seq_len, config.pack)
        config = in_steps(config, len(data) / config.batch_size)
        length += f", {config.epochs:g} epochs of {len(data):,} sequences"
    compiled = config.compile != "off"
    needs = forecast(shape, config, config.gpus, compiled, of_pairs)
    parts = {name: num_bytes / 2**30 for name, num_bytes in needs.items()}
    need, reserve = sum(parts.values()), 2.0  # GiB; the reserve is for CUDA, NCCL and gaps in the allocator
    verdict = "fits" if need + reserve <= capacity else "does not fit"
    share = config.batch_size // config.gpus
    tokens = config.steps * config.batch_size * config.seq_len
    flops = flops_per_token(shape, config.seq_len, config.lora_rank > 0)
    again = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}.get(config.checkpointing)
    again = 1 / 3 / int(config.checkpointing) if again is None else again
    speed = efficiency * peak_flops / (flops + again * flops_per_token(shape, config.seq_len))
    hours = tokens / (speed * config.gpus) / 3600
    name = config.init_from or config.size
    setting = f"{config.micro_batch or share} × {config.seq_len} tokens at a time, checkpointing {config.checkpointing}"
    lines = [
        f"{name}: {count_parameters(shape):,} parameters on {config.gpus} × {config.gpu}, {setting}",
        "GiB a GPU: " + ", ".join(f"{name} {amount:.1f}" for name, amount in parts.items()),
        f"together {need:.1f} of {capacity} GiB: {verdict} ({reserve:.0f} GiB are kept in reserve)",
        f"about {speed:,.0f} tokens/s a GPU if {efficiency:.0%} of its {peak_flops / 1e12:.0f} TFLOP/s are reached, "
        f"{hours:,.1f} hours for {config.steps:,} steps of {length} ({tokens:,} tokens)",
    ]
    return "\n".join(lines)


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
        lines = log.read_text().splitlines() if log.exists() else []
        whole = (line for line in lines if line.endswith("}"))  # a kill may have left half of the last one
        write_whole(log, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= start))

    def introduce(self, shape: ModelConfig, compiled: bool):
        """The first words of a run: what, where, how much, and what it will need."""
        config, world, kind = self.config, dist.get_world_size(), self.device.type
        where = f"{config.dtype} arithmetic on {kind}, {world} process{'es' * (world > 1)}{', compiled' * compiled}"
        each = "pairs" if self.unit == "pairs" else f"× {config.seq_len} tokens"
        size = f"{config.steps} steps of {config.batch_size} {each}, saved every {config.save_every}"
        epochs = self.data.epochs(config.steps * config.batch_size)
        read = ", ".join(f"{count:.2f} epochs of {folder}" for folder, count in epochs.items())
        self.say(f"{count_parameters(shape):,} parameters, {where}; {size}, {read}")
        needs = forecast(shape, config, world, compiled, of_pairs=self.unit == "pairs")
        parts = {name: num_bytes / 2**30 for name, num_bytes in needs.items()}
        most = ", ".join(f"{name} {amount:.2g}" for name, amount in parts.items())
        self.say(f"forecast: {sum(parts.values()):.2g} GiB in each process at the peak of a step ({most})")

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
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(fields) + "\n")
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

        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
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


@functools.cache
def count_parameters(shape: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(shape).parameters())


def flops_per_token(shape: ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """6 N + 12 layers · width · T, for a forward and backward pass without recomputation (PaLM, appendix B).

    Frozen weights need no gradients, a third of 6 N; what adapters cost in their place is not counted.
    """
    return (4 if frozen else 6) * count_parameters(shape) + 12 * shape.num_layers * shape.dim * seq_len


def gpu_peak(device: torch.device) -> float | None:
    """bf16 FLOP/s of this GPU, where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, (peak, *_) in GPUS.items() if gpu.split("-")[0] in name), None)


def describe_run(config: Config, shape: ModelConfig, metas: list[dict], device: torch.device) -> dict:
    """run.json: everything needed to know later what was run."""
    first = str(checkpoint_folder(Path(config.init_from)).resolve()) if config.init_from else ""
    of_pairs = any(meta.get("kind") == "preference" for meta in metas)
    return {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(shape),
        "probe": code_probe(shape),
        "init_from": first,
        "init_sha256": from_first_rank(lambda: fingerprint(first)) if first and of_pairs else "",
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
    known = from_first_rank(lambda: fingerprint(config.init_from))
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
    saved = Config(**flags_of(read_json(Path(first.resume) / "run.json", "config")))
    return dataclasses.replace(saved, resume=first.resume, out=first.resume, stop_at=0, anyway=False)


def flags_of(record: dict) -> dict:
    """The flags in a run's record; JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record["config"].items()}


def choose_run(config: Config) -> dict | None:
    """The record of the run that config continues, None for a new one. Raises ValueError where the two differ."""
    folder = Path(config.out)
    if not (folder / "last").exists() and not config.resume:  # not begun; run.json may be that of a start that failed
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        if "run.json" not in names and any(not name.endswith(".tmp") for name in names):
            raise ValueError(f"--out {folder} holds other files; choose another folder")
        return None
    if config.resume and folder != Path(config.resume):
        raise ValueError(f"--out {folder} does not go with --resume {config.resume}, which is the run's folder")
    record = read_json(folder / "run.json", "config", "model", "init_from", "dataset")
    for name, theirs in flags_of(record).items():
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
    positive = ("keep", "learning_rate", "lora_alpha", "dpo_beta", "grad_clip", "max_bad_steps", "spike", "gpus")
    for name in ("seq_len", "steps", "batch_size", *every, *positive):
        if not getattr(lengths, name) > 0:
            raise ValueError(f"--{name} {getattr(config, name)} must be above 0")
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
    device = join_world(config.deterministic)
    try:
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
    if rank == 0 and finished and config.sample:
        show_sample(config)


def train(config: Config, record: dict | None, device: torch.device, stop: Stop) -> bool:
    """Take the run in config.out from its last checkpoint, or from nothing, to its end. False if it ends before."""
    folder, metas = Path(config.out), [read_meta(source) for source in mixture_weights(config.data)[0]]
    if record and record["dataset"] != describe_data(config, metas):
        raise ValueError(f"--data {' '.join(config.data)} is another dataset than when {config.out} began")
    data, val = (Mixture(config.data, split, config.seq_len, config.pack) for split in ("train", "val"))
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
        load_weights(model, from_first_rank(lambda: str(find_base(adapter, folder))), local_rows)
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
    finally:
        gc.enable()
    report.close()
    return done == config.steps


def check_reference(record: dict, folder: Path) -> str:
    """The model that the run in folder began with. Raises ValueError if it is another by now."""
    first = record["init_from"]
    if first and not is_known(first, record["init_sha256"]):
        raise ValueError(f"{first} holds other weights than when {folder} began")
    return first


def first_weights(model: Transformer, config: Config, path: str):
    """The weights that a run begins with: those at path, or if it is empty random ones."""
    if path:
        load_weights(model, path, local_rows)
    else:
        model.init_weights(config.seed, local_rows)


def prepare_folder(config: Config, record: dict):
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "last").exists():
        write_whole(folder / "run.json", json.dumps(record, indent=2))
    Tokenizer(mixture_weights(config.data)[0][0]).save(folder)


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
