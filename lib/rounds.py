"""What is measured in turns, and how speeds compare."""

from collections.abc import Callable
from statistics import median


def in_turns(actions: list[Callable], rounds: int) -> list[list]:
    """What each action returned, in every round. A round is all of them, one after the other.

    So what else the machine does meets all of them.
    """
    results = []
    for _ in range(rounds):
        results.append([action() for action in actions])
    return [list(same) for same in zip(*results)]


def compare(first: dict, other: dict) -> dict:
    """How many times as fast the first row is as the other: the median of the rounds' ratios.

    Both have a name and the seconds of each round, for the same work.
    """
    pairs = zip(first["seconds"], other["seconds"], strict=True)
    ratios = [theirs / ours for ours, theirs in pairs]
    names = [first["name"], other["name"]]
    return {"of": names, "ratio": median(ratios), "ratios": ratios}
