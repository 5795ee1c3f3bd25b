"""Attention and feed-forward side by side on one norm of the input (GPT-J, Wang 2021; PaLM, Chowdhery et al. 2022,
arXiv:2204.02311)."""

import model


class Block(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        del self.feed_forward_norm

    def forward(self, x, rope, cache, documents):
        normal = self.attention_norm(x)
        return x + self.attention(normal, rope, cache, documents) + self.feed_forward(normal)
