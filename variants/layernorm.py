"""LayerNorm instead of RMSNorm: also subtract the mean, and learn a bias (Ba et al. 2016, arXiv:1607.06450)."""

import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.LayerNorm):
    def forward(self, x):
        normalized = F.layer_norm(x.float(), self.normalized_shape, eps=self.eps)
        return normalized.type_as(x) * self.weight + self.bias
