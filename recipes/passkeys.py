"""Texts with a key hidden in them, and how far back a model finds it: passkey retrieval for models that are small.

As Mohtashami and Jaggi ask (arXiv:2305.16300), in the words of lib/tasks.py, but the key is a word of one token instead
of a number, and its distance from the end is what counts (Chen et al. 2023, arXiv:2306.15595).
"""

import json
import random
import sys
from pathlib import Path
from statistics import mode

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import begins_word
from study import once, text

from data import Tokenizer
from lib.files import write_whole
from lib.tasks import DULL, PASSKEY_BEGIN, PASSKEY_QUESTION, passkey_line

TEXTS = 6000  # with a key


def prompt(key: str, before: int, after: int) -> str:
    """A question for the key, with so many dull sentences before and behind it.

    >>> prompt("name", 0, 2)[-96:]
    'name is the pass key.\\nThe grass is green. The sky is blue.\\nWhat is the pass key? The pass key is'
    """
    sentences = [f"{sentence}." for sentence in DULL.split(".")[:-1]]
    dull = ["".join(sentences[n % len(sentences)] for n in range(count)).strip() for count in (before, after)]
    return PASSKEY_BEGIN + dull[0] + passkey_line(key) + dull[1] + PASSKEY_QUESTION


def keys_of(tokenizer: Tokenizer) -> list[str]:
    """What a key can be: words of the vocabulary that are one token in their place, and not in the prompt."""
    words = [tokenizer.decode([5, n])[len(tokenizer.decode([5])) :].strip() for n in range(tokenizer.vocab_size)
             if begins_word(tokenizer, n)]  # fmt: skip
    known = prompt("", 5, 0)
    words = [word for word in words if len(word) > 3 and word not in known]
    sizes = [len(tokenizer.encode(f"{prompt(word, 0, 0)} {word}.")) for word in words]
    usual = mode(sizes)
    return [word for word, size in zip(words, sizes) if size == usual]


def most_sentences(tokenizer: Tokenizer, window: int) -> int:
    """With so many, a prompt and its answer still fit in the window."""
    key, count = keys_of(tokenizer)[0], 0
    while len(tokenizer.encode(f"{prompt(key, 0, count + 1)} {key}.", bos=True, eos=True)) <= window:
        count += 1
    return count


def passkeys(folder: Path, window: int) -> Path:
    """A dataset in this folder of such texts with their answers, none longer than the window."""
    made, source, draw = folder / "passkeys", folder / "passkeys.jsonl", random.Random(0)
    if not source.exists():
        tokenizer, lines = Tokenizer(text()), []
        keys, most = keys_of(tokenizer), most_sentences(tokenizer, window)
        for _ in range(TEXTS):
            key, count = draw.choice(keys), draw.randint(0, most)
            before = draw.randint(0, count)
            lines.append(json.dumps({"text": f"{prompt(key, before, count - before)} {key}."}) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(source, "".join(lines))
    return once(made, "data.py", "--source", source, "--out", made, "--tokenizer", text() / "tokenizer.model")


@torch.no_grad()
def found_keys(model, tokenizer: Tokenizer, window: int, trials: int) -> tuple[list[int], np.ndarray]:
    """32 distances of the key's line from the prompt's end, in tokens, up to what fits in the window; and whether the
    answer to each of so many trials is right (32, T).

    The answer is one token, so what is likeliest is what is written greedily.
    """
    counts = np.linspace(0, most_sentences(tokenizer, window), 32).round().astype(int).tolist()
    distances, right, draw, keys = [], [], random.Random(1), keys_of(tokenizer)
    for count in counts:
        asked = [(prompt(key, 0, count), key) for key in draw.sample(keys, trials)]
        rows = torch.tensor([tokenizer.encode(f"{words} {key}", bos=True) for words, key in asked])
        distances.append(len(tokenizer.encode(asked[0][0].rpartition("pass key.\n")[2])))
        written = model.unembedding(model.hidden(rows[:, :-1])[:, -1:]).argmax(-1)
        right.append((written[:, 0] == rows[:, -1]).numpy())
    return distances, np.array(right)


def farthest(distances: list[int], right: np.ndarray) -> int:
    """The paper's k_max: the largest distance up to which at every one a fifth of the keys is found; 0 without.

    >>> farthest([10, 20, 30, 40], np.array([[1, 1], [1, 0], [0, 0], [1, 1]]))
    20
    """
    good = [row.mean() >= 0.2 for row in right] + [False]
    return ([0] + distances)[good.index(False)]
