"""How fast a training step is, how much memory it takes, and how another implementation fares.

    python bench.py                                  # speed and memory of the 15M model
    python bench.py --size 7B --seq_len 4096 --micro_batch 1 --peer hf --out results.json
    python bench.py --size 7B --seq_len 4096 --micro_batch 16 --sweep   # the fastest that fits
    torchrun --standalone --nproc_per_node 8 bench.py ...               # the same on 8 GPUs
    python bench.py --decode --peer hf               # how fast a model writes
    python bench.py --busy 2                         # steps beside 1 and 2 busy processes
    python bench.py --grow --out one.json            # what size and length cost

The step is that of train.py, on random tokens that are already there; a speed is the median of
several rounds. Where two are compared their rounds take turns, each with a model of its own that is
gone before the next one begins: two then need no more memory than one, and what else the machine
does meets both.
"""

from lib.cli import BadInput, run_command  # isort: skip (refuses old Pythons, Windows)

import dataclasses
import functools
import gc
import math
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import train
from data import Batch
from lib import busy, forecast, gpus, growth, planning, train_flags, world, writing
from lib.bench_files import describe, write_results
from lib.bench_flags import SHARED, Flags, check_alone, check_flags
from lib.peak_memory import capacity, peak_memory
from lib.peers import HuggingFace
from lib.rounds import compare, in_turns
from lib.shapes import model_config
from lib.speeds import TITLES, line_of
from lib.timing import matrix_product, timed
from model import SIZES, ModelConfig
from sample import generate


@dataclass(kw_only=True)
class Core:
    """The flags to read first; lib/bench_flags.py has how a step is taken, and how often."""

    # what
    size: str = "15M"                   # a name in model.SIZES
    seq_len: int = 256                  # tokens of a sequence
    micro_batch: int = 16
    """sequences in a forward pass of one process; with --sweep the most to try"""
    accumulate: int = 1                 # micro-batches of one process in an optimizer step
    pack: bool = False
    """rows of documents that do not see each other, beside the same rows unmasked"""
    peer: Literal["none", "hf"] = "none"
    """also transformers' model; each side takes its fastest setting"""
    sweep: bool = False
    """try micro-batches 1, 2, 4, ... and four ways of checkpointing"""
    decode: bool = False
    """not training but writing: batches of 1, 4 and 16, and reading a prompt of 200 tokens"""
    busy: int = 0
    """also beside up to so many busy processes, which this command starts and ends"""
    grow: bool = False
    """four sizes at three lengths, each with --micro_batch × --seq_len tokens at a time"""


@dataclass(kw_only=True)
class Config(Flags, Core):
    """Measure training steps on random tokens, or writing."""


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
        packed = ", packed" if self.pack else ""
        name = f"{self.side} {self.dtype} compile {self.compile}"
        return f"{name}, × {self.micro_batch}, {self.checkpointing}{packed}"

    def train_config(self, config: Config) -> train.Config:
        """The flags of train.py that this setting stands for."""
        shared = {name: getattr(config, name) for name in SHARED}
        compiled = self.side == "plainllama" and self.compile != "off"
        return train.Config(
            **shared,
            dtype=self.dtype,
            compile="on" if compiled else "off",
            micro_batch=self.micro_batch,
            batch_size=self.micro_batch * config.accumulate * dist.get_world_size(),
            checkpointing=self.checkpointing,
            pack=self.pack,
            learning_rate=1e-4,
        )


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
        model, optimizers, config = self.model, self.optimizers, self.config
        lr = config.learning_rate
        return train.train_step(model, optimizers, self.batches, lr, config, self.guard).loss


def hugging_face(
    setting: Setting, config: Config, shape: ModelConfig, device: torch.device
) -> HuggingFace:
    batches = random_batches(setting, config, shape, device)
    return HuggingFace(setting, setting.train_config(config), shape, batches, device)


SIDES = {"plainllama": Ours, "hf": hugging_face, "hf here": hugging_face}


def random_batches(
    setting: Setting, config: Config, shape: ModelConfig, device: torch.device
) -> list[Batch]:
    """This process's micro-batches.

    Packed rows have the same tokens, in documents of random lengths, a quarter of a row on average.
    """
    draw, batches = np.random.default_rng(dist.get_rank()), []
    for _ in range(config.accumulate):
        rows = draw.integers(shape.vocab_size, size=(setting.micro_batch, config.seq_len + 1))
        begins = draw.random((setting.micro_batch, config.seq_len)) < 4 / config.seq_len
        begins[:, 0] = True  # no document goes on in the next row
        bounds = None
        if setting.pack:
            (starts,) = begins.ravel().nonzero()
            bounds = np.append(starts, begins.size)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        batches.append(Batch(tokens, targets, bounds).to(device))
    return batches


# ---- measuring ----


class Bench:
    """Measures settings, and prints and keeps a row for each."""

    def __init__(self, config: Config, shape: ModelConfig, device: torch.device):
        self.config = config
        self.shape = shape
        self.device = device
        self.world = dist.get_world_size()
        self.rows: list[dict] = []

    def say(self, text: str):
        if dist.get_rank() == 0:
            print(text, flush=True)

    def forecast(self, setting: Setting) -> dict[str, int]:
        config = setting.train_config(self.config)
        model = train.empty_model(self.shape, config)
        compiled = setting.compile != "off"
        return forecast.forecast(model, config, self.world, compiled=compiled)

    def measure(self, setting: Setting, rounds: int) -> dict:
        """Train under a setting, from nothing."""
        device, steps = self.device, self.config.steps
        torch.compiler.reset()
        gc.collect()  # the model before, which is full of cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        matrix_product(setting.dtype, device)  # while there is room
        trial = SIDES[setting.side](setting, self.config, self.shape, device)
        losses = []
        first = timed(lambda: losses.append(trial.step()), 1, device)
        for _ in range(self.config.warmup):
            trial.step()
        seconds = [timed(trial.step, steps, device) for _ in range(rounds)]
        parts = self.forecast(setting) if setting.side == "plainllama" else {}
        return {
            "name": str(setting),
            **dataclasses.asdict(setting),
            "seconds": seconds,
            "first_step_seconds": first,
            "first_loss": losses[0].item(),
            "peak_bytes": peak_memory(trial, device),
            "forecast_parts": parts,
            "forecast_bytes": sum(parts.values()) or None,
        }

    def tokens(self, micro_batch: int) -> int:
        """Of all processes in a round."""
        config = self.config
        sequences = micro_batch * config.accumulate * self.world
        return sequences * config.seq_len * config.steps

    def rated(self, row: dict) -> dict:
        """A row with what follows from its seconds."""
        forecast_bytes, tokens = row["forecast_bytes"], self.tokens(row["micro_batch"])
        speed = tokens / median(row["seconds"])
        flops = planning.flops_per_token(self.shape, self.config.seq_len) * speed / self.world
        peak = gpus.gpu_peak(self.device) if row["dtype"] == "bf16" else None
        return row | {
            "tokens_per_round": tokens,
            "tokens_per_s": speed,
            "tokens_per_s_per_device": speed / self.world,
            "mfu": peak and flops / peak,
            "share_of_product": flops / matrix_product(row["dtype"], self.device),
            "peak_over_forecast": forecast_bytes and row["peak_bytes"] / forecast_bytes,
        }

    def report(self, row: dict) -> dict:
        """Print a row and keep it."""
        row = self.rated(row)
        self.say(line_of(row))
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
        sizes = f"{need / 2**30:.1f} GiB forecast, {there / 2**30:.1f} there"
        self.say(f"{str(setting):48} does not fit: {sizes}")
        return None

    def best_of(self, rows: list[dict | None]) -> dict:
        """The fastest of those that fit."""
        if not any(rows):
            raise BadInput(f"--size {self.config.size} with these flags does not fit in memory")
        return max(filter(None, rows), key=lambda row: row["tokens_per_s"])

    def fastest(self, settings: list[Setting]) -> Setting:
        rows = [self.try_out(setting, rounds=1) for setting in settings]
        return settings[rows.index(self.best_of(rows))]

    def contest(self, *settings: Setting) -> list[dict]:
        """Rounds in turn, and the ratios of the first one's speed to the others'.

        A ratio is the median of those round by round.
        """
        actions = [functools.partial(self.measure, setting, 1) for setting in settings]
        measured = in_turns(actions, self.config.repeats)
        self.say(f"{self.config.repeats} rounds in turn:")
        rows = []
        for same in measured:
            seconds = [row["seconds"][0] for row in same]
            rows.append(self.report(same[0] | {"seconds": seconds}))
        contests = [compare(rows[0], row) for row in rows[1:]]
        for contest in contests:
            each = ", ".join(f"{ratio:.3f}" for ratio in contest["ratios"])
            self.say(f"ratio {contest['ratio']:.3f} to {contest['of'][1]} (rounds: {each})")
        return contests

    def sweep(self, base: Setting) -> str:
        """The name of the fastest setting that fits.

        Larger micro-batches are tried while they are not slower.
        """
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


def variants(base: Setting, side: str, config: Config, device: torch.device) -> list[Setting]:
    """What a side of a contest chooses from.

    The arithmetic, where that is left open on a CPU, and what to compile.
    """
    dtypes = [base.dtype]
    if config.dtype == "auto" and device.type == "cpu":
        dtypes = ["bf16", "fp32"]
    ways = ["off"] if config.compile != "on" else []
    if base.compile != "off":
        ways.append("blocks" if side == "plainllama" else "whole")
    base, settings = dataclasses.replace(base, side=side), []
    for dtype in dtypes:
        settings += [dataclasses.replace(base, dtype=dtype, compile=way) for way in ways]
    return settings


def write(bench: Bench) -> dict:
    """--decode. The model has its own window, whatever --seq_len says."""
    shape = SIZES[bench.config.size]
    return writing.measure_writing(bench.config, shape, bench.device, generate, bench.say)


def beside_busy(bench: Bench, base: Setting) -> dict:
    """--busy."""
    trial = Ours(base, bench.config, bench.shape, bench.device)
    trial.step()  # which compiles
    tokens = bench.tokens(base.micro_batch)
    return busy.measure_beside(trial.step, bench.config, tokens, bench.device, bench.say)


def grow(bench: Bench, base: Setting) -> dict:
    """--grow."""

    def measure(config: Config) -> dict:
        setting = dataclasses.replace(base, micro_batch=config.micro_batch)
        shape = dataclasses.replace(SIZES[config.size], max_seq_len=config.seq_len)
        case = Bench(config, shape, bench.device)
        return case.rated(case.measure(setting, config.repeats))

    product = matrix_product(base.dtype, bench.device)
    return growth.measure_growth(measure, bench.config, SIZES, product, bench.say)


def run(config: Config, device: torch.device) -> dict:
    """Measure what was asked for. Returns the contents of --out."""
    check_alone(config, dist.get_world_size())
    bf16 = world.compute_dtype(config.dtype, device) == torch.bfloat16
    compiled = world.should_compile(config.compile, device, math.inf)
    base = Setting(
        side="plainllama",
        dtype="bf16" if bf16 else "fp32",
        compile="blocks" if compiled else "off",
        micro_batch=config.micro_batch,
        checkpointing=config.checkpointing,
        pack=config.pack,
    )
    flags = base.train_config(config)
    train_flags.check_flags(flags, dist.get_world_size())
    shape = model_config(flags, SIZES)
    bench = Bench(config, shape, device)
    results = describe(config, planning.count_parameters(shape), device)
    if config.grow:
        return results | grow(bench, base)
    what = "{settings[size]}, {parameters:,} parameters; {processes} × {device}"
    bench.say(what.format(**results))
    if config.decode:
        return results | write(bench)
    if config.busy:
        return results | beside_busy(bench, base)
    bench.say(TITLES)
    if config.sweep:
        results["fastest"] = bench.sweep(base)
    elif config.pack:
        results["contests"] = bench.contest(base, dataclasses.replace(base, pack=False))
    elif config.peer == "hf":
        alone = dist.get_world_size() == 1
        sides = SIDES if alone else ("plainllama", "hf here")  # alone, "hf" does not shard
        chosen = [bench.fastest(variants(base, side, config, device)) for side in sides]
        results["contests"] = bench.contest(*chosen)
    else:
        bench.report(bench.measure(base, config.repeats))
    used = sorted({row["dtype"] for row in bench.rows})
    results["product_flops"] = {name: matrix_product(name, device) for name in used}
    for name, flops in results["product_flops"].items():
        bench.say(f"a product of large matrices in {name}: {flops / 1e12:.3g} TFLOP/s")
    return results | {"rows": bench.rows}


def main(config: Config):
    check_flags(config, SIZES)
    device = world.join_world()
    try:
        results = run(config, device)
        if config.out and dist.get_rank() == 0:
            write_results(results, config)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, Config)
    world.leave()
