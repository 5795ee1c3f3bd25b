"""Train a LLaMA-2: one loop for one laptop or many GPUs.

    python train.py                                           # the standard library, three minutes
    python train.py --data data/NAME --size 15M --out out/RUN
    torchrun --standalone --nproc_per_node 8 train.py ...     # the same run on 8 GPUs
    python train.py --resume out/RUN                          # continues it exactly
    python train.py --plan --size 7B --seq_len 4096 --gpus 8  # would it fit, how long would it take

Read `train_step`, then `train`. Every run joins a process group and shards its model over it, also
one of one process. A step's batch is a function of dataset, seed, batch size and step alone.
"""

from lib.cli import run_command  # isort: skip (first: refuses old Pythons, Windows)

import functools
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

from data import Batch, Mixture
from lib import checkpointing, kernels, lora, objectives, opening, planning, train_flags, world
from lib.defaults import by_kind
from lib.guard import Guard, Stop
from lib.optimizers import matrices, muon, zero_moments
from lib.report import Report
from lib.run_record import prepare_folder
from lib.run_report import draw_together
from lib.saving import Checkpoints, undisturbed
from lib.shapes import planned_config
from lib.training_samples import Sampler, show_sample
from model import SIZES, ModelConfig, Transformer, plain_attention


@dataclass
class Core:
    """The flags to read first; lib/train_flags.py adds those of lib, such as --compile."""

    # where
    data: tuple[str, ...] = ("data/stdlib",)
    """folders made by data.py; FOLDER:WEIGHT draws from several"""
    out: str = "out/stdlib"             # the run's folder: checkpoints, log.jsonl, loss.png
    init_from: str = ""                 # model to start from: anything that model.load reads
    # what
    size: str = "laptop"                # a name in model.SIZES; the vocabulary is the dataset's
    seq_len: int = 256                  # tokens of a sequence, and the window of a new model
    pack: bool = False                  # rows of whole documents that do not see each other
    # how long
    steps: int = 1350                   # optimizer steps; the schedule ends there
    batch_size: int = 8                 # sequences in an optimizer step, over all processes
    micro_batch: int = 0                # sequences of a process in a forward pass; 0: its share
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the blocks' matrices, AdamW keeps the rest"""
    learning_rate: float = 2e-3         # peak
    warmup: float = 0.02                # steps, or below 1 a fraction of all steps
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: constant, then linear"""
    decay: float = 0.2                  # of wsd: the fraction of steps in which the rate falls
    final_lr: float = 0.1               # fraction of the peak that is left at the last step
    weight_decay: float = 0.1           # of matrices; norms have none
    beta1: float = 0.9                  # of AdamW
    beta2: float = 0.99                 # of AdamW; small batches want it above LLaMA's 0.95
    grad_clip: float = 1.0              # largest norm of the gradient of all weights
    seed: int = 0                       # of the first weights and of the order of the data


@dataclass
class Config(train_flags.Flags, Core):
    """Train a LLaMA-2. The defaults suit the laptop size; lib/defaults.py has those of tuning."""

    config_class = ModelConfig  # of the model's shape; a variant may bring another


def learning_rate(step: int, config: Config) -> float:
    """Of a step, counted from 0: up from zero, then down to final_lr as --schedule says."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    begin, last = warmup, config.steps - 1
    if config.schedule == "wsd":
        begin = max(warmup, (1 - config.decay) * config.steps)
    progress = 1.0 if step >= last else max(0.0, step - begin) / max(1, last - begin)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    remaining = {"cosine": cosine, "constant": 1.0}.get(config.schedule, 1 - progress)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * remaining)


# ---- the model, spread over all processes ----


def empty_model(shape: ModelConfig, config: Config) -> Transformer:
    """The model that a run trains, on the meta device: names and shapes without memory."""
    dtype = world.arithmetic(config)
    with torch.device("meta"):
        return lora.prepare(shape.build(), config, dtype)  # unchanged without LoRA's flags


def build(
    shape: ModelConfig, config: Config, device: torch.device, frozen: bool = False
) -> Transformer:
    """A model over all ranks, its weights yet to be set; the whole of it never exists anywhere.

    A frozen one is never trained, so its weights need no more digits than the arithmetic.
    """
    model = empty_model(shape, config)
    if frozen:
        model.to(world.arithmetic(config)).requires_grad_(False)
    mesh = world.make_mesh(config.shard_over, device)
    model = shard(model, config, mesh).to_empty(device=device)
    if frozen:
        model.set_reshard_after_forward(True)  # no backward pass will do it
    if shape.tie_embeddings:  # which now have memory of their own each
        model.unembedding.weight = model.embedding.weight
    return model


def shard(model: Transformer, config: Config, mesh: DeviceMesh) -> Transformer:
    """Checkpoint, compile, then shard every block; weights and sums of gradients are fp32.

    In this order, since the compiler must see what is computed again, and must not see how FSDP
    gathers a block's weights before its forward and its backward pass.
    """
    # cast_forward_inputs would round the rotary tables to bf16 on their way into a block
    policy = MixedPrecisionPolicy(
        world.arithmetic(config), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    unit = functools.partial(fully_shard, mp_policy=policy, mesh=mesh)
    kernels.install(model, config, mesh.device_type, plain_attention)
    for layer, block in enumerate(model.blocks):
        block.forward = checkpointing.wrap(block.forward, config.checkpointing, layer)
        if config.compile == "on":
            whole = kernels.in_one_graph(block, config, mesh.device_type)
            block.forward = torch.compile(block.forward, fullgraph=whole)
    for modules in kernels.sharding_units(model):
        unit(modules, reshard_after_forward=config.reshard_after_forward)
    if not model.config.tie_embeddings:
        unit([model.norm, model.unembedding], reshard_after_forward=False)  # needed next
    unit(model)
    for name in ("loss", "log_probs"):
        register_fsdp_forward_method(model, name)
    return model


def make_optimizers(model: Transformer, config: Config) -> list[Optimizer]:
    """AdamW, which decays matrices and no norms; --optimizer muon takes the blocks' matrices."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for_muon = matrices(model.blocks) if config.optimizer == "muon" else []
    others = [p for p in trained if p not in set(for_muon)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw = AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    return [zero_moments(adamw), *muon(for_muon, config)]


# ---- a step ----


class NextToken:
    """What pretraining and fine-tuning minimise: nats a target. Others: lib/objectives.py."""

    unit, names = "tokens", ("loss",)

    def __init__(self, neftune: float = 0.0, seed: int = 0):
        self.neftune, self.seed = neftune, seed

    def counts(self, batch: Batch) -> Tensor:
        """(what the sums are divided by, here the targets; targets; sequences without any)."""
        targets, without = objectives.count_targets(batch.targets)
        return torch.stack((targets, targets, without))

    def sums(self, model: Transformer, batch: Batch) -> Tensor:
        """Of all targets, one sum for each of names; the gradient is that of the first."""
        with objectives.noisy(model, batch, self.neftune, self.seed):
            targets = objectives.for_loss(model, batch.targets)
            return model.loss(batch.tokens, targets, batch.documents)[None]

    def scores(self, means: list[float]) -> dict[str, float]:
        """What is logged of a step beside its loss."""
        return {}

    def validation(self, sums: Tensor, val: Mixture) -> dict[str, float]:
        return objectives.bits_per_byte(sums, val)

    def in_words(self, scores: dict[str, float]) -> str:
        return f"{scores['val_bits_per_byte']:.4f} bits a byte"


class Outcome(NamedTuple):
    """What a step came to, on the device until somebody reads it; the same on every rank."""

    loss: Tensor    # nats a target, over all ranks and micro-batches
    norm: Tensor    # of the loss's gradient, before clipping; not finite: there was no update
    bad: Tensor     # so it is, or the loss, and a smaller scale of the loss would not help
    spike: Tensor   # one of them is far above its level
    losses: Tensor  # (ranks, micro-batches): what each contributed
    counts: Tensor  # what the objective counts, targets, and sequences without any
    means: Tensor   # of the objective's sums


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    batches: list[Batch],
    lr: float,
    config: Config,
    guard: Guard,
    objective=NextToken(),
) -> Outcome:
    """One optimizer step over this rank's micro-batches.

    Loss and norm are, but for rounding, the same for every way to divide the same batch. Nothing
    here waits for the device: where the update must not happen, the device finds out by itself.
    """
    rank, size, device = dist.get_rank(), dist.get_world_size(), batches[0].tokens.device
    counts = sum(objective.counts(batch) for batch in batches).to(device, non_blocking=True)
    dist.all_reduce(counts)                               # of all ranks
    each = torch.zeros(size, len(batches), len(objective.names), device=device)
    for i, batch in enumerate(batches):
        lora.choose_dropped(model, batch, config)         # nothing without --lora_dropout
        is_last = i == len(batches) - 1                   # gradients are reduced with it
        model.set_requires_gradient_sync(config.reduce_each or is_last)
        sums = objective.sums(model, batch) / (counts[0].clamp(min=1) / size)
        sums[0].backward(guard.scale)                     # FSDP's mean over ranks divides by size
        each[rank, i] = sums.detach() / size
    dist.all_reduce(each)
    losses = each[..., 0]
    loss = losses.sum()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).full_tensor()
    excess = (norm / config.grad_clip).clamp(min=guard.scale)  # divides gradients; inf: no update
    norm /= guard.scale                                   # of the loss itself
    bad, spike = guard.judge(loss, norm)                  # and moves the scale
    skip = bad | spike & (config.on_spike == "skip")
    for optimizer in optimizers:                          # clips, steps unless skip, zeroes them
        guard.update(optimizer, lr, excess, skip)
    return Outcome(loss, norm, bad, spike, losses, counts, each.sum((0, 1)))


@torch.no_grad()
def evaluate(
    model: Transformer, val: Mixture, config: Config, device: torch.device, objective=NextToken()
) -> dict[str, float]:
    """The objective's scores on a fixed set of validation sequences, whatever the ranks."""
    sums = torch.zeros(len(val.parts), 1 + len(objective.names), dtype=torch.float64, device=device)
    for source, batch, _ in val.validation(config, dist.get_rank(), dist.get_world_size()):
        batch = batch.to(device)
        sums[source, 0] += objective.counts(batch)[0].to(device)
        sums[source, 1:] += objective.sums(model, batch)
    dist.all_reduce(sums)
    return objective.validation(sums.cpu(), val)


# ---- the run ----


@dataclass
class Run:
    """What the steps of a run work with."""

    config: Config  # with the type of the arithmetic, and all lengths in steps
    device: torch.device
    data: Mixture
    val: Mixture
    model: Transformer
    optimizers: list[Optimizer]
    guard: Guard
    objective: NextToken | objectives.DPO
    checkpoints: Checkpoints
    report: Report
    sampler: Sampler
    step: int  # how many are done
    last: int  # where this process ends

    def feed(self, step: int) -> Iterator[list[Batch]]:
        """The batches of the steps from `step` on, past the data that rolling back skipped."""
        shift = int(self.guard.passed_over)
        steps = range(step + shift, self.last + shift)
        return self.data.feed(self.config, steps, self.device)


def begin(config: Config, record: dict | None, device: torch.device) -> Run:
    """A run at its last checkpoint, or at its first weights; record is None for a new run.

    Raises ValueError where flags, data or code are not those with which it began.
    """
    data = Mixture(config.data, "train", config.seq_len, config.pack)
    val = Mixture(config.data, "val", config.seq_len, config.pack)
    opening.check_data(config, data)
    settled = opening.settle(config, record, data, device, SIZES)
    config, shape, record = settled.config, settled.shape, settled.record
    model, guard = build(shape, config, device), Guard(config.spike, device, config.dtype == "fp16")
    optimizers = make_optimizers(model, config)
    prepare_folder(config, shape, record, data)
    checkpoints = Checkpoints(config, model, optimizers, guard, settled.probe, record)
    start = checkpoints.restore()  # weights, moments, guard; -1: there is no checkpoint yet
    step = max(0, start)
    objective = NextToken(config.neftune, config.seed)
    if data.kind == "preference":
        objective = objectives.DPO(config.dpo_beta)
    report = Report(config, shape, data, objective, guard, step, device)
    report.introduce(model)
    last = min(config.stop_at or config.steps, config.steps)
    run = Run(
        config, device, data, val, model, optimizers, guard, objective, checkpoints, report,
        Sampler(config, val, shape.max_seq_len), step, last,
    )  # fmt: skip
    if start >= last:
        report.finished(start)
        return run
    # of a new run all; else what checkpoints leave out: LoRA's base, DPO's reference
    opening.set_weights(run, record, build, new=start < 0)
    if start < 0:
        opening.rehearse(run, evaluate)
    else:
        report.say(f"continuing {config.out} after step {start}")
    return run


def train(run: Run, stop: Stop) -> bool:
    """Take a run from the step where it is to its last. False if it has more steps to go."""
    config, report, step = run.config, run.report, run.step
    batches = run.feed(step)
    with undisturbed(run.checkpoints, report):  # no garbage collection; an error finishes a save
        while step < run.last:
            stop.ask_others()
            lr = learning_rate(step, config)
            outcome = train_step(
                run.model, run.optimizers, next(batches), lr, config, run.guard, run.objective
            )
            step += 1
            report.take(step, lr, outcome)
            stopped_by = stop.agreed()
            ends = step == run.last or bool(stopped_by)
            log_now = step % config.log_every == 0 or ends
            save_now = step % config.save_every == 0 or ends
            evaluate_now = step % config.eval_every == 0 or step == config.steps
            sample_now = run.sampler.is_due(step)
            if not (log_now or save_now or evaluate_now or sample_now):
                continue
            spike = report.read(run.last, log_now)  # here the host waits for the device
            with report.paused():
                if spike and config.on_spike == "rollback":
                    step = run.checkpoints.roll_back(spike, report)
                    batches = run.feed(step)
                    continue
                if evaluate_now:
                    scores = evaluate(run.model, run.val, config, run.device, run.objective)
                    report.validation(step, scores)
                if sample_now:
                    report.sample(step, run.sampler.write(run.model, run.device))
                if save_now:
                    run.checkpoints.save(step, ends, report)
                gc.collect(1)  # it is off during the steps
            if stopped_by:
                report.stopped(step, stopped_by)
                break
    report.close()
    return step == config.steps


def plan(config: Config) -> str:
    """What a run would need on --gpus of --gpu; nothing is run."""
    train_flags.check_flags(config, config.gpus)
    model = empty_model(planned_config(config, SIZES), config)
    parts = (config.data, "train", config.seq_len, config.pack)
    return planning.plan(model, config, Mixture(*parts) if config.epochs else None)


def main(config: Config):
    if config.plan or config.draw:
        print(plan(config) if config.plan else draw_together(config.draw))
        return
    with opening.entered(config) as device:
        record = opening.find_record(config)
        with Stop() as stop:
            finished = train(begin(config, record, device), stop)
        first = dist.get_rank() == 0
    if first and finished and config.sample:
        show_sample(config)


if __name__ == "__main__":
    run_command(main, Config, by_kind)
    world.leave()  # at once: Python's own ending can abort in a thread of gloo
