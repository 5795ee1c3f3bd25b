"""What keeps a run from harm: steps that are not finite or far off, and signals to stop."""

import math
import signal
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lib.scaling import LossScale


@dataclass
class Flags:
    # when a step goes wrong
    max_bad_steps: int = 10             # stop after this many in a row whose loss or gradient is not finite, and after
    #                                     as many rollbacks to one checkpoint
    spike: float = 10.0                 # a loss or gradient norm this many standard deviations above its level
    on_spike: Literal["log", "skip", "rollback"] = "log"  # or no update, or the last checkpoint and on past that data


class Guard:
    """Judges a step by its loss and gradient norm before they do harm: on the device, so that nobody waits for it.

    The level of each is a running mean and variance, over about the last 50 steps. A spike lies more than `spike`
    standard deviations above (from step 100 on); it moves the level only as far as that, so one wild step does not hide
    the next, while a lasting change is followed in time.

    With `scaled`, for arithmetic in fp16, gradients come multiplied by `scale`. A step in which they overflow has no
    update and is not bad, as long as a smaller scale can help.
    """

    SETTLED, MEMORY = 100, 50

    def __init__(self, spike: float, device: torch.device, scaled: bool = False):
        self.spike = spike
        self.loss_scale = LossScale(scaled, device)
        self.scale = self.loss_scale.factor
        self.level = torch.zeros(5, device=device)  # steps judged; means of loss and norm; their variances
        self.passed_over = torch.zeros((), dtype=torch.long)  # steps' worth of data that rolling back has skipped

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        judged = {"level": self.level, "passed_over": self.passed_over}
        return judged | self.loss_scale.state()

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(bad, a spike), each true or false; the level and the scale have then taken notice."""
        count, mean, variance = self.level[0], self.level[1:3], self.level[3:5]
        values = torch.stack((loss, norm))
        sound = values.isfinite().all()
        overflow = loss.isfinite() & (self.scale > 1)
        bad = ~sound & ~overflow
        limit = torch.where(count < self.SETTLED, math.inf, mean + self.spike * variance.sqrt())
        spike = sound & (values > limit).any()
        share = 1 / (count + 1).clamp(max=self.MEMORY)
        change = values.minimum(limit) - mean
        level = torch.cat((count[None] + 1, mean + share * change, (1 - share) * (variance + share * change.square())))
        self.level.copy_(torch.where(sound, level, self.level))
        self.loss_scale.take_notice(norm.isfinite())
        return bad, spike

    def update(self, optimizer: torch.optim.Optimizer, lr: float, excess: Tensor, skip: Tensor):
        """Update with the gradients divided by excess, but not where skip is true or excess not finite; then forget
        them.

        The host does not know yet whether there is an update. A fused optimizer takes both numbers on the device, by
        the protocol made for scaled fp16 gradients: it divides by grad_scale, and does nothing where found_inf is 1.
        """
        skip = skip | ~excess.isfinite()
        for group in optimizer.param_groups:
            group["lr"] = lr
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = excess, skip.float()
            optimizer.step()
        elif not skip:  # here the host has to wait for the answer
            torch._foreach_div_([p.grad for group in optimizer.param_groups for p in group["params"]], excess)
            optimizer.step()
        optimizer.zero_grad()


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
