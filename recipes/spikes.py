"""Loss spikes: which heal by themselves, and what do skipping and going back bring?

Paper       K2-65B, LLM360 2025, arXiv:2501.07124; the going back is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311).
Command     python recipes/spikes.py
Hardware    one core, no GPU; 15 minutes of the clock (2026-11-27, AMD EPYC), beside other work.
Claim       Of the spikes in a long training most are benign and pass by themselves; malignant ones stay, and its makers
            went back to a checkpoint for them. (In kind, from its model cards; no figure of the paper is tested here.)
Miniature   A small model with planted faults (recipes/faults.py), each under --on_spike log, skip and rollback, beside
            a twin of the same seed without a fault; three seeds. What is trained and measured: ABOUT.
Predicted   before the run: one batch heals, to less than 0.01 above the twin; thirty leave more than that, and skipping
            helps; against the rate skipping does not help, as the harm is done before a loss shows it, and going back
            does; the guard's 10 standard deviations raise no false alarm on the twins.
Result      bits a byte. One batch leaves 0.004 (+0.0036 to +0.0044), less than 0.01 by 0.006 in the mean of seeds
            (-0.0064 to -0.0056; by seed -0.007, -0.004, -0.006): confirmed. Thirty leave 0.085 (+0.080 to +0.090; more
            than 0.01 with every seed): confirmed. The guard of 10 saw none of them, as shuffled text costs this young
            model little more than text, so skipping brought nothing (0.000), and of the rates it saw one seed's: there
            going back won 0.031, 0.010 in the mean (not decided), skipping 0.002 (not decided). It raised one false
            alarm on the twins: refuted. Asked after that, a guard of 3 (7 false alarms in 720 steps): going back
            undoes thirty batches whole (0.088 won, +0.082 to +0.094; +0.085, +0.090, +0.089) and the rate (0.023,
            +0.020 to +0.027), skipping the rate by half (0.011, +0.008 to +0.013) and the batches not at all, as it
            saw 2 to 5 of thirty.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import AT, FAULTS, STEPS, trained
from study import Report, difference, text

from data import Dataset
from lib.bits import BIT
from lib.cli import run_command
from lib.guard import Guard
from lib.runs import read_log
from model import load

POLICIES = ("log", "skip", "rollback")
LOWER = [(fault, policy, 3) for fault in ("30 batches", "rate x 10") for policy in ("skip", "rollback")]
NEAR = 0.01                  # bits a byte within which a run is back at its twin's
ABOUT = """Which loss spikes heal by themselves, and what do skipping and going back bring (K2-65B, arXiv:2501.07124)? A
LLaMA-2 model of two layers, 64 wide, is trained for {steps} steps of 1,024 tokens on Python's standard library, {seeds}
seeds. After step {at} comes a *fault*: *1 batch* or *30 batches* of shuffled tokens, or ten steps at ten times the
learning rate (*rate x 10*). Its *twin* is the same run without. A *guard* of so many standard deviations calls a step a
*spike* whose loss or gradient norm lies so far above its running mean. *Policies*: *log* only notes that, *skip* leaves
the update out, *rollback* returns to the last checkpoint (one every 50 steps) and goes on past that data. By seed:
*back after* so many steps from the fault validation stays within {near} bits a byte of the twin's, or never; *spikes*
seen; updates *skipped*; *returns*; steps *undone* by these, which are trained again. *At the end*: bits a byte of
{windows} windows of validation above the twin's; lower is better."""


@dataclass
class Config:
    """Planted faults against three policies, with a report."""

    seeds: int = 3
    windows: int = 96  # of validation, that the last models are compared on


@torch.no_grad()
def bits_of_windows(run: Path, count: int) -> np.ndarray:
    """Bits a byte of so many validation windows (count,), by the model that a run ended with."""
    model, data = load(run), Dataset(text(), "val", 128)
    batch = data.batch(data.spread_indices(count)).to(torch.device("cpu"))
    nats = -model.log_probs(batch.tokens, batch.targets).mean(1)
    return nats.numpy() / BIT / data.bytes_per_target


def curve(rows: list[dict]) -> dict[int, float]:
    """Bits a byte of validation by step, of a log's rows; where a step was done twice, the second time."""
    return {row["step"]: row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row}


def steps_until_back(faulty: dict[int, float], twin: dict[int, float]) -> int | None:
    """From the fault on to the first validation from which on a run stays near its twin; None: it never does.

    >>> steps_until_back({110: 2.0, 120: 3.0, 130: 2.0, 140: 2.1, 150: 1.9}, {110: 2, 120: 2, 130: 2, 140: 2, 150: 1.9})
    40
    """
    back = None
    for step in sorted(step for step in twin if step > AT):
        near = faulty[step] <= twin[step] + NEAR
        back = (back or step) if near else None
    return back and back - AT


def costs(rows: list[dict]) -> dict[str, int]:
    """What the policy did: spikes seen, updates left out, returns to a checkpoint, and steps whose work they undid."""
    spikes = [row for row in rows if row.get("event") == "spike"]
    returns = [row for row in rows if row.get("event") == "rollback"]
    undone = sum(row["spike"] - row["step"] for row in returns)
    skipped, seen = sum(row["skipped"] for row in spikes), len(spikes) + len(returns)  # a return forgets its spike
    return dict(spikes=seen, skipped=skipped, returns=len(returns), undone=undone)


def alarms(rows: list[dict], threshold: float) -> int:
    """How many steps of a log a guard of another threshold calls spikes."""
    guard = Guard(threshold, torch.device("cpu"))
    judged = [guard.judge(torch.tensor(row["loss"]), torch.tensor(row["grad_norm"])) for row in rows if "lr" in row]
    return sum(bool(spike) for _, spike in judged)


def measure(report: Report, config: Config):
    names = [("", "log", 10), *((fault, policy, 10) for fault in FAULTS for policy in POLICIES), *LOWER]
    runs = {(*name, seed): trained(seed, *name) for seed in range(config.seeds) for name in names}
    logs = {key: read_log(run / "log.jsonl") for key, run in runs.items()}
    last = {name: [bits_of_windows(runs[*name, s], config.windows) for s in range(config.seeds)] for name in names}
    twin, rows = last[names[0]], []
    for name in names[1:]:
        each = range(config.seeds)
        found = [costs(logs[*name, s]) for s in each]
        back = [steps_until_back(curve(logs[*name, s]), curve(logs[*names[0], s])) for s in each]
        sums = [" ".join(str(cost[what]) for cost in found) for what in ("spikes", "skipped", "returns", "undone")]
        shown = " ".join("never" if steps is None else str(steps) for steps in back)
        rows.append([*name, shown, *sums, difference(twin, last[name])])
    report.about(ABOUT.format(steps=STEPS, at=AT, near=NEAR, **vars(config)))
    head = ["fault", "policy", "guard", "back after", "spikes", "skipped", "returns", "undone", "at the end"]
    report.table(head, rows)
    for threshold in (3, 5, 10):
        counts = [alarms(logs[*names[0], seed], threshold) for seed in range(config.seeds)]
        report.say(f"False alarms, a guard of {threshold}, {STEPS} steps of each twin: {', '.join(map(str, counts))}.")

    def judge(prediction: str, lower, higher, sign: int = 1):
        report.judge(prediction, difference(lower, higher), sign, "bits a byte")

    bad, rate = "30 batches", "rate x 10"
    near = [bits + NEAR for bits in twin]
    judge(f"one bad batch heals by itself: less than {NEAR} above the twin", near, last["1 batch", "log", 10], -1)
    judge("thirty bad batches leave more than that", near, last[bad, "log", 10])
    judge("skipping helps against thirty bad batches (log less skip)", last[bad, "skip", 10], last[bad, "log", 10])
    judge("skipping does not help against the rate (skip less log)", last[rate, "log", 10], last[rate, "skip", 10])
    judge("going back helps against the rate (log less rollback)", last[rate, "rollback", 10], last[rate, "log", 10])
    report.say("Asked after these runs, in which the guard saw no bad batch, with a threshold of 3:")
    for fault, policy, guard in LOWER:
        judge(f"{policy} helps against {fault} (log less {policy})", last[fault, policy, guard], last[fault, "log", 10])


def main(config: Config):
    report = Report("spikes", "Loss spikes: log, skip, go back")
    measure(report, config)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
