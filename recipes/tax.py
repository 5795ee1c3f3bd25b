"""The alignment tax: does averaging with the model before alignment give back what it lost, and which part counts?

Paper       Lin et al. 2023, arXiv:2309.06256 (model averaging, and HMA: a ratio for each block).
Command     python recipes/tax.py
Hardware    two cores, no GPU; MINUTES_HERE
Claim       Between the models before and after alignment lie better bargains of reward and old skills than along
            training; averaging the input part costs least; ratios by part, chosen by the likelihood of the aligned
            model's own answers, beat one ratio (Zephyr-7B-beta: win rate 8.10 to 9.32, reading 37.47 to 38.93).
Miniature   Rejection sampling with a reward that a program knows exactly: the share of written lines that are comments.
            Three rounds: 8 answers of 64 tokens to each of 128 beginnings of library code, the best kept, 40 steps on
            them. Tax: bits a byte of validation files above the base's. Every point is compared with the training's
            own path (a checkpoint every 20 steps) at the same tax. Three seeds; answers to 256 new beginnings.
Predicted   before the run: averaging above the path; input part better than output part; HMA at least as good as one
            ratio.
Result      RESULT_HERE
"""

import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from rejection import align, reward, write
from study import Report, difference, text
from weights import mix
from writing import beginnings

from data import Dataset
from lib.cli import run_command
from model import load
from sample import load_model

ALPHAS = (0.2, 0.4, 0.6, 0.8)


@dataclass
class Config:
    """Model averaging against the alignment tax, with a report."""

    seeds: int = 3
    prompts: int = 128
    answers: int = 8        # of each, of which the best is kept
    rounds: int = 3
    steps: int = 40         # of each round
    tests: int = 256        # new beginnings that the points are measured on


@torch.no_grad()
def bits_a_byte(model, windows: int = 96) -> float:
    """Of validation files of the standard library, in so many windows spread over them."""
    data = Dataset(text(), "val", model.config.max_seq_len)
    nats, targets, places = 0.0, 0, data.spread_indices(windows)
    for begin in range(0, len(places), 16):
        batch = data.batch(places[begin : begin + 16]).to(torch.device("cpu"))
        nats += float(model.loss(batch.tokens, batch.targets))
        targets += batch.targets.numel()
    return nats / targets / np.log(2) / data.bytes_per_target


@torch.no_grad()
def likelihood(model, texts: list[list[int]]) -> float:
    """The mean log-probability of answers of 64 tokens behind prompts of 64."""
    rows = torch.tensor(texts)
    return float(model.log_probs(rows[:, :-1], rows[:, 1:])[:, 63:].mean())


def best_ratios(first, second, mean: float, texts: list[list[int]]) -> tuple[float, ...]:
    """HMA: the ratios of three parts, of this mean, under which the aligned model's answers are likeliest."""
    grid = [a for a in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=3) if abs(sum(a) / 3 - mean) < 1e-9]
    return max(grid, key=lambda alphas: likelihood(mix(copy.deepcopy(first), second, alphas), texts))


def gain(points: list[tuple], tax: float, rewards: np.ndarray) -> np.ndarray:
    """Rewards (N,) less those of the path at the same tax; points are its (tax, rewards), of rising tax.

    Between two points both are taken as straight, beyond the last the last counts.
    """
    taxes = np.maximum.accumulate([point[0] for point in points])
    along = np.array([point[1] for point in points])
    return rewards - np.array([np.interp(tax, taxes, column) for column in along.T])


def measure(seed: int, config: Config, rows: list) -> dict[str, np.ndarray]:
    """The gain over the path of every way to average, by prompt."""
    path = align(seed, config.rounds, config.prompts, config.answers, config.steps)
    first, tokenizer = load_model(str(path[0]))
    second, start = load(path[-1]), bits_a_byte(first)
    prompts = beginnings(read_split(text()), tokenizer, config.tests, 64, 77)

    def point(name: str, model) -> tuple[float, np.ndarray]:
        rewards = np.array([reward(tokenizer.decode(ids)) for ids in write(model, tokenizer, prompts, 5)])
        rows.append([seed, name, bits_a_byte(model) - start, 100 * rewards.mean()])
        return rows[-1][2], rewards

    along = [point(f"path {number}", load(folder)) for number, folder in enumerate(path)]
    own = [ids for ids in write(second, tokenizer, prompts, 6)]
    texts = [prompt + ids for prompt, ids in zip(prompts, own) if len(ids) == 64]
    ways = {f"one ratio {alpha}": (alpha,) * 3 for alpha in ALPHAS}
    ways |= {"one ratio 0.5": (0.5,) * 3, "HMA, mean 0.5": best_ratios(first, second, 0.5, texts)}
    ways |= {"input part": (0.5, 1, 1), "middle part": (1, 0.5, 1), "output part": (1, 1, 0.5)}
    found = {}
    for name, alphas in ways.items():
        words = f"{name}: {' '.join(map(str, alphas))}"
        found[name] = gain(along, *point(words, mix(copy.deepcopy(first), second, alphas)))
    return found


def main(config: Config):
    report, rows = Report("tax", "Model averaging against the alignment tax"), []
    seeds = [measure(seed, config, rows) for seed in range(config.seeds)]
    report.say("Tax in bits a byte above the base; reward in per cent of lines that are comments; alphas by part.")
    report.table(["seed", "model", "tax", "reward"], rows)

    def arm(*names: str) -> list[np.ndarray]:
        return [np.mean([found[name] for name in names], 0) for found in seeds]

    def judge(prediction: str, lower, higher):
        report.judge(prediction, difference(lower, higher).times(100), 1, "points of reward at equal tax")

    averages = arm(*(f"one ratio {alpha}" for alpha in ALPHAS))
    judge("averages above the path of training", np.zeros_like(averages), averages)
    judge("averaging the input part better than the output part", arm("output part"), arm("input part"))
    judge("HMA better than one ratio", arm("one ratio 0.5"), arm("HMA, mean 0.5"))
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
