"""No positions at all: a causal model can count what it sees (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466)."""


def rotate(x, rope):
    return x
