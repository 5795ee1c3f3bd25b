"""What a run says of itself: the progress line, log.jsonl, loss.png and, when asked, wandb."""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lib import defaults, planning
from lib.errors import BadInput
from lib.files import write_whole
from lib.forecast import forecast
from lib.gpus import gpu_peak
from lib.run_report import write_report
from lib.runs import append_row, read_log
from lib.world import memory


@dataclass
class Flags:
    # reporting
    eval_every: int | str = 500         # steps, or `0.5epoch`; the last step is always evaluated
    eval_tokens: int = 131_072          # validation tokens, always the same ones
    log_every: int = 10                 # steps
    wandb: str = ""                     # project name; offline when nobody is logged in
    draw: tuple[str, ...] = ()
    """only draw the losses of these runs into one picture, losses.png in the first one's folder"""


class Report:
    """What a run says of itself, on rank 0: the progress line, log.jsonl, loss.png and, when asked, wandb."""

    def __init__(self, config, shape, data, objective, guard, start: int, device: torch.device):
        """shape is the model's ModelConfig, data the Mixture that is trained on."""
        self.config, self.shape, self.data = config, shape, data
        self.objective, self.guard, self.device = objective, guard, device
        self.folder, self.wandb, self.pending = Path(config.out), None, []
        self.validated = {}  # the loss at the last step that was
        self.drawn = time.monotonic()
        self.quiet = dist.get_rank() != 0
        self.unit, self.in_step = objective.unit, config.batch_size
        self.mfu_of_speed = None
        if self.unit == "tokens":  # pairs have different lengths
            self.in_step *= config.seq_len
            if peak := gpu_peak(device):
                flops = planning.flops_of_a_step(shape, config)
                self.mfu_of_speed = flops / self.in_step / peak / dist.get_world_size()
        self.begin(start)
        if config.wandb and not self.quiet:
            self._start_wandb()

    def begin(self, start: int):
        """What was logged after step start is forgotten: it will be done again, or differently."""
        self.logged, self.clock, self.bad_in_a_row = start, time.perf_counter(), 0
        self.pending.clear()
        if self.quiet:
            return
        log = self.folder / "log.jsonl"
        try:
            rows = [row for row in read_log(log) if row["step"] <= start]
            write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:  # as when a line is written
            print(f"log.jsonl: what follows step {start} is still there ({error.strerror})", file=sys.stderr)

    def introduce(self, model: nn.Module):
        """The first words of a run: what, where, how much, and what it will need, a forecast."""
        config, world = self.config, dist.get_world_size()
        processes = f"{world} processes" if world > 1 else "1 process"
        where = f"{config.dtype} arithmetic on {self.device.type}, {processes}"
        if config.compile == "on":
            where += ", compiled"
        each = "pairs" if self.unit == "pairs" else f"× {config.seq_len} tokens"
        size = f"{config.steps} steps of {config.batch_size} {each}, saved every {config.save_every}"
        epochs = self.data.epochs(config.steps * config.batch_size)
        read = ", ".join(f"{count:.2f} epochs of {folder}" for folder, count in epochs.items())
        kind = defaults.described(config, self.data.kind)
        parameters = f"{planning.count_parameters(self.shape):,} parameters"
        self.say(f"{kind}; {parameters}, {where}; {size}, {read}")
        needs = forecast(model, config, world, config.compile == "on", self.unit == "pairs")
        self.say(planning.describe(needs))

    def finished(self, step: int):
        """A run that has nothing more to do."""
        done = f"already at step {step}"
        if step >= self.config.steps:
            done = "finished; to train again, delete it or choose another --out"
        self.say(f"{self.config.out} is {done}")

    def take(self, step: int, lr: float, outcome):
        """Keep a step's outcome, which is on the device, until `read`."""
        self.pending.append((step, lr, outcome))

    def read(self, last: int, log_now: bool) -> int | None:
        """Read the outcomes since the last reading, on every rank: log the last, and each that went wrong.

        Returns the first step that was a spike, None without one. Raises ValueError after --max_bad_steps in a row.
        """
        spike = None
        for step, _, outcome in self.pending:
            bad = bool(outcome.bad)
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            if bad or outcome.spike:
                self._went_wrong(step, outcome)
                spike = step if spike is None and not bad else spike
            elif not outcome.norm.isfinite():
                self._overflowed(step, outcome.loss.item())
            if self.bad_in_a_row >= self.config.max_bad_steps:
                what = f"{self.bad_in_a_row} steps in a row up to {step} without a finite loss and gradient"
                raise BadInput(f"{what}; a lower --learning_rate usually helps, or a look at the data named above")
        if log_now:
            step, lr, outcome = self.pending[-1]
            self._step(step, last, lr, outcome)
        self.pending.clear()
        return spike

    def _went_wrong(self, step: int, outcome):
        """Log a bad step or a spike with the data it read: of the micro-batches to blame, where these are known."""
        kind = "bad step" if outcome.bad else "spike"
        skipped = bool(outcome.bad) or self.config.on_spike == "skip"
        loss, norm = outcome.loss.item(), outcome.norm.item()
        blamed = ~outcome.losses.cpu().isfinite()
        blamed = blamed if blamed.any() else torch.ones_like(blamed)
        numbers = self.data.numbers(step - 1 + int(self.guard.passed_over), self.config.batch_size)
        each = len(numbers) // blamed.numel()
        places = []
        for i in blamed.flatten().nonzero().squeeze(1).tolist():
            for number in numbers[i * each : (i + 1) * each]:
                places.append(self.data.place(number, self.config.seed))
        self.write(step=step, event=kind, skipped=skipped, loss=loss, grad_norm=norm, data=places)
        more = f" and {len(places) - 1} more places" if len(places) > 1 else ""
        update = "no update" if skipped else "update made"
        self.say(f"step {step}: {kind}, loss {loss:.4g}, gradient norm {norm:.4g}, {update}; {places[0]}{more}")

    def _overflowed(self, step: int, loss: float):
        """Log a step whose gradient, of the scaled loss, was too large for fp16."""
        scale = self.guard.scale.item()
        self.write(step=step, event="overflow", loss=loss, loss_scale=scale)
        self.say(f"step {step}: the gradient overflows fp16, no update; "
                 f"the scale of the loss is now {scale:,.0f}")

    def _step(self, done: int, last: int, lr: float, outcome):
        """Log a step; speed and mean loss are of the steps since the last one logged."""
        seconds = (time.perf_counter() - self.clock) / (done - self.logged)
        speed, left = self.in_step / seconds, round(seconds * (last - done))
        self.logged, self.clock = done, time.perf_counter()
        loss, (_, targets, without) = outcome.loss.item(), outcome.counts.tolist()
        scores = self.objective.scores(outcome.means.tolist())
        losses = []
        for _, _, taken in self.pending:
            if not taken.bad:
                losses.append(taken.loss)
        mean = torch.stack(losses).mean().item() if losses else None
        amounts = {self.unit: done * self.in_step}
        amounts[f"{self.unit}_per_s"] = round(speed, 0 if speed > 100 else 2)
        self.write(
            **scores | dict(step=done, loss=loss, mean_loss=mean),
            lr=lr,
            grad_norm=outcome.norm.item(),
            **amounts,
            targets=targets,
            sequences_without_target=without,
            epochs=self.data.epochs(done * self.config.batch_size),
            mfu=self.mfu_of_speed and speed * self.mfu_of_speed,
            memory=memory(self.device),
            **self.guard.loss_scale.told(),
        )
        minutes, seconds = divmod(left, 60)
        progress = f"step {done}/{self.config.steps}  loss {loss:.4f}  lr {lr:.2e}"
        speed = f"{speed:,.0f} {self.unit}/s  {minutes}:{seconds:02} left"
        self.say(f"{progress}  {speed}", passing=True)

    def validation(self, done: int, scores: dict[str, float]):
        self.validated = {done: scores["val_loss"]}
        self.write(step=done, **scores)
        more = self.objective.in_words(scores)
        words = f"validation {scores['val_loss']:.4f} nats a {self.unit[:-1]}, {more}"
        self.say(f"step {done}/{self.config.steps}  {words}")

    def sample(self, done: int, text: str):
        """What the model writes by now; at the end of a run of text sample.py prints another one."""
        self.write(step=done, sample=text)
        every = self.config.sample_every
        if self.data.kind != "text" or every and done % every == 0:
            self.say(f"step {done}/{self.config.steps}  sample\n{text}")

    def rolled_back(self, step: int, spike: int):
        """The run is at this step again, because of a spike at a later one."""
        self.begin(step)
        passed_over = int(self.guard.passed_over)
        self.write(step=step, event="rollback", spike=spike, passed_over=passed_over)
        self.say(f"back to step {step}, and on past the data of {spike - step} steps")

    def stopped(self, step: int, by: str):
        self.say(f"{by}: stopped after step {step}; the same command continues {self.config.out}")

    @contextlib.contextmanager
    def paused(self):
        """Evaluating and saving do not count in the speed."""
        started, clock = time.perf_counter(), self.clock
        yield
        if self.clock == clock:  # rolling back sets it anew
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

    def draw(self, ends: bool):
        """loss.png and report.md, from log.jsonl and run.json; twice a minute at most until the run ends."""
        if not self.quiet and (ends or time.monotonic() > self.drawn + 30):
            self.drawn = time.monotonic()
            # a full disk or a damaged run.json costs the picture, not the run
            with contextlib.suppress(OSError, BadInput):
                write_report(self.folder)

    def close(self):
        if self.wandb:
            self.wandb.finish()
