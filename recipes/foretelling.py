"""What early measures of runs tell of their end: correlations over the runs, on halves of the items.

A measure has values (runs, steps, items), higher ones better. Early and late are taken from different halves, so that
the luck of an item is not taken for foretelling.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import Difference

from lib.paired import critical

Means = dict[str, np.ndarray]  # (halves of the items, runs, steps)


def halved(values: dict[str, np.ndarray]) -> Means:
    """The means over each half of the items."""
    return {name: np.array([each[..., half::2].mean(-1) for half in (0, 1)]) for name, each in values.items()}


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal ones their mean, of mean 0 and length 1; all 0 where all are equal.

    >>> (standard_ranks(np.array([5.0, 1.0, 1.0])) * 1.5**0.5).round(3).tolist()
    [1.0, -0.5, -0.5]
    """
    found = (values[:, None] > values).sum(1) - (values[:, None] < values).sum(1)
    return found / max(1e-9, np.linalg.norm(found))


def foretold(means: Means, early: str, late: str, step: int) -> float:
    """Spearman's correlation over the runs of one measure at a step, counted from 0, with one at the last step."""
    return float(of_orders(means, early, late, step, np.arange(means[early].shape[1])))


@functools.cache
def all_orders(runs: int) -> np.ndarray:
    """(orders, runs), the first that of the runs themselves."""
    return np.array(list(itertools.permutations(range(runs))))


def by_chance(means: Means, early: str, late: str, step: int) -> float:
    """How many of all orders of the runs have as high a correlation: p, one-sided and exact."""
    found = of_orders(means, early, late, step, all_orders(means[early].shape[1]))
    return float((found >= found[0] - 1e-9).mean())


def of_orders(means: Means, early: str, late: str, step: int, orders: np.ndarray) -> np.ndarray:
    """The correlation when the ends are those of the runs in these orders (orders, runs), the mean of both halves."""
    both = []
    for half in (0, 1):
        ends = standard_ranks(means[late][1 - half, :, -1])
        both.append(ends[orders] @ standard_ranks(means[early][half, :, step]))
    return np.mean(both, 0)


def together(means: Means, pairs: list[tuple[str, str]]) -> float:
    """The mean correlation of two measures' increments between steps, less the mean increment of all runs, so that
    what only time does to both does not count."""
    found = []
    for pair in pairs:
        steps = [np.diff(means[name], axis=-1) for name in pair]
        first, second = (each - each.mean(1, keepdims=True) for each in steps)
        found += [np.corrcoef(first[half].ravel(), second[1 - half].ravel())[0, 1] for half in (0, 1)]
    return float(np.mean(found))


def estimate(values: dict[str, np.ndarray], measure: Callable[[Means], float]) -> Difference:
    """With a 95 % interval of the jackknife over the runs (Efron and Stein 1981), rough where these are few.

    Drawing items instead would leave out the luck of the runs, and lowers correlations, as it adds noise to both sides.
    """
    means = halved(values)
    count = next(iter(means.values())).shape[1]
    without = [measure({name: np.delete(each, run, 1) for name, each in means.items()}) for run in range(count)]
    half = critical(count) * float(np.std(without)) * (count - 1) ** 0.5
    found = measure(means)
    return Difference(found, found - half, found + half, (found,))
