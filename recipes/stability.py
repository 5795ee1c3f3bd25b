"""The stability gap: does going on with another kind of text first cost skill, and is it the text that does it?

Paper       Guo et al. 2024, arXiv:2406.14833.
Command     python recipes/stability.py
Hardware    one core, no GPU; 12 minutes of its time (2026-11-27, AMD EPYC), without the bases.
Claim       OpenLLaMA-3B on 50 B medical tokens: accuracy on medical and general tasks falls at first, then recovers,
            while medical perplexity falls from the start. Less of a gap, and more in the end, have: a subset of proper
            size for several epochs; its best part, of lowest perplexity under n-grams of a reference; the mixture of
            pretraining. Medical average 36.2 before, 37.4 after all tokens once, 40.7 with the three.
Miniature   The laptop's bases go on from the standard library to PyTorch's own code (recipes/subsets.py), the rate up
            over 12 steps to half the base's peak, then a cosine; the moments are fresh. Arms and measures: ABOUT.
Predicted   before the run, all but the last as in the paper: A dips in both kinds and comes back, while the domain's
            bits fall; B, C, D dip less in the domain; D ends above A in both. A dips more than Z, so that it is the
            text. Z's bits of its own text rise at first, so that some of every dip is the rate and the fresh moments.
Result      A dips by 4.7 points in the domain (+1.1 to +8.3; by seed +6.5, +4.7, +3.0) while its bits fall, and by 3.2
            in the library (+1.2 to +5.1; +2.8, +3.5, +3.2): confirmed. Of the 4.7, 3.7 are more than Z's (+0.2 to +7.1;
            +5.5, +3.8, +1.7), confirmed; of the 3.2, 1.5 (-0.5 to +3.5), not decided: twice the questions might. Z's
            bits rise by 0.016 (+0.012 to +0.021): confirmed. Whether A comes back is not decided (end less dip -0.3,
            -1.8 to +1.1): its curve is flat when 120 steps end, so a longer run would tell. B, C, D dip more, by 5.6,
            10.3, 4.3, and D ends 4.8 and 6.6 below A: refuted in direction, for a subset that is not of proper size: on
            11 thousand tokens bits rise too, as the paper's smallest overfits. C's may be worst as it is boilerplate.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from skills import Skills, curve, measured
from study import OUT, Report, base, difference, text, train
from subsets import domain, subset
from weights import part_of

from lib.cli import run_command
from model import load

HERE = OUT / "stability"
STEPS, TOKENS = (0, 10, 20, 40, 120), 1024  # the steps that are measured; tokens of a step
ARMS = {  # subsets by weight
    "A all once": {"new": 1},
    "B random part": {"random": 1},
    "C best part": {"best": 1},
    "D best, mixed": {"best": 0.82, "stdlib": 0.18},
    "Z control": {"stdlib": 1},
}
FLAGS = "--learning_rate 1e-3 --warmup 0.1 --batch_size 4 --eval_tokens 2048 --save_every 10 --keep_every 10".split()
ABOUT = """Does a model that goes on with another kind of text first lose skill, and is it the text that does it (Guo et
al. 2024, arXiv:2406.14833)? A LLaMA-2 model of 1.3 M parameters, pretrained on Python's standard library (*stdlib*),
goes on for {steps} steps of {tokens:,} tokens with PyTorch's own code (*torch*, the domain). Arms differ in the text of
these steps. *A*: all new code, once. *B*: a random part of it of a tenth of these tokens, for about 11 epochs. *C*: as
much, of the passages that n-grams of a reference hold for likeliest. *D*: 82 % C, 18 % stdlib. *Z*, the control: stdlib
alone. Columns are steps, 0 before the first; means of {seeds} seeds. *Right*: per cent of right answers to {questions}
questions, which of four pieces goes on a held-out text (chance 25); higher is better. *Bits*: bits a byte of such
texts; lower is better. A *dip*: points of right answers lost from step 0 to the lowest step, which is chosen on the
other half of the questions. *Loss in the end*: the same to the last step."""


@dataclass
class Config:
    """The stability gap in miniature, with a report."""

    seeds: int = 3
    questions: int = 600  # of each kind


def moved(first, model) -> list[float]:
    """The mean relative change of the matrices in the lower and in the upper half of the layers."""
    changes, before = ([], []), dict(first.named_parameters())
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and weight.dim() == 2:
            change = (weight - before[name]).norm() / before[name].norm()
            changes[part_of(name, model.config.num_layers, 2)].append(float(change.detach()))
    return [float(np.mean(each)) for each in changes]


def continued(seed: int, arm: str, skills: Skills) -> dict[int, dict[str, np.ndarray]]:
    """What is measured of an arm after each of STEPS."""
    parts = [f"{subset(name, HERE, STEPS[-1] * TOKENS // 10)}:{weight}" for name, weight in ARMS[arm].items()]
    name, first = f"{arm[0]}_{seed}", load(base(seed))
    words = ("--init_from", base(seed), "--data", *parts, "--seed", seed, "--steps", STEPS[-1], *FLAGS)
    run = train(HERE / name, *words)
    start = measured(HERE / f"base_{seed}.json", {0: base(seed)}, skills.of)
    more = curve(HERE / f"{name}.json", run, STEPS[1:], lambda now: skills.of(now) | {"moved": moved(first, now)})
    return start | more


def dip(right: np.ndarray) -> np.ndarray:
    """Of (steps, questions): how far each is below its start at the step where the other half of them is lowest, so
    that luck with questions alone makes a dip of 0 in the mean."""
    found = np.empty(right.shape[1])
    for half in (0, 1):
        lowest = right[:, 1 - half :: 2].mean(1).argmin()
        found[half::2] = right[0, half::2] - right[lowest, half::2]
    return found


def tabled(report: Report, curves: dict[str, list[dict]]):
    for name, unit in (("torch right", 100), ("stdlib right", 100), ("torch bits", 1), ("stdlib bits", 1)):
        rows = [[arm, *(unit * np.mean([one[step][name] for one in seeds]) for step in STEPS)]
                for arm, seeds in curves.items()]  # fmt: skip
        report.table([name, *map(str, STEPS)], rows)
    halves = {arm: np.mean([one[STEPS[1]]["moved"] for one in seeds], 0) for arm, seeds in curves.items()}
    ratios = ", ".join(f"{arm[0]} {lower / upper:.2f}" for arm, (lower, upper) in halves.items())
    report.say(f"Change of matrices by step {STEPS[1]}, in their own norms, lower half of layers over upper: {ratios}.")


def judged(report: Report, curves: dict[str, list[dict]]):
    """The predictions at the head of this file."""
    first, last = STEPS[1], STEPS[-1]

    def at(arm: str, name: str, step: int) -> np.ndarray:
        return next(np.array([one[step][name] for one in seeds]) for full, seeds in curves.items() if full[0] == arm)

    def dips(arm: str, name: str) -> np.ndarray:
        steps = np.stack([at(arm, name, step) for step in STEPS], 1)  # (seeds, steps, questions)
        return np.array([dip(one) for one in steps])

    def points(prediction: str, before: np.ndarray, after: np.ndarray, sign: int):
        report.judge(prediction, difference(before, after).times(100), sign, "points")

    for kind in ("torch", "stdlib"):
        right = f"{kind} right"
        points(f"A dips in {kind}", 0 * dips("A", right), dips("A", right), 1)
        loss = at("A", right, 0) - at("A", right, last)
        points(f"and comes back: loss in the end less dip is negative ({kind})", dips("A", right), loss, -1)
        points(f"A dips more than Z in {kind}", dips("Z", right), dips("A", right), 1)
        points(f"D ends above A in {kind}", at("A", right, last), at("D", right, last), 1)
    for arm in "BCD":
        points(f"{arm} dips less than A in torch", dips("A", "torch right"), dips(arm, "torch right"), -1)
    for kind, arm, words, sign in (("torch", "A", "fall", -1), ("stdlib", "Z", "rise", 1)):
        found = difference(*(at(arm, f"{kind} bits", step) for step in (0, first)))
        report.judge(f"bits of {kind} under {arm} {words} in the first {first} steps", found, sign, "bits a byte")


def main(config: Config):
    report = Report("stability", "The stability gap of continued pretraining")
    kinds = {"torch": domain(HERE), "stdlib": text()}
    skills = Skills(base(0), kinds, HERE, config.questions)
    curves = {arm: [continued(seed, arm, skills) for seed in range(config.seeds)] for arm in ARMS}
    report.about(ABOUT.format(steps=STEPS[-1], tokens=TOKENS, **vars(config)))
    tabled(report, curves)
    judged(report, curves)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
