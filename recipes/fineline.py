"""The Fine Line: which early measure of a training run tells how the run will end?

Paper       Yang et al. 2024, arXiv:2404.01204.
Command     python recipes/fineline.py
Hardware    one core, no GPU; 10 minutes of its time (2026-11-27, AMD EPYC).
Claim       Over the checkpoints of models of 7 to 67 B parameters: tasks of one domain move together, one domain's
            course tells of another's, and early checkpoints of small models foretell the final order for several groups
            of tasks (no figures are quoted here).
Miniature   Eight runs that differ in one thing each: mixture of the standard library and PyTorch's code (3), rate (3),
            width (2), depth (2), seed (2); 64 wide, 400 steps of 1,024 tokens at a constant rate, since decay changes
            the order at the end. Measured at six steps, of each kind of text: bits a byte, the share of tokens guessed,
            and right answers to 600 questions of multiple choice. Foretelling is Spearman's correlation over the runs,
            of a measure at a step with one at the end. The two are measured on different halves of the items, so that
            the luck of an item is not taken for foretelling; p is exact, of all orders of the runs.
Predicted   before the run: at 20 % of training, bits foretell the final bits above 0.8; accuracy of choices its own
            final value below 0.8; bits foretell the final accuracy better than accuracy itself does. Increments of
            measures go together more within a kind of text than across.
Result      No prediction is decided by eight runs. In brackets is the jackknife over them; it was put in the place of
            drawing items after the run, since that leaves out the luck of the runs (it refuted the first prediction and
            confirmed the second). At 20 % bits foretell final bits with 0.68 in the mean of both kinds (stdlib 0.83, p
            0.006; torch 0.54, p 0.079), less 0.8 -0.12 (-0.56 to +0.33): a hundred runs could tell. Accuracy foretells
            itself with 0.37 (p 0.064, 0.162), less 0.8 -0.43 (-0.87 to +0.01): ten might. Bits less accuracy as a sign
            of final accuracy: -0.30 (-1.03 to +0.43). Increments within less across: +0.06 (-0.03 to +0.15): twenty
            might. Runs end at 26.5 to 33 % right, chance being 25, and even at the last step two halves of the
            questions order them alike with only 0.70 and 0.57, of the windows by bits with 0.93 and 0.98: more
            questions and longer runs would help. One set of runs, of which one is another seed; not three.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from foretelling import Means, by_chance, estimate, foretold, halved, together
from skills import Skills, curve
from study import OUT, Report, text, train
from subsets import domain

from lib.cli import run_command

HERE = OUT / "fineline"
LAST, STEPS = 400, (40, 80, 120, 200, 280, 400)
EARLY = STEPS.index(LAST // 5)
RUNS = {  # the torch share of the data, and flags
    "the first": (0.5, ""),
    "less torch": (0.2, ""),
    "more torch": (0.8, ""),
    "rate / 4": (0.5, "--learning_rate 1e-3"),
    "rate x 2": (0.5, "--learning_rate 8e-3"),
    "96 wide": (0.5, "--dim 96 --ffn_dim 256"),
    "2 layers": (0.5, "--num_layers 2"),
    "seed 1": (0.5, "--seed 1"),
}
KINDS, MEASURES = ("stdlib", "torch"), ("bits", "guessed", "right")
FLAGS = (
    f"--steps {LAST} --save_every 40 --keep_every 40 --batch_size 4 --eval_tokens 2048 --schedule constant "
    "--learning_rate 4e-3 --dim 64 --num_layers 4 --num_heads 4 --ffn_dim 176 --seed 0"
)
ABOUT = """Which early measure of a training run tells how the run will end (The Fine Line, Yang et al. 2024,
arXiv:2404.01204)? {runs} LLaMA-2 models, the first of 4 layers, 64 wide, are trained from nothing for {last} steps of
1,024 tokens on Python's standard library (*stdlib*) and PyTorch's own code (*torch*), half each. Every other run
differs from *the first* in one thing: a share of torch of 0.2 (*less*) or 0.8 (*more*), a learning rate a quarter or
twice as high, 96 wide, 2 layers, another seed. Measured on held-out text of each kind: *bits* a byte (lower is better),
*guessed*, the share of tokens that are the model's likeliest, and *right*, the share of {questions} questions answered
rightly, which of four pieces goes on a text (chance 0.25); of these two higher is better."""
FORETOLD = """A measure (*from*) at a step (the columns) *foretells* one *in the end*, at step {last}, as well as it
orders the runs alike: Spearman's correlation over the {runs} runs, 1 is the same order, 0 no relation. Signs are such
that higher is better in all. The two are measured on different halves of the items, so the last column need not be 1.
*p*: what share of all orders of the runs does as well. *Above 0.8*: the step from which on it stays above. Predictions
are of means over stdlib and torch: at 20 % of training, step {early}, where *accuracy* is right; and of *increments*,
what measures gain from a step to the next, less the mean of all runs. Intervals are the jackknife's over the runs. This
is one set of runs, so "by seed" repeats the figure."""


@dataclass
class Config:
    """Which early measure foretells the end, in miniature, with a report."""

    questions: int = 600  # of each kind


def trained(name: str) -> Path:
    """A run of RUNS; its own flags go in place of those of FLAGS."""
    share, more = RUNS[name]
    words = f"{FLAGS} {more}".split()
    flags = dict(zip(words[::2], words[1::2]))
    data = (f"{text()}:{1 - share:g}", f"{domain(HERE)}:{share:g}")
    return train(HERE / f"run_{list(RUNS).index(name)}", "--data", *data, *itertools.chain(*flags.items()))


def of_kinds(early: str, late: str) -> Callable[[Means], float]:
    """The mean over the kinds of what a measure foretells at 20 % of training."""
    return lambda means: float(np.mean([foretold(means, f"{k} {early}", f"{k} {late}", EARLY) for k in KINDS]))


def pairs_of(within: bool) -> list[tuple[str, str]]:
    """Two different measures, of one kind or of two."""
    names = [(kind, measure) for kind in KINDS for measure in MEASURES]
    found = [pair for pair in itertools.combinations(names, 2) if pair[0][1] != pair[1][1]]
    return [(" ".join(a), " ".join(b)) for a, b in found if (a[0] == b[0]) == within]


def told(report: Report, values: dict[str, np.ndarray]):
    means, rows = halved(values), []
    for kind, late in itertools.product(KINDS, ("bits", "right")):
        for early in dict.fromkeys((late, *MEASURES)):
            names, steps = (f"{kind} {early}", f"{kind} {late}"), range(len(STEPS))
            found = [foretold(means, *names, step) for step in steps]
            ps = [by_chance(means, *names, step) for step in steps]
            since = next((STEPS[step] for step in steps if min(found[step:]) > 0.8), "never")
            rows.append([names[1], early, *(f"{rho:.2f} (p {p:.3f})" for rho, p in zip(found, ps)), since])
    report.about(FORETOLD.format(runs=len(RUNS), last=LAST, early=STEPS[EARLY]))
    report.table(["in the end", "from", *map(str, STEPS), "above 0.8"], rows)
    for prediction, measure, sign in (
        ("at 20 % bits foretell final bits: correlation less 0.8", lambda m: of_kinds("bits", "bits")(m) - 0.8, 1),
        ("at 20 % accuracy foretells itself: less 0.8", lambda m: of_kinds("right", "right")(m) - 0.8, -1),
        ("bits foretell final accuracy better than accuracy does",
         lambda m: of_kinds("bits", "right")(m) - of_kinds("right", "right")(m), 1),
        ("increments go together within a kind more than across",
         lambda m: together(m, pairs_of(True)) - together(m, pairs_of(False)), 1),
    ):  # fmt: skip
        report.judge(prediction, estimate(values, measure), sign, "of a correlation")


def main(config: Config):
    report = Report("fineline", "The Fine Line: what early measures foretell")
    kinds = {"stdlib": text(), "torch": domain(HERE)}
    skills = Skills(trained("the first"), kinds, HERE, config.questions)
    curves = {name: curve(HERE / f"{number}.json", trained(name), STEPS, skills.of) for number, name in enumerate(RUNS)}
    names = [f"{kind} {measure}" for kind in KINDS for measure in MEASURES]
    rows = [[name, *(float(np.mean(found[LAST][each])) for each in names)] for name, found in curves.items()]
    report.about(ABOUT.format(runs=len(RUNS), last=LAST, questions=config.questions))
    report.say(f"In the end, after {LAST} steps:")
    report.table(["run", *names], rows)
    values = {name: np.array([[found[step][name] for step in STEPS] for found in curves.values()]) for name in names}
    told(report, {name: -each if name.endswith("bits") else each for name, each in values.items()})
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
