"""Finding the passage that a question is about, by BM25 (Robertson and Zaragoza 2009, k1 1.5 and b 0.75)."""

import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filters import words_of


class Index:
    """Passages by their words."""

    def __init__(self, passages: list[str], k1: float = 1.5, b: float = 0.75):
        self.passages, self.k1, self.b = passages, k1, b
        self.counts = [Counter(words_of(text)) for text in passages]
        self.lengths = [sum(counts.values()) for counts in self.counts]
        self.mean = sum(self.lengths) / len(passages)
        self.holding = {}  # word to the passages with it
        for number, counts in enumerate(self.counts):
            for word in counts:
                self.holding.setdefault(word, []).append(number)

    def scores(self, query: str) -> dict[int, float]:
        """Of the passages with a word of the query, by their number.

        A word that n of N passages have weighs ln(1 + (N - n + 0.5) / (n + 0.5)); it is counted c times in a passage of
        length l as c (k1 + 1) / (c + k1 (1 - b + b l / mean length)).
        """
        found = Counter()
        for word in words_of(query):
            holding = self.holding.get(word, [])
            weight = math.log(1 + (len(self.passages) - len(holding) + 0.5) / (len(holding) + 0.5))
            for number in holding:
                count, length = self.counts[number][word], self.lengths[number] / self.mean
                found[number] += weight * count * (self.k1 + 1) / (count + self.k1 * (1 - self.b + self.b * length))
        return found

    def best(self, query: str) -> int:
        """The number of the passage with the highest score, the first of equals; 0 where none has a word of it."""
        scores = self.scores(query)
        return min(scores, key=lambda number: (-scores[number], number), default=0)
