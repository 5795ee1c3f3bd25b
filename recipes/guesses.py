"""What is known and measured of speculative decoding: formulas, acceptance, times."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.sampling import Sampling, distribution
from lib.speculative import Speculation
from sample import Decoder, generate


def expected_tokens(a: float, n: int) -> float:
    """Tokens of a round of n guesses, each accepted with probability a (Leviathan et al.).

    >>> [round(expected_tokens(0.8, n), 2) for n in (1, 2, 4, 8)]
    [1.8, 2.44, 3.36, 4.33]
    """
    return (1 - a ** (n + 1)) / (1 - a) if a < 1 else n + 1.0


@torch.no_grad()
def acceptance(model, draft, texts: list[list[int]], sampling: Sampling) -> float:
    """The mean over positions of the sum of min(p, q), the chance that a guess is accepted."""
    shares = []
    for ids in texts:
        both = (each(torch.tensor([ids]))[0, 63:] for each in (model, draft))  # behind the prompt
        p, q = (distribution(logits, [[]] * len(logits), sampling) for logits in both)
        shares.append(torch.minimum(p, q).sum(-1))
    return float(torch.cat(shares).mean())


def timed(work, count: int = 12) -> float:
    """Milliseconds of a call, the median of so many."""
    work()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def times_of(made: Speculation, model, ids: list[int]) -> tuple[float, float]:
    """Milliseconds of a draft's step and of a verification with its draws, after ids."""
    decoder = made(model, 1, 256)
    decoder.read([ids])
    n, last = made.draft_tokens, ids[-1:]

    def guess():
        decoder.draft.trim([len(ids) - 1])
        decoder.guess(ids)

    def verify():
        decoder.target.trim([len(ids) - 1])
        logits = model.unembedding(decoder.target.states([last + decoder.guesses])[0]).float()
        for place in range(1 + round(tokens_a_round(made) - 1)):  # those that are looked at
            decoder.draw(logits[place : place + 1].clone(), [ids], made.sampling, torch.tensor([0.5]))

    return timed(guess) / n, timed(verify)


def tokens_a_round(made: Speculation) -> float:
    return (made.accepted + made.rounds) / max(1, made.rounds)


def speed(model, prompts, new_tokens: int, sampling: Sampling, made: Speculation | None) -> tuple[float, list]:
    """Tokens a second, and the texts."""
    began, texts = time.perf_counter(), []
    for prompt in prompts:
        texts += generate(model, [prompt], new_tokens, sampling, decoder=made or Decoder)
    return sum(map(len, texts)) / (time.perf_counter() - began), texts
