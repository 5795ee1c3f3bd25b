"""Train a LLaMA-2: one loop for one laptop or many GPUs.

    python train.py                                             # the standard library, three minutes on two cores
    python train.py --data data/NAME --size 15M --out out/RUN
    torchrun --nproc_per_node 8 train.py --data data/NAME ...   # the same run on 8 GPUs
    python train.py --resume out/RUN                            # continues it exactly

    python train.py --plan --size 7B --seq_len 4096 --gpus 8 --gpu A100-80GB     # would it fit, how long would it take

Every run joins a process group and shards its model over it, also a run of one process. The batch of a step
is a pure function of (dataset, seed, step); processes and micro-batches only divide the work.
"""

from lib.cli import run_command  # isort: skip (lib refuses old Pythons, Windows)

import contextlib
import dataclasses
import functools
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from data import Batch, Mixture, Tokenizer, mixture_weights, read_meta
from lib import forecast as forecasts
from lib import guard as guards
from lib import kernels, lora, objectives, opening, probe, report, saving, world
from lib.guard import Guard, Stop
from lib.opening import in_steps
from lib.rows import local_rows  # noqa: F401  (for those who look at a sharded model)
from lib.runs import held
from lib.saving import Checkpoints, restore
from lib.shapes import first_config, model_config
from lib.weights import find_base, load_weights, read_config
from lib.world import from_first_rank, join_world, leave, on_all, on_first_rank
from model import SIZES, ModelConfig, Transformer


@dataclass
class Core:
    # where
    data: tuple[str, ...] = ("data/stdlib",)  # folders made by data.py; FOLDER:WEIGHT draws from several
    out: str = "out/stdlib"             # the run's folder: checkpoints, log.jsonl, loss.png
    init_from: str = ""                 # model to start from: anything that model.load reads
    # what
    size: str = "laptop"                # a name in model.SIZES; the vocabulary is always the dataset's
    seq_len: int = 256                  # tokens of a sequence, and the context window of a new model
    pack: bool = False                  # fill sequences with whole documents that do not see each other
    # how long
    steps: int = 1350                   # optimizer steps; the learning rate's schedule ends there
    batch_size: int = 8                 # sequences in an optimizer step, over all processes
    micro_batch: int = 0                # sequences in a forward pass of one process; 0: its whole share
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon takes the blocks' matrices, AdamW keeps the rest
    learning_rate: float = 2e-3         # peak
    warmup: float = 0.02                # steps, or below 1 a fraction of all steps
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: constant, then linear
    decay: float = 0.2                  # of wsd: the fraction of all steps in which the rate falls
    final_lr: float = 0.1               # fraction of the peak that is left at the last step
    weight_decay: float = 0.1           # of matrices; norms have none
    beta1: float = 0.9                  # of AdamW
    beta2: float = 0.99                 # of AdamW; small batches want it higher than LLaMA's 0.95
    grad_clip: float = 1.0              # largest norm of the gradient of all weights
    seed: int = 0                       # of the first weights and of the order of the data
    # reporting
    eval_every: int | str = 500         # steps, or `0.5epoch`; the last step is always evaluated
    eval_tokens: int = 131_072          # validation tokens, always the same ones
    sample: str = "def "                # a text to continue when training ends; "" is none
    # machine
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic, weights stay fp32
    """auto: bf16 where it is faster"""
    compile: Literal["auto", "on", "off"] = "auto"  # auto: with a compiler, if the run is long enough
    checkpointing: str = "none"
    """activations computed again in the backward pass: none, selective, full, or 2 for those of
    every second block, 3 for every third, ..."""
    reshard_after_forward: bool = True
    """give gathered weights back until the backward pass; costs time, saves memory"""
    reduce_each: bool = False           # reduce gradients with every micro-batch, not with the last; the same


MicroBatch = Batch  # what a micro-batch is: on its way from disk to the loss there is one container


@dataclass
class Config(
    forecasts.Flags,
    world.Flags,
    saving.Flags,
    report.Flags,
    guards.Flags,
    objectives.Flags,
    kernels.Flags,
    lora.Flags,
    opening.Flags,
    Core,
):
    """Train a LLaMA-2. The defaults suit the laptop size; larger models want a lower learning rate."""


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


# ---- the model, spread over all processes ----


def build(
    shape: ModelConfig,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    frozen: bool = False,
) -> Transformer:
    """A model spread over all ranks, its weights yet to be set; the whole of it never exists anywhere.

    A frozen one is never trained, so its weights need no more digits than the arithmetic.
    """
    with torch.device("meta"):
        model = lora.prepare(Transformer(shape), config, dtype)  # without its flags as it is
    if frozen:
        model.to(dtype).requires_grad_(False)
    mesh = world.make_mesh(config.shard_over, device)
    model = shard(model, config, mesh, dtype, compiled).to_empty(device=device)
    if frozen:
        model.set_reshard_after_forward(True)  # no backward pass will do it
    if shape.tie_embeddings:
        model.unembedding.weight = model.embedding.weight
    return model


def shard(
    model: Transformer, config: Config, mesh, dtype: torch.dtype, compiled: bool
) -> Transformer:
    """Checkpoint, compile, then shard every block: fp32 shards, dtype arithmetic, fp32 gradient sums."""
    # cast_forward_inputs would round the rotary tables to bf16 on their way into a block
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    unit = functools.partial(fully_shard, mp_policy=policy, mesh=mesh)
    reshard = {"reshard_after_forward": config.reshard_after_forward}
    kernels.choose(model, config, compiled, mesh.device_type)
    for layer, block in enumerate(model.blocks):
        block.forward = checkpointed(block.forward, config.checkpointing, layer)
        if compiled:
            # the loop over documents that stands in for the GPU's kernel cannot be compiled
            whole = not config.pack or mesh.device_type == "cuda"
            block.forward = torch.compile(block.forward, fullgraph=whole)
        unit(block, **reshard)
    if not model.config.tie_embeddings:
        unit(model.embedding, **reshard)
        # the backward pass needs these first
        unit([model.norm, model.unembedding], reshard_after_forward=False)
    unit(model)
    for name in ("loss", "log_probs"):
        register_fsdp_forward_method(model, name)
    return model


def checkpointed(forward: Callable, mode: str, layer: int) -> Callable:
    """forward, but keeping less for the backward pass, which computes the rest again, the same."""
    if mode == "none" or mode.isdigit() and layer % int(mode):
        return forward
    contexts = {"context_fn": kernels.keep_the_costly} if mode == "selective" else {}
    return functools.partial(checkpoint, forward, use_reentrant=False, **contexts)


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


class NextToken:
    """What pretraining and fine-tuning minimise: nats a target. Another objective: lib/objectives.py."""

    unit, names = "tokens", ("loss",)

    def __init__(self, neftune: float = 0.0, seed: int = 0):
        self.neftune, self.seed = neftune, seed

    def counts(self, batch) -> Tensor:
        """What the sums are divided by, the targets; these again; and sequences without any."""
        targets, without = objectives.count_targets(batch.targets)
        return torch.stack((targets, targets, without))

    def sums(self, model: Transformer, batch) -> Tensor:
        """Of all targets, one sum for each of names; the gradient is that of the first."""
        with objectives.noisy(model, batch, self.neftune, self.seed):
            return model.loss(batch.tokens, batch.targets, batch.documents)[None]

    def scores(self, means: list[float]) -> dict[str, float]:
        """What is logged of a step beside its loss."""
        return {}

    def validation(self, sums: Tensor, val: Mixture) -> dict[str, float]:
        """Of targets and nats of each source: nats a target, and bits a byte of text.

        The bytes are those that the whole split has for a target: of its text, or of the answers
        in conversations. Several sources are also listed one by one.
        """
        each = torch.tensor([part.bytes_per_target for part in val.parts], dtype=sums.dtype)
        num_bytes, (targets, nats) = sums[:, 0] @ each, sums.sum(0)
        bits = (nats / math.log(2) / num_bytes).item()
        scores = {"val_loss": (nats / targets).item(), "val_bits_per_byte": bits}
        if len(val.parts) > 1:
            for name, (count, loss) in zip(val.folders, sums):
                scores[f"val_loss {name}"] = (loss / count).item()
        return scores

    def in_words(self, scores: dict[str, float]) -> str:
        return f"{scores['val_bits_per_byte']:.4f} bits a byte"


class Outcome(NamedTuple):
    """What a step came to, on the device until somebody reads it; the same on every rank."""

    loss: Tensor    # nats a target, over all ranks and micro-batches
    norm: Tensor    # of the loss's gradient, before clipping
    bad: Tensor     # loss or norm is not finite: there was no update
    spike: Tensor   # one of them is far above its level
    losses: Tensor  # (ranks, micro-batches): what each contributed
    counts: Tensor  # what the objective counts, targets, and sequences without any
    means: Tensor   # of the objective's sums


def train_step(
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    batches: list,
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
        last = i == len(batches) - 1                      # gradients are reduced once, with the last one
        model.set_requires_gradient_sync(config.reduce_each or last)
        sums = objective.sums(model, batch) / (counts[0].clamp(min=1) / size)
        sums[0].backward()                                # the reduction divides by size again
        each[rank, i] = sums.detach() / size
    dist.all_reduce(each)
    losses = each[..., 0]
    loss = losses.sum()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).full_tensor()
    bad, spike = guard.judge(loss, norm)
    skip = bad | spike & (config.on_spike == "skip")
    excess = (norm / config.grad_clip).clamp(min=1)       # what the gradients are divided by
    for optimizer in optimizers:
        guard.step(optimizer, lr, excess, skip)
    return Outcome(loss, norm, bad, spike, losses, counts, each.sum((0, 1)))


@torch.no_grad()
def evaluate(
    model: Transformer, val: Mixture, config: Config, device: torch.device, objective=NextToken()
) -> dict[str, float]:
    """The objective's scores on a fixed set of validation sequences; any number of ranks agrees."""
    sums = torch.zeros(len(val.parts), 1 + len(objective.names), dtype=torch.float64, device=device)
    for source, batch, _ in val.validation(config, dist.get_rank(), dist.get_world_size()):
        batch = batch.to(device)
        sums[source, 0] += objective.counts(batch)[0].to(device)
        sums[source, 1:] += objective.sums(model, batch)
    dist.all_reduce(sums)
    return objective.validation(sums.cpu(), val)


# ---- the run ----


def on_meta(shape: ModelConfig, config: Config) -> Transformer:
    """The model that a run trains, without memory."""
    with torch.device("meta"):
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        return lora.prepare(Transformer(shape), config, dtype)


def forecast(
    shape: ModelConfig, config: Config, ranks: int, compiled: bool, pairs: bool = False
) -> dict[str, int]:
    """Bytes on each rank at the peak of a step, by what they are for (lib/forecast.py)."""
    return forecasts.forecast(on_meta(shape, config), config, ranks, compiled, pairs)


def plan(config: Config) -> str:
    """What a run would need on --gpus of --gpu; nothing is run."""
    if config.init_from:
        shape = read_config(config.init_from, ModelConfig)
    else:
        shape = model_config(config, SIZES)
    length = f"{config.batch_size} × {config.seq_len}"
    made = [folder for folder in mixture_weights(config.data)[0] if (Path(folder) / "meta.json").exists()]
    pairs = any(read_meta(folder).get("kind") == "preference" for folder in made)
    if config.epochs:
        data = Mixture(config.data, "train", config.seq_len, config.pack)
        config = in_steps(config, len(data) / config.batch_size)
        length += f", {config.epochs:g} epochs of {len(data):,} sequences"
    return forecasts.plan(on_meta(shape, config), config, length, pairs)


def main(config: Config):
    if config.plan:
        opening.check(config, config.gpus)
        print(plan(config))
        return
    device, lock = join_world(config.deterministic), contextlib.ExitStack()
    try:
        on_first_rank(lambda: lock.enter_context(held(Path(config.out))))  # of all, until they have left
        record = opening.choose_run(config, ModelConfig)
        opening.check(config, dist.get_world_size())
        default = config.data == Config.data and not Path(config.data[0]).exists()
        if dist.get_rank() == 0 and default:
            opening.prepare_default(config.data[0])
        dist.barrier()
        with Stop() as stop:
            finished = train(begin(config, record, device), stop)
        rank = dist.get_rank()
    finally:
        dist.destroy_process_group()
        lock.close()
    if rank == 0 and finished and config.sample:
        opening.show_sample(config)


@dataclass
class Run:
    """What the steps of a run work with."""

    config: Config  # with the type of the arithmetic, and all lengths in steps
    device: torch.device
    data: Mixture
    val: Mixture
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    guard: Guard
    objective: NextToken | objectives.DPO
    checkpoints: Checkpoints
    report: report.Report
    step: int       # how many are done
    last: int       # where this process ends
    rolled_back_to: Counter = field(default_factory=Counter)  # how often, by step

    def feed(self, step: int) -> Iterator[list[Batch]]:
        """The batches of the steps from `step` on, past the data that rolling back has skipped."""
        shift = int(self.guard.passed_over)
        steps = range(step + shift, self.last + shift)
        return self.data.feed(self.config, steps, self.device)


def settle(config: Config, record: dict | None, data: Mixture, device: torch.device) -> tuple:
    """(record, shape, config) of a run; its config with arithmetic and lengths settled."""
    folders, shares = mixture_weights(config.data)
    metas = [read_meta(folder) for folder in folders]
    if record:
        shape = ModelConfig(**record["model"])
    else:
        shape = first_config(config, metas[0], SIZES, ModelConfig)
        if config.init_from:
            probe.check_code(Transformer, ModelConfig, config.init_from, config.anyway)
    dtype = world.compute_dtype(record["config"]["dtype"] if record else config.dtype, device)
    config = dataclasses.replace(config, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    if record is None:  # with the flags as they were typed
        probed = probe.probe(Transformer, shape)
        record = opening.describe_run(config, shape, probed, metas, shares, device)
    return record, shape, in_steps(config, len(data) / config.batch_size)


def begin(config: Config, record: dict | None, device: torch.device) -> Run:
    """A run at its last checkpoint, or at its first weights. Raises ValueError where its data are not as they were."""
    opening.check_data(config, record, *mixture_weights(config.data))
    data, val = (Mixture(config.data, split, config.seq_len, config.pack) for split in ("train", "val"))
    opening.check_files([(Path(part.folder), part.meta) for part in data.parts])
    opening.check_terms(config, data.kind)
    record, shape, config = settle(config, record, data, device)
    folder, adapter = Path(config.out), record.get("adapter")
    dtype = world.compute_dtype(config.dtype, device)
    flops = forecasts.flops_per_token(shape, config.seq_len, config.lora_rank > 0)
    flops *= config.batch_size * config.seq_len
    compiled = world.should_compile(config.compile, device, flops * config.steps)
    make = functools.partial(build, shape, device=device, dtype=dtype, compiled=compiled)
    model = make(dataclasses.replace(config, pack=data.packed))
    optimizers, guard = make_optimizers(model, config), Guard(config.spike, device)
    on_first_rank(lambda: opening.prepare_folder(folder, record, Tokenizer(data.folders[0])))
    tensors = saving.checkpoint_tensors(model, optimizers, guard)
    probed = probe.probe(Transformer, shape)
    checkpoints = Checkpoints(folder, config, model, tensors, probed, adapter)
    start = restore(folder, shape, tensors)
    if start >= 0:
        probe.check_code(Transformer, ModelConfig, folder / f"step_{start:08d}", config.anyway)
    pairs = data.kind == "preference"
    objective = objectives.DPO(config.dpo_beta) if pairs else NextToken(config.neftune, config.seed)
    told = report.Report(config, data, objective, max(0, start), flops, device)
    told.introduce(shape, compiled, forecast(shape, config, dist.get_world_size(), compiled, pairs))
    last = min(config.stop_at or config.steps, config.steps)
    run = Run(config, device, data, val, model, optimizers, guard, objective, checkpoints, told, max(0, start), last)
    if start >= last:
        done = "finished; to train again, delete it or choose another --out"
        told.say(f"{folder} is {done if start >= config.steps else f'already at step {start}'}")
        return run
    if adapter:
        base = from_first_rank(lambda: str(find_base(adapter, folder, ModelConfig)))
        first_weights(model, config, base)
    if pairs:
        objective.reference = model if adapter else reference(run, record, make)
    if start >= 0:
        checkpoints.newest = start
        told.say(f"continuing {folder} after step {start}")
    else:
        first_weights(model, config, "" if adapter else record["init_from"])
        rehearse(run)
    return run


def reference(run: Run, record: dict, make: Callable[..., Transformer]) -> Transformer:
    """The frozen model that a run on pairs began with."""
    folder = Path(run.config.out)
    from_first_rank(lambda: opening.check_reference(record, folder, ModelConfig))
    settings = dataclasses.replace(run.config, freeze=(), pack=run.data.packed)
    frozen = make(settings, frozen=True)
    first_weights(frozen, run.config, record["init_from"])
    return frozen


def first_weights(model: Transformer, config: Config, path: str):
    """The weights that a run begins with: those at path, or if it is empty random ones."""
    if path:
        on_all(functools.partial(load_weights, model, path))
    elif lora.adapters(model):
        lora.init_adapters(model, config.seed)
    else:
        model.init_weights(config.seed)


def rehearse(run: Run):
    """Save, evaluate and sample before the first step: what would fail after days fails now."""
    run.checkpoints.begin(0)
    if problem := run.checkpoints.finish():
        raise problem
    short = dataclasses.replace(run.config, eval_tokens=run.config.seq_len)
    evaluate(run.model, run.val, short, run.device, run.objective)
    if run.config.sample:
        tokenizer, window = Tokenizer(run.data.folders[0]), run.model.config.max_seq_len
        ids = tokenizer.encode_prompt(run.config.sample)
        if len(ids) > window:
            raise ValueError(f"--sample has {len(ids)} tokens, more than the context window of {window}")
        with torch.no_grad():
            logits = run.model(torch.tensor([ids], device=run.device))
        tokenizer.decode([logits[0, -1].argmax().item()])


def train(run: Run, stop: Stop) -> bool:
    """Take a run from the step where it is to its last. False if it has more steps to go."""
    config, told, step = run.config, run.report, run.step
    batches = run.feed(step)
    with undisturbed(run):
        while step < run.last:
            stop.ask_others()
            lr, passed_over = learning_rate(step, config), int(run.guard.passed_over)
            outcome = train_step(
                run.model, run.optimizers, next(batches), lr, config, run.guard, run.objective
            )
            step += 1
            told.take(step, lr, passed_over, outcome)
            stopped_by = stop.agreed()
            ends = step == run.last or bool(stopped_by)
            log_now = step % config.log_every == 0 or ends
            save_now = step % config.save_every == 0 or ends
            evaluate_now = step % config.eval_every == 0 or step == config.steps
            if not log_now and not save_now and not evaluate_now:
                continue
            spike = told.read(run.last, log_now)
            with told.paused():
                if spike and config.on_spike == "rollback":
                    step = roll_back(run, spike)
                    batches = run.feed(step)
                    continue
                if evaluate_now:
                    scores = evaluate(run.model, run.val, config, run.device, run.objective)
                    told.validation(step, scores)
                if save_now:
                    save(run, step, ends)
                gc.collect(1)
            if stopped_by:
                told.say(f"{stopped_by}: stopped after step {step}; the same command continues {config.out}")
                break
    told.close()
    return step == config.steps


@contextlib.contextmanager
def undisturbed(run: Run) -> Iterator[None]:
    """Python's garbage collector works at the pauses of `train` instead of anywhere, and a run that fails does not
    lose the checkpoint that is under way; Ctrl-C does not wait for it."""
    gc.disable()
    try:
        yield
    except Exception:
        if problem := run.checkpoints.finish():
            run.report.say(str(problem))
        raise
    finally:
        gc.enable()


def save(run: Run, step: int, ends: bool):
    """Begin a checkpoint. One that failed is reported and the run goes on, but at its end that is an error."""
    if problem := run.checkpoints.finish():
        run.report.say(f"{problem}; the run goes on")
    run.checkpoints.begin(step)
    run.report.draw()
    if ends:
        if problem := run.checkpoints.finish():
            raise problem
        run.report.say(f"{run.config.out}: checkpoint of step {step}, log.jsonl, loss.png")


def roll_back(run: Run, spike: int) -> int:
    """Return to the last checkpoint, to go on past the data between it and the spike (PaLM, section 5.1)."""
    run.checkpoints.finish()
    passed_over, most = int(run.guard.passed_over), run.config.max_bad_steps
    step = restore(Path(run.config.out), run.model.config, run.checkpoints.tensors)
    run.rolled_back_to[step] += 1
    if run.rolled_back_to[step] > most:
        what = f"a spike at step {spike} again after going back to step {step} {most} times"
        raise ValueError(f"{what}; a lower --learning_rate usually helps, or a higher --spike")
    run.guard.passed_over.fill_(passed_over + spike - step)
    run.report.begin(step)
    run.report.write(step=step, event="rollback", spike=spike, passed_over=int(run.guard.passed_over))
    run.report.say(f"back to step {step}, and on past the data of {spike - step} steps")
    return step


if __name__ == "__main__":
    run_command(main, Config, opening.resumed)
    leave()
