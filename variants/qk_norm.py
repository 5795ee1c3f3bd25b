"""Normalise the queries and keys of each head, so that no score grows without bound (Henry et al. 2020,
arXiv:2010.04245; with learned weights as in ViT-22B, Dehghani et al. 2023, arXiv:2302.05442)."""

import model


class Attention(model.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.query_norm = model.RMSNorm(self.head_dim, config.norm_eps)
        self.key_norm = model.RMSNorm(self.head_dim, config.norm_eps)

    def heads(self, x, rope):
        q, k, v = (matrix(x).unflatten(-1, (-1, self.head_dim)) for matrix in (self.query, self.key, self.value))
        return model.rotate(self.query_norm(q), rope), model.rotate(self.key_norm(k), rope), v
