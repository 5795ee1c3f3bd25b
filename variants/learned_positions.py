"""A learned vector for each position, added to the token's, instead of rotations (GPT, Radford et al. 2018)."""

from torch import nn

import model


def rotate(x, rope):
    return x


class Transformer(model.Transformer):
    def __init__(self, config):
        super().__init__(config)
        self.position = nn.Embedding(config.max_seq_len, config.dim)

    def embed(self, tokens, positions):
        return self.embedding(tokens) + self.position(positions)
