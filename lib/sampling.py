"""How the next token is drawn from logits: the settings, and the random numbers of each row."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import BadInput

MOST = {"num": 10_000, "max_new_tokens": 1_000_000}  # samples of a prompt, and their tokens
DRAWN = 256  # random numbers that a row has in advance
FEW = 256    # tokens that are ranked at first, among which are nearly always all that may be drawn
NOT_FINITE = -1  # in place of a token, where the logits have infinities or NaN


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The default is greedy: the likeliest token, always."""

    temperature: float = 0.0         # divides the logits; 0 is greedy
    top_k: int = 0                   # only the k likeliest tokens; 0 is all
    top_p: float = 1.0               # only the likeliest that together have this probability
    min_p: float = 0.0               # only tokens at least this likely, relative to the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that are there already less likely
    seed: int = 0                    # the same seed gives the same samples

    def check(self):
        """Raise ValueError for a setting that is out of range."""
        if not (0 <= self.temperature < math.inf and self.top_k >= 0):
            wrong = f"--temperature {self.temperature} and --top_k {self.top_k}"
            raise BadInput(f"{wrong} must be numbers that are not negative")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            wrong = f"--top_p {self.top_p} and --min_p {self.min_p}"
            raise BadInput(f"{wrong} must lie between 0 and 1, top_p above 0")
        if not 0 < self.repetition_penalty < math.inf:
            wrong = f"--repetition_penalty {self.repetition_penalty}"
            raise BadInput(f"{wrong} must be a number above 0")


def choose(
    logits: Tensor, contexts: list[list[int]], sampling: Sampling, uniform: Tensor
) -> Tensor:
    """The next token (B,) from logits (B, V), which are changed.

    uniform (B,), numbers in [0, 1), picks where sampling is random.
    """
    penalise(logits, contexts, sampling.repetition_penalty)
    if sampling.temperature < 1e-5:  # dividing by less would overflow
        return logits.argmax(-1)
    p, tokens = ranked(logits, sampling)
    place = pick(p, uniform)
    chosen = tokens.gather(-1, place[:, None])
    return chosen[:, 0]


def distribution(logits: Tensor, contexts: list[list[int]], sampling: Sampling) -> Tensor:
    """The probabilities (B, V) with which `choose` takes each token; the logits are changed."""
    penalise(logits, contexts, sampling.repetition_penalty)
    if sampling.temperature < 1e-5:
        p = torch.zeros_like(logits)
        likeliest = logits.argmax(-1, keepdim=True)
        return p.scatter_(-1, likeliest, 1.0)
    p, tokens = ranked(logits, sampling)
    p = p / p.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, tokens, p)


def penalise(logits: Tensor, contexts: list[list[int]], penalty: float):
    """Make the tokens of each row's context less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    if penalty == 1:
        return
    for row, context in zip(logits, contexts):
        known = sorted(set(context))
        seen = torch.tensor(known, device=logits.device)
        before = row[seen]
        weaker = torch.where(before > 0, before / penalty, before * penalty)
        row[seen] = weaker


def ranked(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens (B, n), likeliest first, and what each has of the mass, 0 where it is ruled out.

    Those that are left out are ruled out, too. Nucleus sampling, top_p, is Holtzman et al. 2020,
    arXiv:1904.09751.
    """
    whole = logits.size(-1)
    limits = (sampling.top_k, sampling.min_p, 1 - sampling.top_p)
    few = sampling.top_k <= FEW < whole
    on_cpu = logits.device.type == "cpu"
    if few and on_cpu and any(limits):
        # sorting 32,000 takes half as long as a step of a small model
        p, values, tokens = restricted(logits, FEW, sampling)
        last = values[:, -1:]
        in_doubt = (p > 0) & (values <= last)  # others may be as likely as the last
        if not in_doubt.any():
            return p, tokens
    p, _, tokens = restricted(logits, whole, sampling)
    return p, tokens


def restricted(logits: Tensor, most: int, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Of the `most` likeliest tokens the mass, the logits and the tokens (B, most), in order."""
    values, tokens = likeliest(logits, most)
    scaled = values / sampling.temperature
    if sampling.top_k:  # by rank, so that equal logits do not let more than k through
        scaled[:, sampling.top_k :] = -math.inf
        p = scaled.softmax(-1)
    else:
        everything = logits / sampling.temperature
        normalizer = everything.logsumexp(-1, keepdim=True)
        p = (scaled - normalizer).exp()
    likelier = p.cumsum(-1) - p  # top_p counts what top_k leaves
    keep = likelier < sampling.top_p
    least = sampling.min_p * p[:, :1]
    keep &= p >= least
    return p * keep, values, tokens


def likeliest(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest logits (B, most) in order, of equal ones the first token first; their tokens."""
    if most == logits.size(-1):
        return logits.sort(dim=-1, descending=True, stable=True)
    tokens = logits.topk(most).indices
    tokens = tokens.sort(-1).values
    values = logits.gather(-1, tokens)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


def pick(p: Tensor, uniform: Tensor) -> Tensor:
    """The places (B,) whose share of the mass of p (B, V) holds uniform (B,), never one of 0."""
    mass = p.cumsum(-1)
    whole = mass[:, -1:]
    wanted = uniform[:, None] * whole
    place = (mass <= wanted).sum(-1)
    places = torch.arange(p.size(-1), device=p.device)
    possible = torch.where(p > 0, places, 0)
    return torch.minimum(place, possible.amax(-1))


def next_tokens(
    logits: Tensor, contexts: list[list[int]], sampling: Sampling, uniform: Tensor
) -> list[int]:
    """The next token of each row, NOT_FINITE where its logits have infinities or NaN."""
    largest = logits.amax(-1)
    smallest = logits.amin(-1)
    finite = largest.isfinite() & smallest.isfinite()  # NaN would be both
    tokens = choose(logits, contexts, sampling, uniform)
    return torch.where(finite, tokens, NOT_FINITE).tolist()  # one wait for both


class UniformNumbers:
    """Random numbers in [0, 1) for each row, from a seed of its own, whichever rows still run."""

    def __init__(self, seed: int, rows: int, device: torch.device):
        self.generators, self.device = [], device
        for row in range(rows):
            row_seed = (seed * 1_000_003 + row) % 2**63
            generator = torch.Generator().manual_seed(row_seed)
            self.generators.append(generator)

    def at(self, step: int, rows: list[int]) -> Tensor:
        """One number for each of these rows (B,); the steps are asked for in order."""
        if step % DRAWN == 0:
            drawn = [torch.rand(DRAWN, generator=generator) for generator in self.generators]
            self.numbers = torch.stack(drawn).to(self.device)
        return self.numbers[rows, step % DRAWN]
