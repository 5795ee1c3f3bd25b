"""Speculative decoding: a small model guesses, the model itself reads several guesses at once.

Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. What is written has the
distribution of the model alone; without chance, temperature 0, it is the same text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import BadInput
from lib.sampling import NOT_FINITE, Sampling, distribution, next_tokens, pick


@dataclass
class Speculation:
    """Makes decoders for sample.generate, of one row each, and counts what comes of the guesses."""

    decoder: type       # sample.Decoder
    draft: torch.nn.Module
    draft_tokens: int   # guesses in a round
    sampling: Sampling  # as the model's: guesses are drawn alike
    rounds: int = 0     # in each the model reads once
    guessed: int = 0
    accepted: int = 0

    def __call__(self, model, rows: int, size: int, prefix=None) -> "SpeculativeDecoder":
        if rows != 1 or prefix is not None:
            only = "one text at a time, read from its beginning"
            raise BadInput(f"a draft guesses for {only}")
        return SpeculativeDecoder(self, model, size)

    def described(self) -> str:
        """What came of the guesses, in words."""
        share = self.accepted / max(1, self.guessed)
        written = self.accepted + self.rounds
        tokens = written / max(1, self.rounds)
        guesses = f"{share:.0%} of {self.guessed} guesses accepted"
        return f"{tokens:.2f} tokens a round; {guesses}"


class SpeculativeDecoder:
    """Reads like sample.Decoder, and has the logits after its guesses before they are asked for."""

    def __init__(self, made_by: Speculation, model, size: int):
        self.made_by, self.model, self.size = made_by, model, size
        self.target = made_by.decoder(model, 1, size)
        self.window = min(size, made_by.draft.config.max_seq_len)
        self.draft = made_by.decoder(made_by.draft, 1, self.window)
        self.generator = torch.Generator().manual_seed(made_by.sampling.seed)
        self.known: list[int] = []        # what the caller let it read
        self.guesses: list[int] = []      # what the draft thinks comes next
        self.drawn_from: list[Tensor] = []  # the draft's probabilities (V,) for each guess
        self.logits = torch.empty(0)      # (guesses + 1, V): after `known`, and after each guess

    def read(self, chunks: list[list[int]]) -> Tensor:
        """As sample.Decoder.read, of one row."""
        (chunk,) = chunks
        if chunk == self.guesses[:1]:
            self.made_by.accepted += 1
            del self.guesses[0], self.drawn_from[0]
            self.logits = self.logits[1:]
        else:
            self.begin_round(chunk)
        self.known = self.known + chunk
        return self.logits[:1].clone()

    def begin_round(self, chunk: list[int]):
        """Read a chunk, guess what follows, and let the model read both in one go."""
        read = len(self.known)
        self.target.trim([read])
        by_draft = self.draft.cache.longest
        self.draft.trim([min(read, by_draft)])
        self.guess(self.known + chunk)
        states = self.target.states([chunk + self.guesses])[0]
        self.logits = self.model.unembedding(states[len(chunk) - 1 :]).float()
        self.made_by.rounds += 1
        self.made_by.guessed += len(self.guesses)

    def guess(self, context: list[int]):
        """Let the draft go on from context, of which it has read a part."""
        self.guesses, self.drawn_from = [], []
        unread = context[self.draft.cache.longest :]  # after a full success two tokens
        room = self.window - len(context)
        for _ in range(min(self.made_by.draft_tokens, room)):
            logits = self.draft.read([unread])
            so_far = context + self.guesses
            p = distribution(logits, [so_far], self.made_by.sampling)
            uniform = torch.rand(1, generator=self.generator)
            unread = pick(p, uniform.to(p.device)).tolist()
            self.guesses += unread
            self.drawn_from.append(p[0])

    def draw(
        self, logits: Tensor, contexts: list[list[int]], sampling: Sampling, uniform: Tensor
    ) -> list[int]:
        """As `next_tokens`, but so that a guess is taken as often as it can be."""
        if not self.guesses:
            return next_tokens(logits, contexts, sampling, uniform)
        if not logits.isfinite().all():
            return [NOT_FINITE]
        p, q = distribution(logits, contexts, sampling)[0], self.drawn_from[0]
        return [accept(p, q, self.guesses[0], float(uniform))]

    def trim(self, lengths: list[int]):
        """Forget all but the first lengths[0] tokens."""
        if lengths[0] < len(self.known):
            self.known = self.known[: lengths[0]]
            self.guesses, self.drawn_from = [], []


def accept(p: Tensor, q: Tensor, guess: int, uniform: float) -> int:
    """A token with probabilities p (V,): the guess, drawn from q (V,), or else one in its place.

    The guess is taken with probability min(1, p / q), otherwise a token is drawn from what p has
    more than q. One uniform number does for both: what is left of it, stretched, is uniform again.
    """
    ratio = float(p[guess] / q[guess])
    taken = min(1.0, ratio)
    if uniform < taken:
        return guess
    rest = (uniform - taken) / (1 - taken)
    more = (p - q).clamp(min=0)[None]
    uniform = torch.tensor([rest], device=p.device)
    return int(pick(more, uniform))
