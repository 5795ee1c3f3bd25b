"""A model of n-grams, as a cheap judge of which texts are like others: interpolated Kneser-Ney with one discount.

Chen and Goodman 1999, An Empirical Study of Smoothing Techniques for Language Modeling.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

START = -1  # fills up what is before a text


class Ngrams:
    def __init__(self, texts: Iterable[list[int]], vocabulary: int, order: int = 5, discount: float = 0.75):
        """Of texts as ids. The longest n-grams are counted, a shorter one is by how many tokens it is preceded."""
        self.order, self.discount, self.vocabulary = order, discount, vocabulary
        counts = Counter((*context, word) for text in texts for context, word in self.places(text))
        self.levels = []  # of each length, the longest first: counts; of a context all counts, and different words
        for _ in range(order):
            totals, kinds = Counter(), Counter()
            for gram, count in counts.items():
                totals[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            self.levels.append((counts, totals, kinds))
            counts = Counter(gram[1:] for gram in counts)

    def places(self, text: list[int]) -> Iterator[tuple[tuple[int, ...], int]]:
        """(context, token) of each token; the context has order - 1 tokens."""
        ids = [START] * (self.order - 1) + text
        for place in range(len(text)):
            yield tuple(ids[place : place + self.order - 1]), text[place]

    def chance(self, context: tuple[int, ...], word: int) -> float:
        """P(word | context), from that after no context at all to that after the whole."""
        found = 1 / self.vocabulary
        for length, (counts, totals, kinds) in enumerate(reversed(self.levels)):
            known = context[len(context) - length :]
            if known in totals:
                left = max(counts[(*known, word)] - self.discount, 0)
                found = (left + self.discount * kinds[known] * found) / totals[known]
        return found

    def perplexity(self, text: list[int]) -> float:
        logs = [math.log(self.chance(context, word)) for context, word in self.places(text)]
        return math.exp(-sum(logs) / len(logs))
