"""Faults planted in a training, which train.py itself knows nothing of: shuffled batches, or a wrong learning rate."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import OUT, text

import train
from data import Batch

FAULTS = {"1 batch": 1, "30 batches": 30, "rate x 10": 10}  # and how many steps each lasts
STEPS, AT = 240, 110  # of a run, and before its fault, when the guard has settled
BATCH = 8             # sequences of a step
HERE = OUT / "spikes"


def shuffled(batch: Batch, seed: int) -> Batch:
    """The same tokens in an order without sense, each still followed by its target."""
    rows = np.concatenate((batch.tokens, batch.targets[:, -1:]), 1)
    rows = np.random.default_rng(seed).permutation(rows.ravel()).reshape(rows.shape)
    return batch._replace(tokens=rows[:, :-1], targets=rows[:, 1:])


@contextlib.contextmanager
def planted(fault: str, at: int) -> Iterator[None]:
    """A fault in train.py, inside: in the data of steps, or of the learning rate in time.

    What reads past the bad data is rid of it; what goes back while the rate is wrong has it wrong for the rest of the
    steps that it lasts.
    """
    read, rate, lasts, seen = train.Mixture.batch, train.learning_rate, FAULTS.get(fault, 0), []

    def batch(self, numbers, seed: int) -> Batch:
        found, step = read(self, numbers, seed), numbers[0] // BATCH
        bad = "batch" in fault and at <= step < at + lasts
        return shuffled(found, numbers[0]) if bad else found

    def learning_rate(step: int, config) -> float:
        if fault.startswith("rate") and (seen or step == at) and len(seen) < lasts:
            seen.append(step)
            return 10 * rate(step, config)
        return rate(step, config)

    train.Mixture.batch, train.learning_rate = batch, learning_rate
    try:
        yield
    finally:
        train.Mixture.batch, train.learning_rate = read, rate


def trained(seed: int, fault: str, policy: str, spike: int = 10) -> Path:
    """The run of a seed with a fault ("" for its twin without) under a policy, trained where it is not there yet.

    spike is the guard's threshold in standard deviations.

    One that was interrupted is begun again, since a fault of the rate does not know how long it has lasted.
    """
    name = f"{fault.replace(' ', '_') or 'twin'}_{policy}"
    out = HERE / (f"{name}_{seed}" if spike == 10 else f"{name}_at_{spike}_{seed}")
    marker = out.with_name(f"{out.name}.finished")
    if not marker.exists():
        shutil.rmtree(out, ignore_errors=True)
        shape = dict(num_layers=2, dim=64, num_heads=4, ffn_dim=176, seq_len=128, batch_size=BATCH)
        often = dict(log_every=1, eval_every=10, eval_tokens=4096, save_every=50, max_bad_steps=100)
        words = dict(data=(str(text()),), out=str(out), seed=seed, steps=STEPS, sample="", spike=spike, on_spike=policy)
        print("+ a run of train.py,", out, flush=True)
        with planted(fault, AT):
            train.main(train.Config(**shape, **often, **words))
        marker.touch()
    return out
