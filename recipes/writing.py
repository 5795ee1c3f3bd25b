"""Writing with a local model, and what can be measured of a text: shared by the recipes of papers."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Tokenizer
from lib.sampling import Sampling
from sample import generate

ROWS = 64  # texts that are written at a time


def writer(model, tokenizer: Tokenizer, seed: int = 0):
    """A function of contexts, as ids without BOS, and a number of tokens: what the model writes at temperature 1."""

    def write(contexts: list[list[int]], size: int) -> list[list[int]]:
        found = []
        for begin in range(0, len(contexts), ROWS):
            prompts = [[tokenizer.bos_id, *ids] for ids in contexts[begin : begin + ROWS]]
            found += generate(model, prompts, size, Sampling(1.0, seed=seed + begin))
        return found

    return write


def beginnings(documents: list[list[int]], tokenizer: Tokenizer, count: int, size: int, seed: int) -> list[list[int]]:
    """Prompts of so many tokens with BOS, from random places of documents (ids)."""
    long = [ids for ids in documents if len(ids) >= size]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = long[draw.integers(len(long))]
        begin = draw.integers(len(ids) - size + 2)
        found.append([tokenizer.bos_id, *ids[begin : begin + size - 1]])
    return found


def distinct(ids: list[int], n: int = 3) -> float:
    """The share of different ones among a text's n-grams.

    >>> distinct([1, 2, 3, 1, 2, 3, 1])
    0.6
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def copied(prompt: list[int], ids: list[int], n: int = 4) -> float:
    """The share of a text's n-grams that its prompt has too."""
    known = {tuple(prompt[i : i + n]) for i in range(len(prompt) - n + 1)}
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


@torch.no_grad()
def bits(judge, tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> float:
    """Bits a byte of what was written, by a third model."""
    whole = torch.tensor([prompt + ids])
    logprobs = judge.log_probs(whole[:, :-1], whole[:, 1:])[0, len(prompt) - 1 :]
    return float(-logprobs.sum()) / np.log(2) / max(1, len(tokenizer.decode(ids).encode()))
