"""Squared ReLU instead of SwiGLU, with as many parameters (Primer, So et al. 2021, arXiv:2109.08668)."""

import torch.nn.functional as F
from torch import nn


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = 3 * config.ffn_dim // 2  # two matrices in place of SwiGLU's three
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())
