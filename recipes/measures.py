"""Measures of a model for recipes/incite.py: of its text, its gradients, and whether two of them agree."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mini import read_lines, write_lines
from scoring import Questions
from study import Difference, once

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Dataset
from lib.chat_formats import Turn
from lib.runs import find_template
from lib.templates import render_prompt
from sample import generate, load_model

SCALES = (1, 2**12, 2**16)  # of the loss


@torch.no_grad()
def window_bits(model, data: Dataset, count: int) -> np.ndarray:
    """Bits a byte of so many windows spread over a dataset."""
    places, found = data.spread_indices(count), []
    for begin in range(0, count, 16):
        batch = data.batch(places[begin : begin + 16]).to(torch.device("cpu"))
        found.append(-model.log_probs(batch.tokens, batch.targets).mean(1) / np.log(2) / data.bytes_per_target)
    return torch.cat(found).numpy()


def written(model, tokenizer, prompts: list[list[int]], size: int) -> list[str]:
    """The likeliest texts of at most so many tokens."""
    found, ends = [], (tokenizer.eos_id, tokenizer.bos_id)
    for begin in range(0, len(prompts), 100):
        found += generate(model, prompts[begin : begin + 100], size, end_ids=ends)
    return [tokenizer.decode(ids) for ids in found]


def next_words(model, tokenizer, rows: list[dict]) -> np.ndarray:
    """Whether the next word that a model writes is the right one, of the texts of questions."""
    texts = written(model, tokenizer, [[tokenizer.bos_id, *tokenizer.encode(row["context"])] for row in rows], 8)
    rights = [row["choices"][row["answer"]] for row in rows]
    return np.array([mine.split()[:1] == right.split()[:1] for mine, right in zip(texts, rights)], float)


def by_likelihood(run: Path, questions: Path, out: Path) -> np.ndarray:
    """Whether the likeliest choice is the right one, by eval.py."""
    once(out, "eval.py", "--model", run, "--task", "choices", "--data", questions, "--out", out)
    return np.array([row["scores"]["acc"] for row in read_lines(out.with_suffix(".jsonl"))])


def answered(run: Path, lines: list[dict], out: Path) -> dict[int, tuple]:
    """Of every checkpoint of a chat model: which questions it answers by the likeliest choice, and to the letter."""
    write_lines(out, lines)  # as Questions reads them
    questions, template, found = Questions(run, out), find_template(str(run)), {}
    for folder in sorted(run.glob("step_*[1-9]*")):  # but step 0
        model, tokenizer = load_model(str(folder))
        prompts = [render_prompt([Turn("user", row["context"])], template, tokenizer) for row in lines]
        texts = written(model, tokenizer, prompts, 32)
        right = [mine.strip() == row["choices"][row["answer"]] for mine, row in zip(texts, lines)]
        found[int(folder.name.removeprefix("step_"))] = questions.right(model), right
    return found


def flushed(model, data: Dataset, windows: int) -> dict[str, list[float]]:
    """Per cent of the gradients of a step's mean loss that fp16 rounds to 0, by what they are of and by SCALES."""
    kept, batch = {}, data.batch(data.spread_indices(windows)).to(torch.device("cpu"))
    hooks = [block.register_forward_hook(lambda module, read, out, n=n: kept.update({f"after layer {n}": out}))
             for n, block in enumerate(model.blocks, 1)]  # fmt: skip
    kept["logits"] = model(batch.tokens)
    for hook in hooks:
        hook.remove()
    kept["weights"] = [weight for weight in model.parameters()]
    loss = F.cross_entropy(kept["logits"].flatten(0, 1), batch.targets.flatten())
    found = {}
    for name, values in kept.items():
        grads = torch.autograd.grad(loss, values, retain_graph=True)
        gradient = torch.cat([each.flatten() for each in grads])
        gone = [(scale * gradient).half().eq(0) & gradient.ne(0) for scale in SCALES]
        found[name] = [100 * float(each.float().mean()) for each in gone]
    return found


def tau(first, second) -> float:
    """Kendall's, of the last axis: pairs in the same order less those in the other, of all pairs; ties are neither.

    >>> round(float(tau([1, 2, 3], [1, 3, 2])), 3), float(tau([1, 2], [5, 5]))
    (0.333, 0.0)
    """
    i, j = np.triu_indices(np.shape(first)[-1], 1)
    signs = [np.sign(np.asarray(each)[..., i] - np.asarray(each)[..., j]) for each in (first, second)]
    return (signs[0] * signs[1]).mean(-1)


def agreement(first: np.ndarray, second: np.ndarray, draws: int = 1000) -> Difference:
    """tau of two measures of checkpoints (seeds, checkpoints, questions), its interval by drawing questions."""
    draw, seeds = np.random.default_rng(0), tau(first.mean(2), second.mean(2))
    picks = draw.integers(first.shape[2], size=(draws, first.shape[2]))
    drawn = [tau(first[..., pick].mean(2), second[..., pick].mean(2)).mean() for pick in picks]
    return Difference(float(seeds.mean()), *map(float, np.percentile(drawn, (2.5, 97.5))), tuple(map(float, seeds)))
