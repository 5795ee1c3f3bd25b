"""Contrastive decoding: what a model likes more than a weaker one, the amateur, does.

Li et al. 2022, arXiv:2210.15097, in the form of O'Brien and Lewis 2023, arXiv:2309.09117.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import BadInput
from lib.sampling import next_tokens

RULED_OUT = -1e30  # in place of a logit


def contrast(expert: Tensor, amateur: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + beta) expert - beta amateur, from logits (B, V) of both, but for a constant a row.

    Only tokens at least alpha times as likely as the expert's likeliest stay. With beta 0 what
    stays has the expert's own logits.
    """
    likelier = expert.log_softmax(-1) - amateur.log_softmax(-1)
    least = expert.amax(-1, keepdim=True) + math.log(alpha)
    return (expert + beta * likelier).masked_fill(expert < least, RULED_OUT)


def check_contrast(alpha: float, beta: float):
    """Raise ValueError for a setting that is out of range."""
    if not 0 < alpha <= 1:
        raise BadInput(f"--alpha {alpha} must lie between 0 and 1, above 0")
    if not 0 <= beta < math.inf:
        raise BadInput(f"--beta {beta} must be a number that is not negative")


@dataclass
class Contrast:
    """Makes decoders for sample.generate that have an amateur beside the model."""

    decoder: type  # sample.Decoder
    amateur: torch.nn.Module
    alpha: float = 0.1
    beta: float = 0.5

    def __call__(self, model, rows: int, size: int, prefix=None) -> "ContrastiveDecoder":
        if prefix is not None:
            raise BadInput("an amateur has not read the prefix of a prompt")
        return ContrastiveDecoder(self, model, rows, size)


class ContrastiveDecoder:
    """Two of sample.Decoder side by side."""

    draw = staticmethod(next_tokens)

    def __init__(self, made_by: Contrast, model, rows: int, size: int):
        self.made_by = made_by
        self.expert = made_by.decoder(model, rows, size)
        self.amateur = made_by.decoder(made_by.amateur, rows, size)

    def read(self, chunks: list[list[int]]) -> Tensor:
        expert, amateur = self.expert.read(chunks), self.amateur.read(chunks)
        return contrast(expert, amateur, self.made_by.alpha, self.made_by.beta)

    def trim(self, lengths: list[int]):
        self.expert.trim(lengths)
        self.amateur.trim(lengths)

    def keep(self, rows: list[int]):
        self.expert.keep(rows)
        self.amateur.keep(rows)


class ContrastReader:
    """Two of eval.Reader: scores a choice by (1 + beta) times its log-probability less beta times
    the amateur's, which is the sum of its tokens' contrasts. No token is ruled out."""

    def __init__(self, expert, amateur, beta: float):
        self.expert, self.amateur, self.beta = expert, amateur, beta
        self.device = expert.device

    def score(self, batch) -> list[tuple[int, int, float]]:
        results = []
        both = zip(self.expert.score(batch), self.amateur.score(batch))
        for (question, choice, expert), (_, _, amateur) in both:
            value = (1 + self.beta) * expert - self.beta * amateur
            results.append((question, choice, value))
        return results
