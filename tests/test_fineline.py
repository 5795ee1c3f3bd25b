"""recipes/fineline.py: what early measures foretell, on numbers worked by hand and on runs made up."""

import doctest
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
import fineline
import foretelling
import study


def of_runs(*runs) -> np.ndarray:
    """Values of (runs, steps) for 4 items each."""
    return np.repeat(np.array(runs, float)[..., None], 4, -1)


def test_examples_in_docstrings():
    assert doctest.testmod(foretelling).failed == 0


def test_correlations_on_numbers_worked_by_hand():
    """Ranks 1 2 3 4 against 1 2 4 3: Spearman's is 1 - 6 * 2 / (4 * 15) = 0.8; 4 of 24 orders have as much."""
    values = {"a": of_runs([1, 5], [2, 6], [3, 9], [4, 8]), "b": of_runs([0, 4], [0, 3], [0, 2], [0, 1])}
    means = foretelling.halved(values)
    assert foretelling.foretold(means, "a", "a", 0) == pytest.approx(0.8)
    assert foretelling.by_chance(means, "a", "a", 0) == pytest.approx(4 / 24)
    assert foretelling.foretold(means, "a", "a", 1) == pytest.approx(1)
    assert foretelling.by_chance(means, "a", "a", 1) == pytest.approx(1 / 24)
    assert foretelling.foretold(means, "a", "b", 0) == pytest.approx(-1)
    assert foretelling.foretold(means, "b", "a", 0) == 0  # all are equal
    assert foretelling.by_chance(means, "b", "a", 0) == 1


def test_equal_values_share_their_rank():
    """Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: off their mean -1.5, 0, 0, 1.5 and -1.5, 0.5, -0.5, 1.5."""
    first, second = (foretelling.standard_ranks(np.array(values)) for values in ([1, 7, 7, 9], [0, 3, 2, 4]))
    assert first @ second == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_the_luck_of_an_item_foretells_nothing():
    """The control: runs that are alike but for their items, which stay as they are over the steps."""
    draw, halves, same = np.random.default_rng(0), [], []
    for _ in range(100):
        values = np.repeat(draw.random((8, 1, 20)), 2, 1)
        halves.append(foretelling.foretold(foretelling.halved({"a": values}), "a", "a", 0))
        means = values.mean(-1)
        same.append(foretelling.standard_ranks(means[:, 0]) @ foretelling.standard_ranks(means[:, 1]))
    assert abs(np.mean(halves)) < 3 * np.std(halves) / 10 and np.mean(same) > 0.99


def test_what_only_time_does_is_not_going_together():
    """Two measures that rise alike in all runs, with increments of their own: none; with shared ones: as planted."""
    draw = np.random.default_rng(1)
    time, own, shared = np.arange(40.0) ** 2, *draw.normal(size=(2, 8, 40))
    values = {name: of_runs(*(time + each)) for name, each in (("a", own), ("b", shared), ("c", 3 * shared))}
    means = foretelling.halved(values)
    assert abs(foretelling.together(means, [("a", "b")])) < 0.2
    assert foretelling.together(means, [("b", "c")]) == pytest.approx(1)
    assert abs(foretelling.together(means, [("a", "b"), ("b", "c")]) - 0.5) < 0.1


def test_the_interval_of_a_mean_over_runs_is_that_of_students_t():
    """Runs 1 to 8: standard deviation 6 ** 0.5, and t of 7 degrees of freedom is 2.3646."""
    values = {"a": of_runs(*([run] for run in range(1, 9)))}
    found = foretelling.estimate(values, lambda means: float(means["a"].mean()))
    half = 2.3646 * (6 / 8) ** 0.5
    assert found[:3] == pytest.approx((4.5, 4.5 - half, 4.5 + half), rel=1e-4) and found.seeds == (4.5,)


def test_runs_differ_in_one_thing_each(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(fineline, "train", lambda out, *words: asked.append(words) or out)
    monkeypatch.setattr(fineline, "domain", lambda where: tmp_path / "torch")
    monkeypatch.setattr(fineline, "text", lambda: tmp_path / "stdlib")
    assert len({fineline.trained(name) for name in fineline.RUNS}) == 8
    first = dict(zip(asked[0][3::2], asked[0][4::2]))
    for words, (share, more) in zip(asked, fineline.RUNS.values()):
        assert words[:3] == ("--data", f"{tmp_path}/stdlib:{1 - share:g}", f"{tmp_path}/torch:{share:g}")
        flags = dict(zip(words[3::2], words[4::2]))
        changed = {name for name in flags if flags[name] != first[name]}
        assert changed == set(more.split()[::2])
        assert len(changed - {"--ffn_dim"}) + (share != 0.5) == (words is not asked[0])


def test_the_report_finds_what_was_planted(capsys):
    """Bits that are in their last order from the first step on; accuracy in a random one until the end."""
    draw, runs, steps = np.random.default_rng(0), 8, len(fineline.STEPS)
    level = np.arange(runs)[:, None, None] + np.zeros((runs, steps, 40))
    values = {f"{kind} {measure}": level.copy() for kind in fineline.KINDS for measure in fineline.MEASURES}
    for kind in fineline.KINDS:
        values[f"{kind} right"][:, :-1] = np.array([3, 1, 6, 0, 7, 2, 5, 4])[:, None, None]
        for measure in fineline.MEASURES:
            values[f"{kind} {measure}"] += draw.normal(scale=0.01, size=(runs, steps, 40))
    report = study.Report("fineline", "The Fine Line")
    fineline.told(report, values)
    said = capsys.readouterr().out
    assert "| stdlib bits | bits | 1.00 (p 0.000) |" in said and "| torch right | right | 0.26 (p " in said
    assert "less 0.8. Found: +0.2 " in said and "than accuracy does. Found: +0.7" in said
