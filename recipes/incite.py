"""Did fp16 cost RedPajama-INCITE its likelihoods? Arithmetic against arithmetic, and likelihood against writing.

Paper       RedPajama-INCITE, Together 2023; data in Weber et al. 2024, arXiv:2411.12372.
Command     python recipes/incite.py
Hardware    one core, no GPU; 18 minutes of its time (2026-11-27, AMD EPYC), trainings among them, without the bases
            and the chat models of recipes/attention.py.
Claim       The models were trained in fp16, on V100s, which have no bf16. A conjecture told with them (its wording was
            not checked here): this costs answers that are scored by likelihood, and written ones less.
Miniature   The laptop's model, 300 steps of 1,024 tokens from the same first weights, in fp32, bf16, fp16 with a loss
            multiplied by 4,096 and fp16 without that, by rounding what would be stored (recipes/rounded.py). Measured
            in fp32: bits a byte of 256 validation windows; 600 questions of recipes/cloze.py by likelihood; the next
            word of the same texts, written. Then the chat models of recipes/attention.py at seven checkpoints: do
            likelihood and writing, the same questions, rank them alike? Three seeds.
Predicted   before the run: fp16 with a scaled loss is within 0.01 bits a byte of bf16, and bf16 of fp32; without a
            scale it is worse than with, and more than a tenth of the logits' gradient is rounded to 0; fp16, scaled, is
            less than 3 points below bf16 by likelihood and by writing, so leaves no gap to explain; both measures rank
            checkpoints alike (Kendall's tau above 0).
Result      Bits a byte: fp32 2.414, bf16 2.417, fp16 with a scale 2.413, without 2.413. Which is lower changes with the
            seed: fp16 with a scale less bf16, less the margin, -0.0138 (-0.0150 to -0.0126; by seed -0.0468, +0.0157,
            -0.0102), bf16 less fp32 likewise -0.0072 (-0.0088 to -0.0057; +0.0244, -0.0382, -0.0080), without a scale
            less with -0.0000 (-0.0017 to +0.0016; +0.0155, -0.0278, +0.0122): none is decided, and at this spread 0.01
            asks for some forty seeds. Without a scale 73.6 % of the logits' gradient is rounded to 0 (73.3, 74.0,
            73.4), with 4,096 0.7 %: confirmed; of the weights' gradient 0.9 %, perhaps why it does no harm (not
            tested). Of a gap by likelihood or writing nothing can be said, as fp32 itself is right in 27.6 % where
            chance is 25, and writes 0.06 % of next words; nine times as many tokens, as the bases had, could. Both
            measures rank checkpoints alike, tau +0.81 (+0.62 to +0.87; +0.86, +0.90, +0.67): confirmed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention
from measures import SCALES, agreement, answered, by_likelihood, flushed, next_words, window_bits
from mini import read_lines
from study import OUT, Report, base, difference, once, text, train, verdict

from data import Dataset
from lib.cli import run_command
from sample import load_model

HERE = OUT / "incite"
ARMS = {"fp32": (23, 1), "bf16": (7, 1), "fp16, scaled": (10, 4096), "fp16": (10, 1)}  # mantissa, scale of the loss
ABOUT = """Did training in fp16 cost RedPajama-INCITE its likelihoods (data in Weber et al. 2024, arXiv:2411.12372)? A
LLaMA-2 model of 1.3 M parameters is trained for {steps} steps of 1,024 tokens on Python's standard library, from the
same first weights in four arithmetics: what would be stored is rounded to *fp32*, *bf16*, or fp16, with the loss times
{scale:,} before gradients are rounded (*fp16, scaled*) or not (*fp16*). All are measured in fp32, on held-out text,
{seeds} seeds. *Bits a byte* of {windows} windows: lower is better, mean, then by seed. *Right by likelihood*: per cent
of {questions} questions, which of four pieces goes on a text (chance 25). *Next word right*: per cent of the same texts
whose next word it writes. Of both, higher is better. A margin (0.01 bits, 3 points) is part of a difference where a
prediction names it."""


@dataclass
class Config:
    """RedPajama-INCITE's question in miniature, with a report."""

    seeds: int = 3
    steps: int = 300
    windows: int = 256
    questions: int = 600   # to the models of each arithmetic
    asked: int = 200       # to the chat models


def arm_of(name: str, seed: int, steps: int) -> Path:
    mantissa, scale = ARMS[name]
    flags = f"--variant recipes/rounded.py --mantissa {mantissa} --loss_scale {scale} --dtype fp32 --batch_size 4"
    out = HERE / f"{name.replace(', ', '_')}_{seed}"
    return train(out, "--data", text(), "--seed", seed, "--steps", steps, *flags.split())


def by_arithmetic(report: Report, config: Config):
    """Four arithmetics: bits a byte, likelihood, the next word."""
    asked, data = HERE / "questions.jsonl", Dataset(text(), "val", 256)
    sizes = ("--count", config.questions, "--context", 48, "--size", 12)
    once(asked, "recipes/cloze.py", "--data", text(), "--kind", "other", *sizes, "--out", asked)
    found = {}
    for name in ARMS:
        for seed in range(config.seeds):
            run = arm_of(name, seed, config.steps)
            out = run.with_suffix(".json")
            model, tokenizer = load_model(str(run))
            words = next_words(model, tokenizer, read_lines(asked))
            found[name, seed] = window_bits(model, data, config.windows), by_likelihood(run, asked, out), words

    def arm(name: str, measure: int) -> np.ndarray:
        return np.array([found[name, seed][measure] for seed in range(config.seeds)])

    rows = []
    for name in ARMS:
        bits, *rights = (arm(name, measure).mean(1) for measure in range(3))
        by_seed = ", ".join(f"{each:.4f}" for each in bits)
        rows.append([name, f"{bits.mean():.4f}", by_seed, *(100 * float(each.mean()) for each in rights)])
    report.about(ABOUT.format(scale=ARMS["fp16, scaled"][1], **vars(config)))
    report.table(["arithmetic", "bits a byte", "by seed", "right by likelihood", "next word right"], rows)
    for first, second in (("bf16", "fp16, scaled"), ("fp32", "bf16")):
        lost = difference(arm(first, 0), arm(second, 0) - 0.01)
        report.judge(f"{second} less {first}, less 0.01, is below 0", lost, -1, "bits a byte")
    lost = difference(arm("fp16, scaled", 0), arm("fp16", 0))
    report.judge("fp16 without a scale is worse than with", lost, 1, "bits a byte")
    for measure, words, chance in ((1, "by likelihood", 0.25), (2, "by writing", 0)):
        room = difference(np.full_like(arm("fp32", measure), chance), arm("fp32", measure) - 0.03).times(100)
        if verdict(room, 1) != "confirmed in direction":
            report.say(f"- Of fp16 {words} nothing can be said: fp32 itself, less chance, less 3, is {room} points.")
            continue
        gap = difference(arm("bf16", measure), arm("fp16, scaled", measure) + 0.03).times(100)
        report.judge(f"fp16, scaled, less bf16, {words}, plus 3, is above 0", gap, 1, "points")


def by_part(report: Report, config: Config):
    """What fp16 would round to 0 of the gradient of the laptop's model when it is trained."""
    data = Dataset(text(), "train", 256)
    found = [flushed(load_model(str(base(seed)))[0], data, 4) for seed in range(config.seeds)]
    rows = [[part, *np.mean([each[part] for each in found], 0).tolist()] for part in found[0]]
    report.say("Gradients that fp16 would round to 0, per cent, of a step's mean loss over 1,024 targets, in the fully "
               "pretrained model of each seed: by what they are of, and by what the loss is multiplied with before.")
    report.table(["of", *(f"loss times {scale:,}" for scale in SCALES)], rows)
    seeds = ", ".join(f"{each['logits'][0]:.1f}" for each in found)
    report.say(f"- Predicted: of the logits, without a scale, more than 10 %. Found, by seed: {seeds}.")


def by_protocol(report: Report, config: Config):
    """Likelihood and writing on the same questions, at checkpoints of chat models."""
    runs = [attention.model_of(128, "chat", seed) for seed in range(config.seeds)]
    lines = [row for row in read_lines(attention.HERE / "test.jsonl") if row["subject"] == "new wording"]
    found = [answered(run, lines[: config.asked], HERE / "asked.jsonl") for run in runs]
    values = np.array([list(each.values()) for each in found], float)  # by seed, step, measure
    report.say(f"Chat models (these, tuned on chats about 300 functions), by steps of tuning: {config.asked} "
               "questions in new wordings, right in per cent by the likeliest of four choices, and written to the "
               "letter, by seed. Kendall's tau of both over the steps: 1 is the same order, 0 none.")  # fmt: skip
    rows = [[step, *(", ".join(f"{100 * each:.1f}" for each in by_seed) for by_seed in means)]
            for step, means in zip(found[0], values.mean(3).transpose(1, 2, 0))]  # fmt: skip
    report.table(["step", "by likelihood", "by writing"], rows)
    report.judge("likelihood and writing rank checkpoints alike", agreement(values[:, :, 0], values[:, :, 1]), 1, "tau")


def main(config: Config):
    report = Report("incite", "RedPajama-INCITE: fp16, and likelihood against writing")
    by_arithmetic(report, config)
    by_part(report, config)
    by_protocol(report, config)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
