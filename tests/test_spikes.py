"""Planted faults: that they are where they should be, and what is counted of them, on numbers worked by hand."""

import doctest
import sys

import numpy as np
import pytest

from conftest import ROOT
from data import Batch

sys.path.insert(0, str(ROOT / "recipes"))
import faults
import spikes

import train


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(spikes)
    assert found.attempted > 0 and found.failed == 0


def test_a_shuffled_batch_has_the_same_tokens_and_targets_one_later():
    rows = np.arange(2 * 9).reshape(2, 9)
    batch = Batch(rows[:, :-1], rows[:, 1:], numbers=range(4, 6))
    found = faults.shuffled(batch, 0)
    assert (found.tokens[:, 1:] == found.targets[:, :-1]).all() and found.numbers == batch.numbers
    whole = np.concatenate((found.tokens, found.targets[:, -1:]), 1)
    assert sorted(whole.ravel()) == list(range(18)) and (whole != rows).any()


@pytest.mark.parametrize("fault, steps", [("", []), ("1 batch", [5]), ("30 batches", list(range(5, 35)))])
def test_bad_batches_are_those_of_their_steps_alone(fault, steps, monkeypatch):
    rows = np.arange(8 * 9).reshape(8, 9)
    batch = Batch(rows[:, :-1], rows[:, 1:])
    monkeypatch.setattr(train.Mixture, "batch", lambda self, numbers, seed: batch)
    usual = train.Mixture.batch, train.learning_rate
    with faults.planted(fault, 5):
        read = [train.Mixture.batch(None, range(8 * step, 8 * step + 8), 0) for step in range(50)]
        config = train.Config()
        assert [train.learning_rate(step, config) for step in range(50)] == [usual[1](s, config) for s in range(50)]
    assert [step for step, each in enumerate(read) if (each.tokens != batch.tokens).any()] == steps
    assert (train.Mixture.batch, train.learning_rate) == usual


def test_a_wrong_rate_lasts_ten_steps_also_of_a_run_that_goes_back():
    config = train.Config(schedule="constant", warmup=0)
    with faults.planted("rate x 10", 5):
        rates = [train.learning_rate(step, config) for step in (3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 9, 10, 11, 5)]
    assert [round(rate / config.learning_rate) for rate in rates] == [1, 1] + [10] * 10 + [1, 1]


def test_costs_are_counted_from_a_log():
    rows = [
        {"step": 161, "event": "spike", "skipped": True},
        {"step": 150, "event": "rollback", "spike": 161, "passed_over": 11},
        {"step": 150, "event": "rollback", "spike": 152, "passed_over": 13},
        {"step": 161, "val_bits_per_byte": 2.0},
    ]
    assert spikes.costs(rows) == {"spikes": 3, "skipped": 1, "returns": 2, "undone": 13}
    assert spikes.curve(rows) == {161: 2.0}


def test_a_guard_of_a_lower_threshold_cries_sooner():
    """120 steps that alternate by 0.1 around a level, then 5 standard deviations above it, then as before."""
    losses = [3 + 0.1 * (-1) ** step for step in range(120)] + [3.5] + [3 + 0.1 * (-1) ** step for step in range(20)]
    rows = [{"lr": 1.0, "loss": loss, "grad_norm": 1.0} for loss in losses]
    rows.append({"event": "spike", "loss": 9.0, "grad_norm": 1.0})  # no step
    assert (spikes.alarms(rows, 3.0), spikes.alarms(rows, 10.0)) == (1, 0)
    assert spikes.alarms([rows[0]] * 50 + [{"lr": 1.0, "loss": 99.0, "grad_norm": 1.0}], 3.0) == 0  # not settled yet


def test_a_run_that_leaves_its_twin_again_was_not_back():
    at = faults.AT
    twin = {at + steps: 2.0 for steps in (-10, 10, 20, 30)}
    assert spikes.steps_until_back(twin, twin) == 10
    assert spikes.steps_until_back(twin | {at + 20: 2.1}, twin) == 30
    assert spikes.steps_until_back(twin | {at + 30: 2.02}, twin) is None
