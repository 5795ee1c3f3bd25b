"""Train a LLaMA-2: one loop for one laptop or many GPUs.

    python train.py                                             # the standard library, three minutes on two cores
    python train.py --data data/NAME --size 15M --out out/RUN
    torchrun --nproc_per_node 8 train.py --data data/NAME ...   # the same run on 8 GPUs
    python train.py --resume out/RUN                            # continues it exactly

Every run joins a process group and shards its model over it, also a run of one process. The batch of a step
is a pure function of (dataset, seed, step); processes and micro-batches only divide the work.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from data import TokenDataset, Tokenizer, find_tokenizer, git_commit, read_json, read_meta, run_command
from model import (
    IGNORE,
    SIZES,
    ModelConfig,
    Transformer,
    check_checkpoint,
    checkpoint_folder,
    config_to_hugging_face,
    load,
    readable,
)

HERE = Path(__file__).parent
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # bf16, dense


@dataclass
class Config:
    """Train a LLaMA-2. The defaults suit the laptop size; larger models want a lower learning rate."""

    # where
    data: str = "data/stdlib"           # dataset folder made by data.py
    out: str = "out/stdlib"             # the run's folder: checkpoints, log.jsonl, loss.png
    resume: str = ""                    # folder of a run to continue; its own flags are taken
    init_from: str = ""                 # model to start from: anything that model.load reads
    # what
    size: str = "laptop"                # a name in model.SIZES; the vocabulary is always the dataset's
    dim: int = 0                        # width; 0 here and in the next four takes the number of --size
    num_layers: int = 0                 # blocks
    num_heads: int = 0                  # query heads
    num_kv_heads: int = 0               # key/value heads; with --num_heads given, as many
    ffn_dim: int = 0                    # width of the feed-forward layers
    rope_scale: float = 0.0             # position interpolation; 0 keeps the model's
    seq_len: int = 256                  # tokens of a sequence, and the context window of a new model
    # how long
    steps: int = 1350                   # optimizer steps; the learning rate's schedule ends there
    batch_size: int = 8                 # sequences in an optimizer step, over all processes
    micro_batch: int = 0                # sequences in a forward pass of one process; 0 takes its whole share
    stop_at: int = 0                    # leave after this step with a checkpoint, to be resumed; 0 is never
    # optimizer
    learning_rate: float = 2e-3         # peak
    warmup: float = 0.02                # steps, or below 1 a fraction of --steps
    final_lr: float = 0.1               # fraction of the peak that is left at the last step
    weight_decay: float = 0.1           # of matrices; norms have none
    beta1: float = 0.9                  # of AdamW
    beta2: float = 0.99                 # of AdamW; small batches want it higher than LLaMA's 0.95
    grad_clip: float = 1.0              # largest norm of the gradient of all weights
    seed: int = 0                       # of the first weights and of the order of the data
    # reporting
    log_every: int = 10                 # steps
    eval_every: int = 500               # steps; the last step is always evaluated
    eval_tokens: int = 131_072          # validation tokens, always the same ones
    save_every: int = 500               # steps; the last step is always saved
    keep: int = 2                       # newest checkpoints to keep
    sample: str = "def "                # a text to continue when training ends; "" is none
    wandb: str = ""                     # project name; offline when nobody is logged in
    # machine
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic, weights stay fp32; auto: bf16 if it is faster
    compile: Literal["auto", "on", "off"] = "auto"   # auto: where a compiler is there and the run is long enough


# flags that may differ when a run is continued: but for rounding they do not change what is computed, and of --data
# the run's record knows the contents
FREE = {"resume", "out", "data", "micro_batch", "stop_at", "log_every", "eval_every", "save_every", "keep", "sample"}
FREE |= {"wandb", "compile"}


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up from zero, then a cosine from the peak down to final_lr of it; step counts from 0."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * cosine)


# ---- set-up ----


def join_world() -> torch.device:
    """Join the process group that torchrun describes; without torchrun, a world of one. Returns the device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


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


def model_config(config: Config, vocab_size: int) -> ModelConfig:
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size} is not one of {', '.join(SIZES)}")
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale")
    changes = {name: getattr(config, name) for name in names if getattr(config, name)}
    if "num_heads" in changes:
        changes.setdefault("num_kv_heads", changes["num_heads"])
    return dataclasses.replace(SIZES[config.size], vocab_size=vocab_size, max_seq_len=config.seq_len, **changes)


def first_model(config: Config, meta: dict) -> Transformer:
    """The model before its first step, whole, in fp32; the same on every rank. Raises ValueError for a misfit."""
    if not config.init_from:
        torch.manual_seed(config.seed)
        model = Transformer(model_config(config, meta["vocab_size"]))
        model.init_weights()
        return model
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
        if getattr(config, name):
            raise ValueError(f"--{name} {getattr(config, name)} does not go with --init_from, which brings its shape")
    if config.size != Config.size:
        raise ValueError(f"--size {config.size} does not go with --init_from, which brings its shape")
    model = load(config.init_from)
    theirs = find_tokenizer(config.init_from)
    if theirs and Tokenizer(theirs).sha256 != meta["tokenizer"]["sha256"]:
        hint = f"make it with --tokenizer {theirs}"
        raise ValueError(f"--data {config.data} was made with another tokenizer than {theirs}; {hint}")
    if model.config.vocab_size < meta["vocab_size"]:
        sizes = f"{meta['vocab_size']}, larger than the model's {model.config.vocab_size}"
        raise ValueError(f"--data {config.data} has a vocabulary of {sizes}")
    if config.rope_scale:
        model.config = dataclasses.replace(model.config, rope_scale=config.rope_scale, max_seq_len=config.seq_len)
    if config.seq_len > model.config.max_seq_len:
        raise ValueError(f"--seq_len {config.seq_len} exceeds the model's context window of {model.config.max_seq_len}")
    return model


def shard(model: Transformer, dtype: torch.dtype, compiled: bool) -> Transformer:
    """Compile each block, then spread the model over all ranks' devices: fp32 shards, dtype arithmetic, fp32 sums."""
    # cast_forward_inputs would round the rotary tables to bf16 on their way into a block
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def make_optimizer(model: Transformer, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


# ---- a step ----


def step_batches(data: TokenDataset, config: Config, step: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step: inputs and targets (micro_batch, T); targets are the inputs one later."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.from_numpy(data.windows(data.batch_indices(step, config.batch_size, config.seed, rank, world)))
    size = config.micro_batch or len(rows)
    return [(part[:, :-1].to(device), part[:, 1:].to(device)) for part in rows.split(size)]


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    lr: float,
    grad_clip: float,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over this rank's micro-batches.

    Returns the loss, in nats a target over all ranks and micro-batches, and the norm of its gradient before
    clipping: both are the same on every rank and, but for rounding, for every way to divide the same batch.
    """
    world = dist.get_world_size()
    num_targets = sum((targets != IGNORE).sum() for _, targets in batches)
    dist.all_reduce(num_targets)
    loss = torch.zeros((), device=num_targets.device)
    for i, (tokens, targets) in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # reduce the gradients once, with the last micro-batch
        part = model(tokens, targets, num_targets.clamp(min=1) / world)  # the reduction divides by the world again
        part.backward()
        loss += part.detach() / world
    dist.all_reduce(loss)
    norm = clip_grad_norm_(model.parameters(), grad_clip).full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


@torch.no_grad()
def evaluate(model, val: TokenDataset, config: Config, device: torch.device) -> dict[str, float]:
    """Loss on a fixed set of validation windows, in nats a token and bits a byte; any number of ranks agrees.

    Bits a byte are those of the tokens over the bytes that the whole split has for a token.
    """
    indices = val.spread_indices(config.eval_tokens // config.seq_len)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = config.micro_batch or max(1, config.batch_size // world)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, targets
    for start in range(0, len(indices), size * world):  # every rank makes the same number of passes
        mine = indices[start : start + size * world][rank::world]
        rows = torch.from_numpy(val.windows(mine or indices[:1])).to(device)
        targets = rows[:, 1:] if mine else torch.full_like(rows[:, 1:], IGNORE)
        sums += torch.stack((model(rows[:, :-1], targets, num_targets=1), (targets != IGNORE).sum()))
    dist.all_reduce(sums)
    nats = (sums[0] / sums[1]).item()
    split = val.meta["splits"]["val"]
    return {"val_loss": nats, "val_bits_per_byte": nats / math.log(2) * split["tokens"] / split["bytes"]}


# ---- checkpoints ----


def save(folder: Path, step: int, model, optimizer, keep: int):
    """Every rank writes its shards aside; complete, the folder gets its name, `last` points to it, old ones go."""
    name = f"step_{step:08d}"
    aside = folder / f"{name}.tmp"
    weights, moments = get_state_dict(model, optimizer)
    if dist.get_rank() == 0:
        for old in (aside, folder / name):  # left by a kill, the second one before `last` pointed to it
            _remove(old)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(config_to_hugging_face(model.config), indent=2))
    dist.barrier()
    dcp.save(checkpoint_tensors(model, weights, moments), checkpoint_id=aside)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in aside.iterdir():
            _sync(path)
        os.rename(aside, folder / name)
        _write_whole(folder / "last", name)
        kept = sorted(path.name for path in folder.glob("step_????????") if path.name <= name)[-keep:]
        for old in folder.glob("step_*"):
            if old.name not in kept:
                _remove(old)
    dist.barrier()


def checkpoint_tensors(model: Transformer, weights: dict, moments: dict) -> dict:
    """What a checkpoint holds: tensors alone, a tied matrix once; learning rate and the like come from the config."""
    return {"model": {name: weights[name] for name, _ in model.named_parameters()}, "optimizer": moments["state"]}


def _remove(folder: Path):
    """Delete a checkpoint, which loses its name first, so that a kill leaves no half of it behind."""
    if folder.exists():
        os.rename(folder, nameless := folder.with_suffix(".tmp"))
        shutil.rmtree(nameless)


def _sync(path: Path):
    """Make sure that a file or folder is on the disk and not only in the memory of the system."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _write_whole(path: Path, text: str):
    """Replace a small file so that a reader finds the old text or the new, never a part."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def restore(folder: Path, model, optimizer) -> int:
    """Read weights and moments of the last checkpoint, on any number of ranks; returns its step, 0 without one."""
    if not (folder / "last").exists():
        return 0
    checkpoint = checkpoint_folder(folder)
    found, expected = read_json(checkpoint / "config.json"), config_to_hugging_face(model.config)
    for name in expected:
        if found.get(name) != expected[name]:
            sizes = f"{name} {found.get(name)}, the run's is {expected[name]}"
            raise ValueError(f"{checkpoint} is of another size: {sizes}")
    saved = check_checkpoint(checkpoint)
    weights, moments = get_state_dict(model, optimizer)
    tensors = checkpoint_tensors(model, weights, moments)
    without = [name for name in moments["state"] if f"optimizer.{name}.step" not in saved]  # they never had a gradient
    tensors["optimizer"] = {name: state for name, state in moments["state"].items() if name not in without}
    with readable(checkpoint):
        dcp.load(tensors, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for name in without:
        del optimizer.state[model.get_parameter(name)]
    return int(checkpoint.name.removeprefix("step_"))


# ---- reporting ----


class Report:
    """What a run says of itself, on rank 0: the progress line, log.jsonl, loss.png and, when asked, wandb."""

    def __init__(self, config: Config, folder: Path, start: int, step_flops: float, device: torch.device):
        self.config, self.folder, self.device, self.wandb = config, folder, device, None
        self.quiet = dist.get_rank() != 0
        self.step_tokens = config.batch_size * config.seq_len
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = [flops for gpu, flops in PEAK_FLOPS.items() if gpu in name]
        self.mfu_of_speed = step_flops / self.step_tokens / peaks[0] / dist.get_world_size() if peaks else None
        self.logged, self.clock = start, time.perf_counter()
        if self.quiet:
            return
        log = folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        whole = (line for line in lines if line.endswith("}"))  # a kill may have left half of the last one
        _write_whole(log, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= start))
        if config.wandb:
            self._start_wandb()

    def step(self, done: int, last: int, loss: float, norm: float, lr: float):
        """Log a step; the speed is that of the steps since the last one logged."""
        seconds = (time.perf_counter() - self.clock) / (done - self.logged)
        speed, left = self.step_tokens / seconds, round(seconds * (last - done))
        self.logged, self.clock = done, time.perf_counter()
        self.write(
            step=done,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=done * self.step_tokens,
            tokens_per_s=round(speed),
            mfu=self.mfu_of_speed and speed * self.mfu_of_speed,
            memory=memory(self.device),
        )
        progress = f"step {done}/{self.config.steps}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s"
        self.say(f"{progress}  {left // 60}:{left % 60:02} left", passing=True)

    def validation(self, done: int, scores: dict[str, float]):
        self.write(step=done, **scores)
        nats, bits = scores.values()
        self.say(f"step {done}/{self.config.steps}  validation {nats:.4f} nats a token, {bits:.4f} bits a byte")

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
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(fields) + "\n")
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
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=str(self.folder))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.folder / "loss.png", dpi=120)
        plt.close(figure)

    def close(self):
        if self.wandb:
            self.wandb.finish()


def flops_per_token(model: Transformer, seq_len: int) -> float:
    """6 N + 12 layers · width · T, for a forward and backward pass without recomputation (PaLM, appendix B)."""
    num_params = sum(p.numel() for p in model.parameters())
    return 6 * num_params + 12 * model.config.num_layers * model.config.dim * seq_len


def describe_run(config: Config, model: ModelConfig, meta: dict, device: torch.device) -> dict:
    """run.json: everything needed to know later what was run."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(model),
        "dataset": describe_dataset(meta),
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "processes": dist.get_world_size(),
    }


def describe_dataset(meta: dict) -> dict:
    return {"tokenizer": meta["tokenizer"], "splits": meta["splits"]}


# ---- the run ----


def resumed(first: Config) -> Config:
    """The flags of the run that --resume names, as the defaults of those typed beside it. Raises ValueError."""
    if not first.resume:
        return Config()
    saved = Config(**read_json(Path(first.resume) / "run.json", "config")["config"])
    return dataclasses.replace(saved, resume=first.resume, out=first.resume, stop_at=0)


def choose_run(config: Config) -> dict | None:
    """The record of the run that config continues, None for a new one. Raises ValueError where the two differ."""
    folder = Path(config.out)
    if not (folder / "run.json").exists() and not config.resume:
        if folder.exists() and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise ValueError(f"--out {folder} holds other files; choose another folder")
        return None
    if config.resume and folder != Path(config.resume):
        raise ValueError(f"--out {folder} does not go with --resume {config.resume}, which is the run's folder")
    record = read_json(folder / "run.json", "config", "model", "dataset")
    for name, theirs in record["config"].items():
        mine = getattr(config, name)
        if name not in FREE and mine != theirs and not (name == "dtype" and mine == "auto"):
            flag = "--resume" if config.resume else "--out"
            raise ValueError(f"{flag} {folder} holds a run with --{name} {theirs}, not {mine}; choose another --out")
    return record


def check(config: Config, world: int):
    """Raise ValueError for a flag out of range; the message names the flag, its value and the bound."""
    every = ("log_every", "eval_every", "save_every")
    for name in ("seq_len", "steps", "batch_size", *every, "keep", "learning_rate", "grad_clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name} {getattr(config, name)} must be above 0")
    shape = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale")
    for name in ("micro_batch", "stop_at", "warmup", "weight_decay", *shape):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name} {getattr(config, name)} must be a number that is not negative")
    for name in ("final_lr", "beta1", "beta2"):
        if not 0 <= getattr(config, name) <= (1 if name == "final_lr" else 0.999999):
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


def prepare_default():
    """Make the dataset that a run without flags trains on, by the command that anybody could type."""
    command = [sys.executable, str(HERE / "data.py"), "--source", "stdlib", "--out", Config.data]
    print(f"first the data: python data.py --source stdlib --out {Config.data}", flush=True)
    if subprocess.run(command).returncode:
        raise ValueError(f"--data {Config.data} could not be prepared")


def show_sample(config: Config):
    words = ["sample.py", "--model", config.out, f"--prompt={config.sample}", "--max_new_tokens", "200"]
    print(f"\npython {shlex.join(words)}\n", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sample is drawn by a process of its own
    subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]])


def main(config: Config):
    device = join_world()
    try:
        record = choose_run(config)
        check(config, dist.get_world_size())
        if dist.get_rank() == 0 and config.data == Config.data and not Path(config.data).exists():
            prepare_default()
        dist.barrier()
        train(config, record, device)
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            saved = (Path(config.out) / "last").exists()
            what = f"continues {config.out} from its last checkpoint" if saved else "begins anew: nothing was saved yet"
            print(f"\nstopped; the same command {what}", file=sys.stderr)
        raise
    finally:
        rank = dist.get_rank()
        dist.destroy_process_group()
    if rank == 0 and config.sample and not config.stop_at:
        show_sample(config)


def train(config: Config, record: dict | None, device: torch.device):
    """Take the run in config.out from its last checkpoint, or from nothing, to its end."""
    meta, folder = read_meta(config.data), Path(config.out)
    if record and record["dataset"] != describe_dataset(meta):
        raise ValueError(f"--data {config.data} is another dataset than when {config.out} began")
    data, val = (TokenDataset(config.data, split, config.seq_len) for split in ("train", "val"))

    begun = record and (folder / "last").exists()  # then the weights come from the checkpoint, whatever --init_from was
    model = Transformer(ModelConfig(**record["model"])) if begun else first_model(config, meta)
    num_params = sum(p.numel() for p in model.parameters())
    step_flops = flops_per_token(model, config.seq_len) * config.batch_size * config.seq_len
    dtype = compute_dtype(record["config"]["dtype"] if record else config.dtype, device)
    config = dataclasses.replace(config, dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype])
    model = shard(model, dtype, should_compile(config.compile, device, step_flops * config.steps))
    optimizer = make_optimizer(model, config)
    start = restore(folder, model, optimizer)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not record:
            _write_whole(folder / "run.json", json.dumps(describe_run(config, model.config, meta, device), indent=2))
        Tokenizer(config.data).save(folder)
    dist.barrier()

    report = Report(config, folder, start, step_flops, device)
    world = dist.get_world_size()
    where = f"{config.dtype} arithmetic on {device.type}, {world} process{'es' * (world > 1)}"
    size = f"{config.steps} steps of {config.batch_size} × {config.seq_len} tokens"
    epochs = config.steps * config.batch_size / len(data)
    report.say(f"{num_params:,} parameters, {where}; {size}, {epochs:.2f} epochs of {config.data}")
    last = min(config.stop_at or config.steps, config.steps)
    if start >= last:
        done = "finished; to train again, delete it or choose another --out"
        report.say(f"{folder} is {done if start >= config.steps else f'already at step {start}'}")
        return
    if start:
        report.say(f"continuing {folder} after step {start}")
    for step in range(start, last):
        lr = learning_rate(step, config)
        loss, norm = train_step(model, optimizer, step_batches(data, config, step, device), lr, config.grad_clip)
        done = step + 1
        log_now, save_now = (done % every == 0 or done == last for every in (config.log_every, config.save_every))
        if log_now:
            report.step(done, last, loss.item(), norm.item(), lr)
        if (log_now or save_now) and not math.isfinite(loss + norm):
            bad = f"loss {loss.item()}, gradient norm {norm.item()} at step {done}"
            raise ValueError(f"{bad}; a lower --learning_rate usually helps")
        with report.paused():
            if done % config.eval_every == 0 or done == config.steps:
                report.validation(done, evaluate(model, val, config, device))
            if save_now:
                save(folder, done, model, optimizer, config.keep)
                report.draw()
    report.say(f"{folder}: checkpoint of step {last}, log.jsonl, loss.png")
    report.close()


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
