"""How fast a training step is, how much memory it takes, and how another implementation fares beside it.

    python bench.py                                                       # speed and memory of the 15M model
    python bench.py --size 7B --seq_len 4096 --micro_batch 1 --peer hf --out results.json
    python bench.py --size 7B --seq_len 4096 --micro_batch 16 --sweep     # the fastest setting that fits
    torchrun --nproc_per_node 8 bench.py ...                              # the same on 8 GPUs

The step is that of train.py, on random tokens that are already there; a speed is the median of several rounds. Where
two are compared their rounds take turns, each with a model of its own that is gone before the next one begins: two
then need no more memory than one, and what else the machine does meets both.
"""

from lib.cli import git_commit, run_command  # isort: skip (lib refuses old Pythons, Windows)

import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

import train
from data import Batch
from lib import forecast, gpus, planning, train_flags, world
from lib.configs import config_to_hugging_face
from lib.results import check_out, write_all
from lib.rows import local_rows
from lib.shapes import model_config
from model import SIZES, ModelConfig


@dataclass
class Config:
    """Measure training steps on random tokens."""

    # what
    size: str = "15M"                   # a name in model.SIZES
    seq_len: int = 256                  # tokens of a sequence
    micro_batch: int = 16               # sequences in a forward pass of one process; with --sweep the most to try
    accumulate: int = 1                 # micro-batches of one process in an optimizer step
    pack: bool = False                  # rows of documents that do not see each other, beside the same rows unmasked
    peer: Literal["none", "hf"] = "none"  # also train transformers' model; each side takes its fastest setting
    sweep: bool = False                 # try micro-batches 1, 2, 4, ... and four ways of checkpointing
    # how, as in train.py
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic; auto: bf16 if it is faster
    compile: Literal["auto", "on", "off"] = "auto"   # auto: where a compiler is there; with --peer also without
    optimizer: Literal["adamw", "muon"] = "adamw"    # muon takes the blocks' matrices, AdamW keeps the rest
    checkpointing: str = "none"         # none, selective, full, or 2 for every second block, 3 for every third, ...
    shard_over: int = 0                 # neighbouring processes that share one copy of the model; 0 is all of them
    reshard_after_forward: bool = True  # give gathered weights back until the backward pass
    reduce_each: bool = False           # reduce gradients with every micro-batch, not with the last
    # measuring
    steps: int = 10                     # timed in a round
    warmup: int = 3                     # steps that are not timed; the very first one, which compiles, is extra
    repeats: int = 3                    # rounds, of which the median counts
    out: str = ""                       # JSON file for the results, with a picture beside it; "" only prints them


@dataclass(frozen=True)
class Setting:
    """One way to train, to be measured."""

    side: Literal["plainllama", "hf", "hf here"]  # "hf here" is sharded as plainllama is
    dtype: Literal["bf16", "fp32"]
    compile: Literal["off", "blocks", "whole"]  # what torch.compile is given
    micro_batch: int
    checkpointing: str
    pack: bool

    def __str__(self) -> str:
        name = f"{self.side} {self.dtype} compile {self.compile}, × {self.micro_batch}, {self.checkpointing}"
        return name + ", packed" * self.pack

    def train_config(self, config: Config) -> train.Config:
        """The flags of train.py that this setting stands for."""
        same = "optimizer shard_over reshard_after_forward reduce_each size seq_len steps".split()
        values = dataclasses.asdict(self) | {name: getattr(config, name) for name in same}
        values["compile"] = "off" if values.pop("side") != "plainllama" or self.compile == "off" else "on"
        values["batch_size"] = self.micro_batch * config.accumulate * dist.get_world_size()
        return train.Config(**values, learning_rate=1e-4)


# ---- the sides ----


class Ours:
    """A model, and the step that train.py takes with it."""

    def __init__(self, setting: Setting, config: Config, shape: ModelConfig, device: torch.device):
        world.keep_freed_memory(True)
        self.config = setting.train_config(config)
        self.model = train.build(shape, self.config, device)
        self.model.init_weights(self.config.seed)
        self.optimizers = train.make_optimizers(self.model, self.config)
        self.guard = train.Guard(self.config.spike, device)
        self.batches = random_batches(setting, config, shape, device)

    def step(self) -> torch.Tensor:
        lr = self.config.learning_rate
        return train.train_step(self.model, self.optimizers, self.batches, lr, self.config, self.guard).loss


class HuggingFace:
    """LlamaForCausalLM of the same shape, trained the same way as far as that goes.

    As its own Trainer does it: fp32 weights, bf16 by autocast, an ordinary process. Or "hf here": with the sharding,
    mixed precision and memory allocator that train.py gives a model. Its loss takes the tokens themselves as targets,
    one fewer in a row than train.py has.
    """

    def __init__(self, setting: Setting, config: Config, shape: ModelConfig, device: torch.device):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config, self.batches = setting.train_config(config), random_batches(setting, config, shape, device)
        theirs = LlamaConfig(**config_to_hugging_face(shape), attn_implementation="sdpa")
        self.here, dtype = setting.side == "hf here", world.compute_dtype(setting.dtype, device)
        world.keep_freed_memory(self.here)
        with torch.device("meta" if self.here else device):
            self.model = model = LlamaForCausalLM(theirs)
        if setting.checkpointing == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.here:
            self._shard(shape, theirs, config, dtype, device)
        if setting.compile == "whole":
            model.compile()
        same = {"lr": self.config.learning_rate, "betas": (self.config.beta1, self.config.beta2)}
        same["weight_decay"] = self.config.weight_decay
        self.optimizers = [torch.optim.AdamW(model.parameters(), fused=True, **same)]
        self.autocast = torch.autocast(device.type, dtype, enabled=not self.here and dtype != torch.float32)

    def _shard(self, shape: ModelConfig, theirs, config: Config, dtype: torch.dtype, device: torch.device):
        model = self.model
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        unit = functools.partial(fully_shard, mp_policy=policy, mesh=world.make_mesh(self.config.shard_over, device))
        for layer in model.model.layers:
            unit(layer, reshard_after_forward=config.reshard_after_forward)
        unit(model).to_empty(device=device)
        if shape.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.rotary_emb = type(model.model.rotary_emb)(theirs).to(device)  # its wavelengths were not kept
        for p in model.parameters():
            weights = local_rows(p)[1]
            weights.fill_(1) if p.dim() == 1 else weights.normal_(0, 0.02)

    def step(self) -> torch.Tensor:
        losses = []
        for i, (tokens, *_) in enumerate(self.batches, 1):
            if self.here:
                self.model.set_requires_gradient_sync(self.config.reduce_each or i == len(self.batches))
            with self.autocast:
                loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(self.batches)
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return sum(losses)


SIDES = {"plainllama": Ours, "hf": HuggingFace, "hf here": HuggingFace}


def random_batches(setting: Setting, config: Config, shape: ModelConfig, device: torch.device):
    """This process's micro-batches, each a train.Batch. Packed rows have the same tokens, in documents of random
    lengths, a quarter of a row on average."""
    draw, batches = np.random.default_rng(dist.get_rank()), []
    for _ in range(config.accumulate):
        rows = draw.integers(shape.vocab_size, size=(setting.micro_batch, config.seq_len + 1))
        begins = draw.random((setting.micro_batch, config.seq_len)) < 4 / config.seq_len
        begins[:, 0] = True  # no document goes on in the next row
        bounds = np.append(begins.ravel().nonzero()[0], begins.size) if setting.pack else None
        batches.append(Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), bounds).to(device))
    return batches


# ---- measuring ----


def timed(action: Callable, times: int, device: torch.device) -> float:
    """Seconds that so many times take, the same answer in every process; Python's garbage collector waits meanwhile."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    dist.barrier()
    gc.disable()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        action()
    wait()
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    gc.enable()
    dist.broadcast(seconds, src=0)
    return seconds.item()


@functools.cache
def matrix_product(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large square matrix product: what this machine reaches today."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(world.compute_dtype(dtype, device)) for _ in range(2))
    return 2 * n**3 / median([timed(lambda: a @ b, 1, device) for _ in range(7)])


def peak_memory(trial: Ours | HuggingFace, device: torch.device) -> int:
    """Most bytes that tensors hold during one more step.

    On a CPU: weights and moments, which are there before, and on top what the allocator gives out and takes back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trial.step()
        return torch.cuda.max_memory_allocated(device)
    before = [*trial.model.parameters()]
    before += [t for optimizer in trial.optimizers for state in optimizer.state.values() for t in state.values()]
    with no_stderr(), torch.profiler.profile(profile_memory=True) as recorded:
        trial.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(world.local(t).nbytes for t in before) + int(np.cumsum(changes).max())


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
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


TITLES = f"{'':48}   tokens/s   a device     MFU a product       GiB of forecast first step s"


class Bench:
    """Measures settings, and prints and keeps a row for each."""

    def __init__(self, config: Config, shape: ModelConfig, device: torch.device):
        self.config, self.shape, self.device, self.world = config, shape, device, dist.get_world_size()
        self.rows: list[dict] = []

    def say(self, text: str):
        if dist.get_rank() == 0:
            print(text, flush=True)

    def forecast(self, setting: Setting) -> dict[str, int]:
        config = setting.train_config(self.config)
        model = train.empty_model(self.shape, config)
        return forecast.forecast(model, config, self.world, compiled=setting.compile != "off")

    def measure(self, setting: Setting, rounds: int) -> dict:
        """Train under a setting, from nothing."""
        torch.compiler.reset()
        gc.collect()  # the model before, which is full of cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        matrix_product(setting.dtype, self.device)  # while there is room
        trial, losses = SIDES[setting.side](setting, self.config, self.shape, self.device), []
        first = timed(lambda: losses.append(trial.step()), 1, self.device)
        for _ in range(self.config.warmup):
            trial.step()
        seconds = [timed(trial.step, self.config.steps, self.device) for _ in range(rounds)]
        parts = self.forecast(setting) if setting.side == "plainllama" else {}
        row = {"name": str(setting), **dataclasses.asdict(setting), "seconds": seconds, "first_step_seconds": first}
        row |= {"first_loss": losses[0].item(), "peak_bytes": peak_memory(trial, self.device), "forecast_parts": parts}
        return row | {"forecast_bytes": sum(parts.values()) or None}

    def report(self, row: dict) -> dict:
        """Add to a row what follows from its seconds."""
        config = self.config
        tokens = row["micro_batch"] * config.accumulate * self.world * config.seq_len * config.steps
        speed = tokens / median(row["seconds"])
        flops = planning.flops_per_token(self.shape, config.seq_len) * speed / self.world
        peak = gpus.gpu_peak(self.device) if row["dtype"] == "bf16" else None
        row |= {"tokens_per_round": tokens, "tokens_per_s": speed, "tokens_per_s_per_device": speed / self.world}
        row |= {"mfu": peak and flops / peak, "share_of_product": flops / matrix_product(row["dtype"], self.device)}
        row["peak_over_forecast"] = row["forecast_bytes"] and row["peak_bytes"] / row["forecast_bytes"]
        shares = (row["mfu"], row["share_of_product"], row["peak_over_forecast"])
        mfu, share, ratio = ("-" if value is None else f"{value:.1%}" for value in shares)
        speeds = f"{speed:10,.0f} {speed / self.world:10,.0f} {mfu:>7} {share:>9}"
        memory = f"{row['peak_bytes'] / 2**30:9.3f} {ratio:>11}"
        self.say(f"{row['name']:48} {speeds} {memory} {row['first_step_seconds']:12.1f}")
        self.rows.append(row)
        return row

    def try_out(self, setting: Setting, rounds: int) -> dict | None:
        """A row; None, with a word about it, where the setting does not fit in memory."""
        need, there = sum(self.forecast(setting).values()), capacity(self.device)
        if setting.side != "plainllama" or need <= there:
            try:
                return self.report(self.measure(setting, rounds))
            except torch.OutOfMemoryError:
                pass
        self.say(f"{str(setting):48} does not fit: {need / 2**30:.1f} GiB forecast, {there / 2**30:.1f} there")
        return None

    def best_of(self, rows: list[dict | None]) -> dict:
        if not any(rows):
            raise ValueError(f"--size {self.config.size} with these flags does not fit in memory")
        return max(filter(None, rows), key=lambda row: row["tokens_per_s"])

    def fastest(self, settings: list[Setting]) -> Setting:
        rows = [self.try_out(setting, rounds=1) for setting in settings]
        return settings[rows.index(self.best_of(rows))]

    def contest(self, *settings: Setting) -> list[dict]:
        """Rounds in turn, and the ratios of the first one's speed to the others': medians of those round by round."""
        rounds = [[self.measure(setting, rounds=1) for setting in settings] for _ in range(self.config.repeats)]
        self.say(f"{self.config.repeats} rounds in turn:")
        rows = [self.report(same[0] | {"seconds": [row["seconds"][0] for row in same]}) for same in zip(*rounds)]
        contests = []
        for row in rows[1:]:
            ratios = [theirs / ours for ours, theirs in zip(rows[0]["seconds"], row["seconds"])]
            each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            self.say(f"ratio {median(ratios):.3f} to {row['name']} (rounds: {each})")
            contests.append({"of": [rows[0]["name"], row["name"]], "ratio": median(ratios), "ratios": ratios})
        return contests

    def sweep(self, base: Setting) -> str:
        """The name of the fastest setting that fits, larger micro-batches being tried while they are not slower."""
        for mode in ("none", "selective", "2", "full"):
            speed, size = 0.0, 1
            while size <= self.config.micro_batch:
                setting = dataclasses.replace(base, checkpointing=mode, micro_batch=size)
                row = self.try_out(setting, self.config.repeats)
                if row is None or row["tokens_per_s"] < 0.97 * speed:
                    break
                speed, size = row["tokens_per_s"], 2 * size
        name = self.best_of(self.rows)["name"]
        self.say(f"fastest: {name}")
        return name


# ---- the run ----


def check(config: Config):
    """Raise ValueError for a flag that is out of range or does not go with another."""
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size} is not one of {', '.join(SIZES)}")
    for name in ("seq_len", "micro_batch", "accumulate", "steps", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least 1")
    if config.warmup < 0:
        raise ValueError(f"--warmup {config.warmup} must not be negative")
    if config.out and not config.out.endswith(".json"):
        raise ValueError(f"--out {config.out} must end in .json; the picture goes beside it, in .png")
    if config.out:
        check_out(Path(config.out), png=None)
    if config.sweep + config.pack + (config.peer != "none") > 1:
        raise ValueError("only one of --sweep, --pack and --peer can be given")
    if config.peer == "hf":
        if config.checkpointing not in ("none", "full") or config.optimizer != "adamw":
            given = f"--checkpointing {config.checkpointing} --optimizer {config.optimizer}"
            raise ValueError(f"{given} does not go with --peer hf, which knows none or full, and adamw")
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("--peer hf needs the package transformers, which is not installed")


def variants(base: Setting, side: str, config: Config, device: torch.device) -> list[Setting]:
    """What a side of a contest chooses from: the arithmetic where that is left open on a CPU, and what to compile."""
    dtypes = ["bf16", "fp32"] if config.dtype == "auto" and device.type == "cpu" else [base.dtype]
    ways = ["off"] if config.compile != "on" else []
    if base.compile != "off":
        ways += ["blocks"] if side == "plainllama" else ["whole"]
    return [dataclasses.replace(base, side=side, dtype=dtype, compile=way) for dtype in dtypes for way in ways]


def run(config: Config, device: torch.device) -> dict:
    """Measure what was asked for. Returns the contents of --out."""
    dtype = "bf16" if world.compute_dtype(config.dtype, device) == torch.bfloat16 else "fp32"
    way = "blocks" if world.should_compile(config.compile, device, math.inf) else "off"
    base = Setting("plainllama", dtype, way, config.micro_batch, config.checkpointing, config.pack)
    train_flags.check_flags(base.train_config(config), dist.get_world_size())
    shape = model_config(base.train_config(config), SIZES)
    bench, results = Bench(config, shape, device), describe(config, shape, device)
    bench.say(f"{config.size}, {results['parameters']:,} parameters; {results['processes']} × {results['device']}")
    bench.say(TITLES)
    if config.sweep:
        results["fastest"] = bench.sweep(base)
    elif config.pack:
        results["contests"] = bench.contest(base, dataclasses.replace(base, pack=False))
    elif config.peer == "hf":
        sides = SIDES if dist.get_world_size() == 1 else ("plainllama", "hf here")  # alone it does not shard
        results["contests"] = bench.contest(*(bench.fastest(variants(base, side, config, device)) for side in sides))
    else:
        bench.report(bench.measure(base, config.repeats))
    used = sorted({row["dtype"] for row in bench.rows})
    results["product_flops"] = {name: matrix_product(name, device) for name in used}
    for name, flops in results["product_flops"].items():
        bench.say(f"a product of large matrices in {name}: {flops / 1e12:.3g} TFLOP/s")
    return results | {"rows": bench.rows}


def describe(config: Config, shape: ModelConfig, device: torch.device) -> dict:
    packages = ["torch", "transformers"] if config.peer == "hf" else ["torch"]
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "device": world.device_name(device),
        "processes": dist.get_world_size(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "git_commit": git_commit(),
        "command": " ".join(sys.argv),
        "settings": dataclasses.asdict(config),
        "parameters": planning.count_parameters(shape),
    }


def draw(results: dict, picture: io.BytesIO):
    """A bar for every row: its tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, speeds = zip(*((row["name"], row["tokens_per_s"]) for row in reversed(results["rows"])))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.35 * len(names)), layout="constrained")
    axes.bar_label(axes.barh(range(len(names)), speeds), fmt="{:,.0f}", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tokens a second", title=f"{results['settings']['size']} on {results['device']}")
    axes.margins(x=0.12)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(config: Config):
    check(config)
    device = world.join_world()
    try:
        results = run(config, device)
        if config.out and dist.get_rank() == 0:
            out = Path(config.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            draw(results, picture := io.BytesIO())
            text = json.dumps(results, indent=2)
            write_all({out: text, out.with_suffix(".png"): picture.getvalue()})
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, Config)
    world.leave()
