"""Choosing items one by one so that what they tell of is as varied and as even as can be.

The greedy maximum entropy (GME) sampler of Delmas et al. 2023, arXiv:2311.06364, with the choice that their code calls
dutopia (github.com/idiap/gme-sampler).
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np


class Category:
    """What a set of items would have of one kind of entity, such as words, with each item more.

    entities has a list for each of M items; what stands in it twice counts twice, so sets give the binarised form.
    """

    def __init__(self, entities: Iterable[Iterable]):
        entities, numbers, pairs = list(entities), {}, []
        for item, some in enumerate(entities):
            pairs += [(item, numbers.setdefault(entity, len(numbers)), n) for entity, n in Counter(some).items()]
        self.items = len(entities)
        self.item, self.entity, self.times = np.array(pairs, int).reshape(-1, 3).T
        self.sizes = np.bincount(self.item, self.times, self.items)
        self.counts = np.zeros(len(numbers))

    @property
    def highest(self) -> float:
        """The entropy of all entities in equal shares."""
        return float(np.log(max(1, len(self.counts))))

    def entropies(self) -> np.ndarray:
        """Of the set with each item (M,) more, in nats to five digits.

        From H = ln N - (sum of n ln n) / N, in which an item changes only the counts n of its own entities.
        """
        before = self.counts[self.entity]
        change = times_log(before + self.times) - times_log(before)
        total = np.maximum(self.counts.sum() + self.sizes, 1)
        sums = times_log(self.counts).sum() + np.bincount(self.item, change, self.items)
        return np.round(np.log(total) - sums / total, 5)

    def add(self, item: int):
        own = self.item == item
        self.counts[self.entity[own]] += self.times[own]

    def entropy_of(self, items: Iterable[int]) -> float:
        """Of a set of items, whatever was added."""
        own = np.isin(self.item, list(items))
        counts = np.bincount(self.entity[own], self.times[own])
        total = max(1.0, counts.sum())
        return float(np.log(total) - times_log(counts).sum() / total)


def times_log(n: np.ndarray) -> np.ndarray:
    return n * np.log(np.maximum(n, 1))


def gme(*categories: Category) -> Iterator[tuple[int, tuple[float, ...]]]:
    """The items in the order in which they are chosen, each with the entropies of the set that it completes.

    Each time the one whose set is nearest to the highest entropies in all categories; the first of equals.

    >>> letters = Category(["aaab", "ab", "cd", "ab"])
    >>> list(gme(letters))
    [(1, (0.69315,)), (2, (1.38629,)), (3, (1.32966,)), (0, (1.16828,))]
    """
    left = np.ones(categories[0].items, bool)
    best = np.array([[category.highest] for category in categories])
    while left.any():
        found = np.stack([category.entropies() for category in categories])
        far = np.linalg.norm(found - best, axis=0)
        item = int(np.where(left, far, np.inf).argmin())
        left[item] = False
        for category in categories:
            category.add(item)
        yield item, tuple(found[:, item].tolist())
