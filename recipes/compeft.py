"""ComPEFT: how small can the difference that fine-tuning makes be written, and what does the model lose?

Paper       Yadav et al. 2023, arXiv:2311.13171.
Command     python recipes/compeft.py
Hardware    one core, no GPU; 10 minutes of its time (2026-11-27, AMD EPYC), trainings among them.
Claim       Of the difference of weights keep the k % largest, and of them the sign alone, times alpha standard
            deviations of the whole: a bit a number or less instead of 16, and large models lose nothing by it.
Miniature   The laptop's model fine-tuned on chats about 300 functions (recipes/mini.py), all weights or LoRA of rank
            16, two seeds; k of 5 to 50, alpha of 0.5 to 10 chosen on 200 questions for development, the right choice
            of four measured on others. Files are written with Golomb's code and read again.
Predicted   before the run: at k = 20 a small loss; at k = 5 alpha between 2 and 5; all weights lose less than LoRA;
            files as long as the formula says, within 1 %.
Result      All four refuted. At k = 20 % the loss is not small: all weights 63.8 to 34.3 % right (-29.5 points, -33.3
            to -25.6; 87 % of what tuning had won), LoRA 38.4 to 32.0 (-6.4, -8.7 to -4.1; 77 %), the base 30.1. All
            weights lose more than LoRA, which had won less: of little meaning. At k = 5 the smallest alpha, 0.5, was
            chosen and nothing is left. Files are up to 3.2 % longer than the formula, which takes places as
            independent: within 1 % for LoRA and at k = 50.
"""

import copy
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scoring import Questions
from study import OUT, Report, base, difference, once, train
from ternary import HEADER, compress, expected_bits, others, read_bits, write_bits
from weights import add_vector, task_vector

from lib.cli import run_command
from lib.lora import adapters, add_adapters, init_adapters
from lib.weights import read_adapter
from model import ModelConfig, load

HERE = OUT / "compeft"
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)               # k
ALPHAS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)
RANK = 16  # of LoRA


@dataclass
class Config:
    """ComPEFT in miniature, with a report."""

    seeds: int = 2
    dev: int = 100  # questions of each of two groups, for alpha


def tuned(kind: str, seed: int) -> Path:
    """A fine-tuned model: `all weights` or `LoRA`."""
    chats, data = HERE / "chats.jsonl", HERE / "data"
    once(chats, "recipes/mini.py", "--make", "chats", "--subjects", 300, "--out", HERE)
    sizes = "--template llama2-chat --max_len 256 --val_fraction 0.02".split()
    once(data, "data.py", "--source", chats, *sizes, "--tokenizer", base(0), "--drop_refusals", "--out", data)
    more = ("--lora_rank", RANK, "--learning_rate", 5e-3) if kind == "LoRA" else ("--learning_rate", 2e-3)
    out = HERE / f"{kind.split()[0]}_{seed}"
    return train(out, "--data", data, "--init_from", base(seed), "--seed", seed, "--epochs", 3, *more)


def before_and_after(kind: str, seed: int) -> tuple:
    """A model as it was, its parameters that training changed, and what they became."""
    model, run = load(base(seed)), tuned(kind, seed)
    if kind == "all weights":
        return model, list(model.parameters()), list(load(run).parameters())
    learned = read_adapter(run, ModelConfig).tensors
    add_adapters(model, RANK, 16.0, "query key value out gate up down".split(), nf4=False)
    init_adapters(model, seed)  # A does not begin at 0
    return model, list(adapters(model).values()), [learned[name] for name in adapters(model)]


class Tuned:
    """One fine-tuned model, and what is left of it when its task vector is changed."""

    def __init__(self, kind: str, seed: int):
        self.model, parameters, after = before_and_after(kind, seed)
        self.parameters, self.before = parameters, copy.deepcopy([p.detach() for p in parameters])
        self.tau = task_vector(self.before, after)

    def right(self, questions: Questions, vector: Tensor) -> np.ndarray:
        with torch.no_grad():
            for weight, old in zip(self.parameters, self.before):
                weight.copy_(old)
        add_vector(self.parameters, vector)
        return questions.right(self.model)


def measure(kind: str, seed: int, dev: Questions, test: Questions, found: dict, rows: list):
    each = Tuned(kind, seed)
    found[kind, "uncompressed"].append(each.right(test, each.tau))
    found[kind, "base"].append(each.right(test, 0 * each.tau))
    for share in SHARES:
        by_alpha = [each.right(dev, compress(each.tau, share, alpha)).mean() for alpha in ALPHAS]
        alpha = ALPHAS[int(np.argmax(by_alpha))]  # the first of equals
        vector = compress(each.tau, share, alpha)
        data = write_bits(vector)
        right = each.right(test, read_bits(data))
        found[kind, share].append(right)
        bits, n = 8 * (len(data) - struct.calcsize(HEADER)) + 16, len(vector)
        sizes = (bits / n, expected_bits(n, share) / n, 16 * n / bits)
        rows.append([kind, seed, f"{share:.0%}", alpha, *sizes, 100 * right.mean()])
    for name, vector in others(each.tau, 0.2, seed).items():
        found[kind, name].append(each.right(test, vector))


def main(config: Config):
    report, found, rows = Report("compeft", "ComPEFT: task vectors in a bit a number"), defaultdict(list), []
    run = tuned("all weights", 0)
    dev, test = Questions(run, HERE / "dev.jsonl", config.dev), Questions(run, HERE / "test.jsonl")
    for kind in ("all weights", "LoRA"):
        for seed in range(config.seeds):
            measure(kind, seed, dev, test, found, rows)
    report.say(f"Right choices of {len(test.questions)} test questions, per cent (chance 25); alpha chosen on others.")
    report.table(["tuned", "seed", "kept", "alpha", "bits a number", "formula", "times smaller", "right"], rows)
    more = [100 * (row[4] / row[5] - 1) for row in rows]
    within = f"{min(more):+.1f} to {max(more):+.1f} %, {sum(abs(one) <= 1 for one in more)} of {len(more)} within"
    report.say(f"- Predicted: files as long as the formula says, within 1 %. Found: {within}.")
    least = [row[3] for row in rows if row[2] == f"{SHARES[0]:.0%}"]
    report.say(f"- Predicted: at k = 5 % alpha between 2 and 5. Found: {', '.join(map(str, least))}.")
    names = ("base", "uncompressed", 0.2, "pruned", "mean magnitude", "random places")
    table = [[kind, *(100 * float(np.mean(found[kind, name])) for name in names)] for kind in ("all weights", "LoRA")]
    report.say("With a fifth kept; `pruned` keeps the values, `mean magnitude` has alpha by a formula:")
    report.table(["tuned", "base", "uncompressed", "ComPEFT", "pruned", "mean magnitude", "random places"], table)
    for kind in ("all weights", "LoRA"):
        lost, won = (difference(found[kind, name], found[kind, "uncompressed"]).times(100) for name in (0.2, "base"))
        report.say(f"- Predicted: {kind}, k = 20 %, a small loss. Found: {lost} points of the {won.mean:.1f} that "
                   f"tuning won, {abs(lost.mean / won.mean):.0%}.")  # fmt: skip
    kept = [np.subtract(found[kind, 0.2], found[kind, "uncompressed"], dtype=float) for kind in ("LoRA", "all weights")]
    report.judge("all weights lose less than LoRA", difference(*kept).times(100), 1, "points")
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
