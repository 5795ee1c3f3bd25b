"""The statistics of an ablation, on simulated runs whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from lib.paired import detectable, holm, needed, paired, power, t_test

DRAWS = 2000


def simulated(seeds: int, difference: float, generator) -> list:
    """Two arms' values by seed: most of what differs between seeds is common to both."""
    common = generator.normal(2.0, 0.05, seeds)
    first = common + generator.normal(0, 0.01, seeds)
    return [list(first), list(common + difference + generator.normal(0, 0.01, seeds))]


SPREAD = 0.01 * math.sqrt(2)  # of the differences of `simulated`


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_without_a_difference_the_interval_covers_zero_in_95_percent_of_draws(seeds):
    generator = np.random.default_rng(seeds)
    found = [t_test(*simulated(seeds, 0.0, generator)) for _ in range(DRAWS)]
    covered = np.mean([low <= 0 <= high for _, low, high, _, _ in found])
    assert 0.93 <= covered <= 0.97
    # the interval holds 0 exactly where the test finds nothing
    assert all((low <= 0 <= high) == (p >= 0.05) for _, low, high, p, _ in found)


@pytest.mark.parametrize("seeds, difference", [(3, 0.03), (3, 0.06), (5, 0.02), (5, 0.03), (8, 0.015)])
def test_the_power_that_is_printed_is_how_often_a_difference_is_found(seeds, difference):
    generator = np.random.default_rng(int(1e4 * difference) + seeds)
    ps = [t_test(*simulated(seeds, difference, generator))[3] for _ in range(DRAWS)]
    found = np.mean(np.array(ps) < 0.05)
    assert abs(found - power(difference, SPREAD, seeds)) <= 0.03


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_smallest_difference_and_the_seeds_needed_agree_with_the_power(seeds):
    smallest = detectable(SPREAD, seeds)
    assert power(smallest, SPREAD, seeds) == pytest.approx(0.8, abs=1e-6)
    assert needed(smallest * 1.001, SPREAD) == seeds
    assert needed(smallest * 0.999, SPREAD) > seeds
    assert needed(1e-6, SPREAD) == math.inf and needed(0.0, SPREAD) == math.inf


def test_the_interval_and_p_are_scipys():
    first, second = simulated(6, 0.01, np.random.default_rng(0))
    found, theirs = paired(first, second), stats.ttest_rel(second, first)
    interval = theirs.confidence_interval(0.95)
    assert found[:4] == pytest.approx([np.mean(second) - np.mean(first), interval.low, interval.high, theirs.pvalue])


def test_arms_that_are_equal_differ_by_exactly_nothing():
    assert paired([1.1, 2.2, 3.3], [1.1, 2.2, 3.3])[:5] == (0.0, 0.0, 0.0, 1.0, 0.0)
    assert paired([1.0, 2.0], [1.5, 2.5])[:4] == (0.5, 0.5, 0.5, 0.0)


def test_one_pair_has_a_difference_and_no_interval():
    found = paired([1.0], [1.5])
    assert found.mean == 0.5 and all(map(math.isnan, found[1:]))


def test_holm_keeps_the_chance_of_any_false_finding_below_5_percent():
    generator = np.random.default_rng(1)
    any_found = [min(holm(list(generator.uniform(size=10)))) < 0.05 for _ in range(DRAWS)]
    assert np.mean(any_found) <= 0.06
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand: 3·0.01, 2·0.03, then not below
    assert holm([0.5, math.nan, 0.01])[0] == 0.5 and math.isnan(holm([0.5, math.nan])[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
