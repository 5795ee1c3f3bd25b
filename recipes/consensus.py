"""The consensus game: do a generator and a discriminator choose better once they agree?

Paper       Jacob et al. 2023, arXiv:2310.09139 (equilibrium ranking).
Command     python recipes/consensus.py
Hardware    two cores, no GPU; 13 minutes beside other work (2026-11-27, AMD EPYC), without the bases.
Claim       MMLU with LLaMA-7B: the generator G 30.4, the game ER-G 39.4 and ER-D 39.9, but also 35.8 by MI*, the
            product of both players' first policies, without a game. ARC-E: 68.2, 71.6, 71.5, 71.0.
Miniature   The laptop's model, fine-tuned by recipes/judging.py to answer and to judge: G and D. Questions about 800
            functions and classes in a wording never trained, four answers each, three seeds. What it learns (facts with
            short answers, two epochs, judging in eight wordings and answering in three) was chosen by questions in
            another wording (--split dev), such that G and D differ and each is right on 50 to 80 %.
Predicted   before any run: ER-D above G and above D; ER-D within 1 point of MI*; the players agree more often after
            the game; with noise in place of one of them, ER within 2 points of the other's first policy (SC, D).
Result      Right, mean of three seeds: G 60.9 %, D 55.6, ER-G 76.2, ER-D 74.6, but MI* 77.4, and SC alone 81.7. ER-D
            is 13.7 points above G (+10.9 to +16.6), 19.0 above D (+17.4 to +20.6); ER-G and ER-D agree on 96.7 % of
            questions, SC and D on 55.3 (+41.4, +39.4 to +43.5): confirmed in direction. ER-D is 2.8 below MI* (-3.5 to
            -2.1): within 1 is refuted; normalising brings all the gain, and 5,000 rounds lose some of it. With noise
            for D, ER-G is 25.8 below SC; with noise for G, ER-D is 9.7 below D: refuted, a player follows noise too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judging import asked, questions, subjects_of, tuned
from mini import HELD_OUT
from study import OUT, Difference, Report, difference

from lib.cli import run_command
from lib.statistics import mcnemar

HERE = OUT / "consensus"
OF_VERDICTS, OF_ANSWERS = 1, 2  # axes of arrays (questions, verdicts, answers)
ROUNDS = 5000
WAYS = f"""G is P(answer | correct) a token, SC the generator's first policy, which is G against P(answer | incorrect),
D the discriminator's first policy, MI = G D, MI* = SC D, ER-G and ER-D the two policies after {ROUNDS} rounds."""


@dataclass
class Config:
    """The consensus game in miniature, with a report."""

    seeds: int = 3
    subjects: int = 800  # functions and classes
    split: Literal["dev", "test"] = "test"  # whose questions


# ---- the game ----


def shares(values: np.ndarray, axis: int) -> np.ndarray:
    return values / values.sum(axis, keepdims=True)


def equilibrium(generator, discriminator, rounds: int = ROUNDS, weight: float = 0.1, rate: float = 0.1):
    """Both players' policies after so many rounds, from P(answer | verdict) and P(verdict | answer).

    All are (questions, verdicts, answers). No rounds give the first policies; weight is the paper's lambda, rate eta.
    """
    first_g = shares(shares(generator, OF_VERDICTS), OF_ANSWERS)
    first_d = shares(shares(discriminator, OF_ANSWERS), OF_VERDICTS)
    g, d = first_g, first_d
    sum_g, sum_d = np.zeros_like(g), np.zeros_like(d)
    for t in range(1, rounds + 1):
        sum_g += g
        sum_d += d
        heat = 1 / (rate * t) + weight
        g = shares(np.exp((sum_d / (2 * t) + weight * np.log(first_g)) / heat), OF_ANSWERS)
        d = shares(np.exp((sum_g / (2 * t) + weight * np.log(first_d)) / heat), OF_VERDICTS)
    return g, d


def noise(probabilities: np.ndarray, seed: int) -> np.ndarray:
    """The same numbers, but which answer to a question has which is drawn."""
    order = np.random.default_rng(seed).random(probabilities[:, :1].shape).argsort(OF_ANSWERS)
    return np.take_along_axis(probabilities, order, OF_ANSWERS)


def chosen(g: np.ndarray, d: np.ndarray, seed: int, rounds: int = ROUNDS) -> dict[str, np.ndarray]:
    """The answer to each question by every way to rank them, also with noise in place of a player."""
    (first_g, first_d), (last_g, last_d) = equilibrium(g, d, 0), equilibrium(g, d, rounds)
    scores = {"G": g, "SC": first_g, "D": first_d, "MI": g * d, "MI*": first_g * first_d}
    scores |= {"ER-G": last_g, "ER-D": last_d}
    scores["ER-G, D is noise"], _ = equilibrium(g, noise(d, seed), rounds)
    _, scores["ER-D, G is noise"] = equilibrium(noise(g, seed), d, rounds)
    return {name: values[:, 0].argmax(1) for name, values in scores.items()}


# ---- the report ----


def within(report: Report, prediction: str, found: Difference, bound: float):
    far, near = max(abs(found.low), abs(found.high)), min(abs(found.low), abs(found.high))
    outside = found.low * found.high > 0 and near > bound
    words = "confirmed" if far < bound else "refuted" if outside else "not decided at this size"
    report.say(f"- Predicted: {prediction}, within {bound:g} points. Found: {found} points. **{words}**")


def compare(report: Report, right: dict[str, np.ndarray]):
    """McNemar's test of ER-D against its rivals, by seed; values (seeds, questions) are 0 or more."""
    best = max(("G", "SC", "D"), key=lambda name: right[name].mean())
    rows = []
    for rival in (best, "MI*"):
        for seed, change in enumerate(right["ER-D"] - right[rival]):
            gained, lost = int((change > 0).sum()), int((change < 0).sum())
            rows.append([rival, seed, gained, lost, mcnemar(gained, lost)])
    report.say(f"Questions that ER-D alone or a rival alone has right. The best single score (G, SC, D) is {best}.")
    report.table(["rival", "seed", "ER-D alone", "rival alone", "McNemar's p"], rows)


def tell(report: Report, picks: dict[str, np.ndarray], gold: np.ndarray):
    """Tables and verdicts of the answers that were chosen, arrays (seeds, questions)."""
    right = {name: 100.0 * (values == gold) for name, values in picks.items()}
    pairs = (("G", "D"), ("SC", "D"), ("ER-G", "ER-D"))
    alike = {f"{a}, {b}": 100.0 * (picks[a] == picks[b]) for a, b in pairs}
    for title, table in (
        (f"Right answers in per cent, of {len(gold):,} questions; chance is 25. {WAYS}", right),
        ("Questions in per cent to which two of them choose the same answer.", alike),
    ):
        report.say(title)
        header = ["", *(f"seed {seed}" for seed in range(len(picks["G"]))), "mean"]
        report.table(header, [[name, *map(float, v.mean(1)), float(v.mean())] for name, v in table.items()])
    compare(report, right)
    for rival in ("G", "D"):
        report.judge(f"ER-D above {rival}", difference(right[rival], right["ER-D"]), 1, "points")
    report.judge("more agreement after the game", difference(alike["SC, D"], alike["ER-G, ER-D"]), 1, "points")
    within(report, "ER-D as MI*", difference(right["MI*"], right["ER-D"]), 1)
    within(report, "ER-G as SC where D is noise", difference(right["SC"], right["ER-G, D is noise"]), 2)
    within(report, "ER-D as D where G is noise", difference(right["D"], right["ER-D, G is noise"]), 2)


def main(config: Config):
    subjects = subjects_of(config.subjects)
    rows = list(questions(subjects, HELD_OUT[config.split], 3))
    report, runs = Report("consensus", "The consensus game"), []
    for seed in range(config.seeds):
        model = tuned(seed, subjects, answered=3, epochs=2, out=HERE)
        runs.append(chosen(*asked(model, rows, HERE / f"{config.split}_{seed}"), seed))
    picks = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    tell(report, picks, np.array([row["answer"] for row in rows]))
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
