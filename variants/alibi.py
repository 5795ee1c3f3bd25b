"""ALiBi: the further back a key, the lower its score, and no rotations (Press et al. 2021, arXiv:2108.12409)."""

import math

import torch
import torch.nn.functional as F

import model


def rotate(x, rope):
    return x


class Attention(model.Attention):
    def attend(self, q, k, v, mask):
        heads, tokens = q.size(1), k.size(2)
        slots = torch.arange(tokens, device=q.device)
        place = slots[-q.size(2) :, None]  # of each query among the keys, where all rows are as long
        if mask is not None:  # with the cache: it sees all keys up to its own
            place = (mask == 0).sum(-1)[..., None] - 1
        distance = place - slots
        slopes = 2 ** (-8 * torch.arange(1, heads + 1, device=q.device) / heads)
        bias = -slopes[:, None, None] * distance
        bias = bias.masked_fill(distance < 0, -math.inf).to(q.dtype)
        if bias.dim() == 3:
            bias = bias[None]
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=heads != k.size(1))
