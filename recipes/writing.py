"""Writing with a local model, and what can be measured of a text: shared by the recipes of papers."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Tokenizer
from lib.chat_formats import Turn
from lib.sampling import Sampling
from lib.stream import TextStreams
from lib.templates import end_ids, render_prompt
from lib.with_model import found_template
from sample import generate, load_model

ROWS = 64  # texts that are written at a time


def writer(model, tokenizer: Tokenizer, seed: int = 0):
    """A function of contexts, as ids without BOS, and a number of tokens: what the model writes at temperature 1."""

    def write(contexts: list[list[int]], size: int) -> list[list[int]]:
        found = []
        for begin in range(0, len(contexts), ROWS):
            prompts = [[tokenizer.bos_id, *ids] for ids in contexts[begin : begin + ROWS]]
            found += generate(model, prompts, size, Sampling(1.0, seed=seed + begin))
        return found

    return write


class Written(NamedTuple):
    """What a model wrote to a prompt."""

    text: str
    ended: bool  # by its end or a stop string, and not cut by its length
    whole: bool  # whether all of the prompt was read, and not only the end that the window has room for


class TextWriter:
    """A local model as a function of prompts: write(prompts, size, sampling, stop) -> what it writes to each.

    A run or folder with a chat template answers the prompt, any other continues it. size is in tokens, but at most half
    of the model's window.
    """

    def __init__(self, folder: str, anyway: bool = False):
        self.model, self.tokenizer = load_model(str(folder), anyway=anyway)
        self.template = found_template("", str(folder), self.tokenizer)

    def __call__(self, prompts: list[str], size: int, sampling=Sampling(), stop: tuple[str, ...] = ()) -> list[Written]:
        found, size = [], min(size, self.model.config.max_seq_len // 2)
        for begin in range(0, len(prompts), ROWS):
            ids, whole = zip(*(self.ids(prompt, size) for prompt in prompts[begin : begin + ROWS]))
            draw = replace(sampling, seed=sampling.seed + begin)
            texts = TextStreams(self.tokenizer, ids, stop)
            ends = end_ids(self.template, self.tokenizer)
            new = generate(self.model, list(ids), size, draw, ends, texts.add)
            for text, stream, tokens, all_read in zip(texts.end(), texts.streams, new, whole):
                found.append(Written(text.strip(), stream.finished or len(tokens) < size, all_read))
        return found

    def ids(self, prompt: str, size: int) -> tuple[list[int], bool]:
        """A prompt with BOS, or the end of it that leaves room for so many tokens, and whether that is all of it."""
        if self.template:
            ids = render_prompt([Turn("user", prompt)], self.template, self.tokenizer)
        else:
            ids = self.tokenizer.encode_prompt(prompt)
        room = self.model.config.max_seq_len - size
        return (ids, True) if len(ids) <= room else ([ids[0], *ids[1 - room :]], False)


def counted(write, cut: Counter):
    """A writer that counts its prompts, and those that its window had no room for."""

    def counting(prompts, *settings):
        found = write(prompts, *settings)
        cut.update(prompts=len(found), cut=sum(not each.whole for each in found))
        return found

    return counting


def beginnings(documents: list[list[int]], tokenizer: Tokenizer, count: int, size: int, seed: int) -> list[list[int]]:
    """Prompts of so many tokens with BOS, from random places of documents (ids)."""
    long = [ids for ids in documents if len(ids) >= size]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = long[draw.integers(len(long))]
        begin = draw.integers(len(ids) - size + 2)
        found.append([tokenizer.bos_id, *ids[begin : begin + size - 1]])
    return found


def distinct(ids: list[int], n: int = 3) -> float:
    """The share of different ones among a text's n-grams.

    >>> distinct([1, 2, 3, 1, 2, 3, 1])
    0.6
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def copied(prompt: list[int], ids: list[int], n: int = 4) -> float:
    """The share of a text's n-grams that its prompt has too."""
    known = {tuple(prompt[i : i + n]) for i in range(len(prompt) - n + 1)}
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


@torch.no_grad()
def bits(judge, tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> float:
    """Bits a byte of what was written, by a third model."""
    whole = torch.tensor([prompt + ids])
    logprobs = judge.log_probs(whole[:, :-1], whole[:, 1:])[0, len(prompt) - 1 :]
    return float(-logprobs.sum()) / np.log(2) / max(1, len(tokenizer.decode(ids).encode()))
