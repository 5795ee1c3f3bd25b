"""What is measured in turns, and how speeds compare."""

from collections.abc import Callable
from statistics import median


def in_turns(actions: list[Callable], rounds: int) -> list[list]:
    """What each action returned, in every round. A round is all of them, one after the other.

    So what else the machine does meets all of them.
    """
    results = [[] for _ in actions]
    for _ in range(rounds):
        for action, returned in zip(actions, results):
            returned.append(action())
    return results


def compare(first: dict, other: dict) -> dict:
    """How many times as fast the first row is as the other: the median of the rounds' ratios.

    Both have a name and the seconds of each round, for the same work.
    """
    ours = first["seconds"]
    theirs = other["seconds"]
    ratios = [their_time / our_time for our_time, their_time in zip(ours, theirs, strict=True)]
    names = [first["name"], other["name"]]
    return {"of": names, "ratio": median(ratios), "ratios": ratios}
