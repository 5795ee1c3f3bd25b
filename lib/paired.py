"""Is a difference real? Statistics of runs in pairs, of two arms with the same seed and order of data."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05     # a difference is called real where chance makes one as large less often than this
POWER = 0.8      # how often a difference shall be found that is there
MOST_SEEDS = 1000


class Difference(NamedTuple):
    """Of the second values of pairs less the first ones; nan where the pairs are too few to tell."""

    mean: float
    low: float         # of the 95 % interval
    high: float
    p: float           # of the paired t test, two-sided
    spread: float      # standard deviation of the differences
    detectable: float  # the smallest true difference that so many pairs find with a chance of 80 %
    needed: float      # pairs that find a true difference as large as the mean with that chance; inf: above 1,000


def paired(first: list[float], second: list[float]) -> Difference:
    """Compare two arms by their pairs, which are as many as there are seeds.

    The interval and the test are Student's (1908): differences of pairs are taken as normal, and their spread as
    unknown. With the same value in all pairs nothing is left to chance, so the interval is that value alone.

    >>> found = paired([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    >>> round(found.mean, 6), round(found.low, 6), round(found.high, 6)
    (0.5, 0.251586, 0.748414)
    """
    tested = t_test(first, second)
    mean, _, _, _, spread = tested
    if math.isnan(spread):
        return Difference(*tested, math.nan, math.nan)
    if spread == 0:
        return Difference(*tested, 0.0, 2.0 if mean else math.inf)
    least = detectable(spread, len(first))
    return Difference(*tested, least, needed(mean, spread))


def t_test(first: list[float], second: list[float]) -> tuple[float, float, float, float, float]:
    """Mean of the differences, its 95 % interval, p, and their standard deviation."""
    differences = np.subtract(second, first)
    n = len(differences)
    mean = float(np.mean(differences))
    if n < 2:
        return mean, math.nan, math.nan, math.nan, math.nan
    if np.ptp(differences) == 0:
        return mean, mean, mean, float(mean == 0), 0.0
    spread = float(np.std(differences, ddof=1))
    error = spread / math.sqrt(n)
    half = critical(n) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return mean, mean - half, mean + half, p, spread


def critical(n: int) -> float:
    """How many standard errors a mean of n differences must be from 0."""
    return float(stats.t.ppf(1 - LEVEL / 2, n - 1))


def power(difference: float, spread: float, n: int) -> float:
    """How often the paired t test of n pairs finds a true difference, when their differences spread so.

    By the noncentral t distribution (Cohen 1988, chapter 2).
    """
    shift = abs(difference) / spread * math.sqrt(n)
    bound = critical(n)
    above = stats.nct.sf(bound, n - 1, shift)
    below = stats.nct.cdf(-bound, n - 1, shift)
    return float(above + np.nan_to_num(below))  # scipy gives nan where it is below 1e-16


def detectable(spread: float, n: int) -> float:
    """The smallest true difference that n pairs find with a chance of 80 %."""
    low, high = 0.0, spread
    while power(high, spread, n) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if power(middle, spread, n) < POWER:
            low = middle
        else:
            high = middle
    return high


def needed(difference: float, spread: float) -> float:
    """How many pairs find a true difference of this size with a chance of 80 %; infinite above 1,000."""
    if difference == 0 or power(difference, spread, MOST_SEEDS) < POWER:
        return math.inf
    low, high = 1, MOST_SEEDS  # power grows with the pairs
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, spread, middle) < POWER:
            low = middle
        else:
            high = middle
    return float(high)


def holm(ps: list[float]) -> list[float]:
    """The p of several tests, corrected so that chance makes any of them small as seldom as one alone (Holm 1979).

    A p that is nan is of no test.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    tested = [place for place, p in enumerate(ps) if not math.isnan(p)]
    tested.sort(key=ps.__getitem__)
    corrected, largest = list(ps), 0.0
    for rank, place in enumerate(tested):
        remaining = len(tested) - rank
        p = min(1.0, remaining * ps[place])
        largest = max(largest, p)
        corrected[place] = largest
    return corrected
