"""Normalise after each half of a block, not before it, as the first Transformer did (Vaswani et al. 2017,
arXiv:1706.03762)."""

import model


class Block(model.Block):
    def forward(self, x, rope, cache, documents):
        x = self.attention_norm(x + self.attention(x, rope, cache, documents))
        return self.feed_forward_norm(x + self.feed_forward(x))
