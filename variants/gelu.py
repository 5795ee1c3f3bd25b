"""GELU instead of SwiGLU, with as many parameters (Hendrycks and Gimpel 2016, arXiv:1606.08415), as in GPT-2."""

import torch.nn.functional as F
from torch import nn


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = 3 * config.ffn_dim // 2  # two matrices in place of SwiGLU's three
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))
