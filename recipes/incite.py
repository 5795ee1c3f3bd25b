"""Did fp16 cost RedPajama-INCITE its likelihoods? Arithmetic against arithmetic, and likelihood against writing.

Paper       RedPajama-INCITE, Together 2023; data in Weber et al. 2024, arXiv:2411.12372.
Command     python recipes/incite.py
Hardware    two cores, no GPU.
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
Result      not run yet.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention
from measures import SCALES, agreement, flushed, next_words, window_bits, written
from mini import read_lines, write_lines
from scoring import Questions
from study import OUT, Report, base, difference, once, text, train

from data import Dataset
from lib.chat_formats import Turn
from lib.cli import run_command
from lib.runs import find_template
from lib.templates import render_prompt
from sample import load_model

HERE = OUT / "incite"
ARMS = {"fp32": (23, 1), "bf16": (7, 1), "fp16, scaled": (10, 4096), "fp16": (10, 1)}  # mantissa, scale of the loss


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


def by_likelihood(run: Path, questions: Path) -> np.ndarray:
    """Whether the likeliest choice is the right one, by eval.py."""
    out = HERE / f"{run.name}.json"
    once(out, "eval.py", "--model", run, "--task", "choices", "--data", questions, "--out", out)
    return np.array([row["scores"]["acc"] for row in read_lines(out.with_suffix(".jsonl"))])


def by_arithmetic(report: Report, config: Config):
    """Four arithmetics: bits a byte, likelihood, the next word."""
    asked, data = HERE / "questions.jsonl", Dataset(text(), "val", 256)
    sizes = ("--count", config.questions, "--context", 48, "--size", 12)
    once(asked, "recipes/cloze.py", "--data", text(), "--kind", "other", *sizes, "--out", asked)
    found = {}
    for name in ARMS:
        for seed in range(config.seeds):
            run = arm_of(name, seed, config.steps)
            model, tokenizer = load_model(str(run))
            words = next_words(model, tokenizer, read_lines(asked))
            found[name, seed] = window_bits(model, data, config.windows), by_likelihood(run, asked), words

    def arm(name: str, measure: int) -> np.ndarray:
        return np.array([found[name, seed][measure] for seed in range(config.seeds)])

    rows = []
    for name in ARMS:
        bits, *rights = (arm(name, measure).mean(1) for measure in range(3))
        by_seed = ", ".join(f"{each:.4f}" for each in bits)
        rows.append([name, f"{bits.mean():.4f}", by_seed, *(100 * float(each.mean()) for each in rights)])
    report.say(f"Trained for {config.steps} steps, measured in fp32. Right in per cent; chance is 25 by likelihood.")
    report.table(["arithmetic", "bits a byte", "by seed", "right by likelihood", "next word right"], rows)
    for first, second in (("bf16", "fp16, scaled"), ("fp32", "bf16")):
        lost = difference(arm(first, 0), arm(second, 0) - 0.01)
        report.judge(f"{second} less {first}, less 0.01, is below 0", lost, -1, "bits a byte")
    lost = difference(arm("fp16, scaled", 0), arm("fp16", 0))
    report.judge("fp16 without a scale is worse than with", lost, 1, "bits a byte")
    for measure, words in ((1, "by likelihood"), (2, "by writing")):
        gap = difference(arm("bf16", measure), arm("fp16, scaled", measure) + 0.03).times(100)
        report.judge(f"fp16, scaled, less bf16, {words}, plus 3, is above 0", gap, 1, "points")


def by_part(report: Report, config: Config):
    """What fp16 would round to 0 of the gradient of the laptop's model when it is trained."""
    data = Dataset(text(), "train", 256)
    found = [flushed(load_model(str(base(seed)))[0], data, 4) for seed in range(config.seeds)]
    rows = [[part, *np.mean([each[part] for each in found], 0).tolist()] for part in found[0]]
    report.say("Gradients that fp16 would round to 0, per cent, of a step's mean loss over 1,024 targets.")
    report.table(["of", *(f"loss times {scale:,}" for scale in SCALES)], rows)
    seeds = ", ".join(f"{each['logits'][0]:.1f}" for each in found)
    report.say(f"- Predicted: of the logits, without a scale, more than 10 %. Found, by seed: {seeds}.")


def answered(run: Path, lines: list[dict]) -> dict[int, tuple]:
    """Of every checkpoint of a chat model: which questions it answers by the likeliest choice, and to the letter."""
    write_lines(HERE / "asked.jsonl", lines)
    questions, template, found = Questions(run, HERE / "asked.jsonl"), find_template(str(run)), {}
    for folder in sorted(run.glob("step_*[1-9]*")):  # but step 0
        model, tokenizer = load_model(str(folder))
        prompts = [render_prompt([Turn("user", row["context"])], template, tokenizer) for row in lines]
        texts = written(model, tokenizer, prompts, 32)
        right = [mine.strip() == row["choices"][row["answer"]] for mine, row in zip(texts, lines)]
        found[int(folder.name.removeprefix("step_"))] = questions.right(model), right
    return found


def by_protocol(report: Report, config: Config):
    """Likelihood and writing on the same questions, at checkpoints of chat models."""
    runs = [attention.model_of(128, "chat", seed) for seed in range(config.seeds)]
    lines = [row for row in read_lines(attention.HERE / "test.jsonl") if row["subject"] == "new wording"]
    found = [answered(run, lines[: config.asked]) for run in runs]
    values = np.array([list(each.values()) for each in found], float)  # by seed, step, measure
    report.say(f"Chat models, {config.asked} questions: right in per cent by the likeliest of four choices, and "
               "written to the letter, by seed.")  # fmt: skip
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
