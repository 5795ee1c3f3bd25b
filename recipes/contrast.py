"""Contrastive decoding: does what a model likes more than a weaker one choose better?

Paper       O'Brien and Lewis 2023, arXiv:2309.09117, after Li et al. 2022, arXiv:2210.15097.
Command     python recipes/contrast.py
Hardware    two cores, no GPU; MINUTES_HERE
Claim       LLaMA-65B with a 1.5B amateur and beta 0.5: HellaSwag 84.2 to 87.4, but ARC-E 79.1 to 79.0 and MMLU 63.5
            to 63.4; an early checkpoint of a 7B is a good amateur (56.8 of GSM8K), the finished one a bad one (49.9).
Miniature   The laptop's model, as expert, against its own steps 150 and 450 and a model of two layers, 64 wide.
            Questions of recipes/cloze.py, 1,000 of each kind, scored by (1 + beta) log p_expert - beta log p_amateur.
            Three seeds; a model of this size cannot reason, so this tests the mechanism and no benchmark.
Predicted   before the run: better on `written`, as HellaSwag's wrong endings were written by a model; not better on
            `other`; step 150 a better amateur than step 450; beta 1 worse than 0.5.
Result      RESULT_HERE
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import OUT, Report, base, difference, once, text, train

from lib.cli import run_command

KINDS = ("other", "same", "written")
BETAS = (0.25, 0.5, 1.0)
HERE = OUT / "contrast"


@dataclass
class Config:
    """Contrastive decoding as a score of choices, with a report."""

    seeds: int = 3
    questions: int = 1000  # of each kind


def small(seed: int) -> Path:
    shape = "--num_layers 2 --dim 64 --num_heads 4 --ffn_dim 176 --steps 400".split()
    return train(HERE / f"small_{seed}", "--data", text(), "--seed", seed, *shape)


def models_of(seed: int) -> dict[str, Path]:
    """The expert and its three amateurs."""
    expert = base(seed)
    steps = {f"step {step}": expert / f"step_{step:08d}" for step in (150, 450)}
    return {"expert": expert} | steps | {"2 layers": small(seed)}


def questions_of(seed: int, config: Config) -> Path:
    """All kinds in one file, each a subject; the wrong answers of `written` are another seed's."""
    made = HERE / f"questions_{seed}.jsonl"
    if not made.exists():
        parts = []
        for kind in KINDS:
            part = HERE / f"{kind}_{seed}.jsonl"
            more = ("--writer", base((seed + 1) % config.seeds)) if kind == "written" else ()
            sizes = ("--count", config.questions, "--context", 48, "--size", 12)
            parts.append(once(part, "recipes/cloze.py", "--data", text(), "--kind", kind, *sizes, *more, "--out", part))
        made.write_text("".join(part.read_text() for part in parts))
    return made


def scores_of(seed: int, name: str, model: Path, questions: Path) -> list[dict]:
    """The records of eval.py: a line a question, with the log-probability of each choice."""
    out = HERE / f"{name.replace(' ', '_')}_{seed}.json"
    once(out, "eval.py", "--model", model, "--task", "choices", "--data", questions, "--out", out)
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


def right(expert: list[dict], amateur: list[dict], beta: float, kind: str) -> list[bool]:
    """Whether the contrast's best choice is the right one, of each question of a kind.

    >>> e = [{"subject": "x", "logprobs": [-1.0, -1.2], "gold": 1}]
    >>> a = [{"subject": "x", "logprobs": [-1.0, -2.0], "gold": 1}]
    >>> right(e, a, 0.0, "x"), right(e, a, 0.5, "x")
    ([False], [True])
    """
    found = []
    for e, a in zip(expert, amateur):
        if e["subject"] == kind:
            scores = (1 + beta) * np.array(e["logprobs"]) - beta * np.array(a["logprobs"])
            found.append(bool(scores.argmax() == e["gold"]))
    return found


def choose(report: Report, config: Config):
    """The questions: accuracy by kind, amateur and beta."""
    records = {}
    for seed in range(config.seeds):
        questions = questions_of(seed, config)
        for name, model in models_of(seed).items():
            records[name, seed] = scores_of(seed, name, model, questions)
    amateurs = [name for name, seed in records if seed == 0 and name != "expert"]

    def arm(kind: str, amateur: str, beta: float) -> list[list[bool]]:
        return [right(records["expert", s], records[amateur, s], beta, kind) for s in range(config.seeds)]

    rows = []
    for kind in KINDS:
        for amateur in amateurs:
            alone = [right(records[amateur, s], records[amateur, s], 0.0, kind) for s in range(config.seeds)]
            accuracies = [100 * np.mean(arm(kind, amateur, beta)) for beta in (0.0, *BETAS)]
            gain = difference(arm(kind, amateur, 0.0), arm(kind, amateur, 0.5)).times(100)
            rows.append([kind, amateur, 100 * np.mean(alone), *accuracies, gain])
    header = ["wrong answers", "amateur", "amateur alone", *(f"beta {beta:g}" for beta in (0, *BETAS)), "0.5 less 0"]
    report.say(f"Right choices in per cent (chance 25), {config.questions:,} questions a kind, {config.seeds} seeds.")
    report.table(header, rows)

    def judge(prediction: str, first, second, sign: int):
        report.judge(prediction, difference(first, second).times(100), sign, "points")

    early, late = "step 150", "step 450"
    judge("better on `written`, step 150", arm("written", early, 0), arm("written", early, 0.5), 1)
    judge("not better on `other`, step 150", arm("other", early, 0), arm("other", early, 0.5), -1)
    judge("step 150 better than 450 on `written`", arm("written", late, 0.5), arm("written", early, 0.5), 1)
    judge("beta 1 worse than 0.5 on `written`, step 150", arm("written", early, 0.5), arm("written", early, 1), -1)


def main(config: Config):
    report = Report("contrast", "Contrastive decoding: choosing")
    choose(report, config)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
