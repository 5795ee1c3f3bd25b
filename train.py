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
    checkpoint_folder,
    has_checkpoint,
    hashes,
    named_by_last,
    newest_first,
    remove,
    remove_old,
)
from lib.configs import config_to_hugging_face
from lib.datasets import changed_file
from lib.files import sync, write_whole
from lib.forecast import GPUS, count_parameters, flops_per_token, gpu_peak
from lib.kernels import IGNORE, Documents
from lib.lora import TARGETS, adapters, without_adapters
from lib.naming import is_finite, readable
from lib.peft import adapter_settings
from lib.processes import end_with_parent
from lib.records import read_json
from lib.runs import append_row, held, is_record, read_log, read_run
from lib.tokenizer import find_tokenizer
from lib.weights import find_base, fingerprint, is_known, load_weights, read_config
from model import SIZES, ModelConfig, Transformer

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
    gpu: str = "A100-80GB"              # a name in lib.forecast.GPUS


# flags that may differ when a run is continued: but for rounding they do not change what is computed, and of --data
# the run's record knows the contents
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


# ---- set-up ----


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
    probe.check_code(Transformer, ModelConfig, config.init_from, config.anyway)
    shape = read_config(config.init_from, ModelConfig)
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
            yield source, to_device(rows if val.packed else rows._replace(bounds=None), device), len(mine)


def rows_of(data: Mixture) -> int:
    """How many rows a sequence that is drawn has in its batch: a pair has two."""
    return 2 if data.kind == "preference" else 1


# ---- checkpoints ----


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
    shape = read_config(config.init_from, ModelConfig) if config.init_from else model_config(config)
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


# ---- the run ----


def resumed(first: Config) -> Config:
    """The flags of the run that --resume names, as the defaults of those typed beside it. Raises ValueError."""
    if not first.resume:
        return Config()
    saved = Config(**read_run(Path(first.resume), config=Config)["config"])
    return dataclasses.replace(saved, resume=first.resume, out=first.resume, stop_at=0, anyway=False)


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
        probe.check_code(Transformer, ModelConfig, folder / f"step_{start:08d}", config.anyway)

    report = Report(config, data, max(0, start), step_flops, device)
    report.introduce(shape, compiled)
    last = min(config.stop_at or config.steps, config.steps)
    if start >= last:
        done = "finished; to train again, delete it or choose another --out"
        report.say(f"{folder} is {done if start >= config.steps else f'already at step {start}'}")
        return start >= config.steps
    if adapter:
        first_weights(model, config, from_first_rank(lambda: str(find_base(adapter, folder, ModelConfig))))
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


def first_weights(model: Transformer, config: Config, path: str):
    """The weights that a run begins with: those at path, or if it is empty random ones."""
    if path:
        on_all(functools.partial(load_weights, model, path))
    elif lora.adapters(model):
        lora.init_adapters(model, config.seed)
    else:
        model.init_weights(config.seed)


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


if __name__ == "__main__":
    run_command(main, Config, resumed)
    leave()
