"""Rejection sampling with a reward that a program knows exactly: write, score, keep the best, fine-tune, again.

RSF as in Lin et al. 2023, arXiv:2309.06256. The reward is how much of what is written are comments.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from study import OUT, base, once, text, train
from writing import beginnings

from lib.sampling import Sampling
from sample import generate, load_model

HERE = OUT / "tax"


def reward(text: str) -> float:
    """The share of a text's lines, blank ones aside, that are comments.

    >>> reward("# one\\n\\nx = 1\\n    # two\\ny")
    0.5
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(line.startswith("#") for line in lines) / max(1, len(lines))


def write(model, tokenizer, prompts: list[list[int]], seed: int, size: int = 64) -> list[list[int]]:
    """Answers at temperature 1, as ids."""
    found = []
    for begin in range(0, len(prompts), 128):
        rows = prompts[begin : begin + 128]
        found += generate(model, rows, size, Sampling(1.0, seed=seed + begin), (tokenizer.eos_id, tokenizer.bos_id))
    return found


def best_answers(model, tokenizer, prompts: list[list[int]], count: int, seed: int) -> list[str]:
    """Each prompt with the answer, of so many, whose reward is highest; the first of equals."""
    rows = [prompt for prompt in prompts for _ in range(count)]
    answers = [tokenizer.decode(ids) for ids in write(model, tokenizer, rows, seed)]
    kept = []
    for number, prompt in enumerate(prompts):
        some = answers[count * number : count * (number + 1)]
        kept.append(tokenizer.decode(prompt) + max(some, key=reward))
    return kept


def align(seed: int, rounds: int, prompts: int, answers: int, steps: int) -> list[Path]:
    """Rounds of rejection sampling from the base of a seed; the checkpoints along the path, from the base on."""
    path, documents = [base(seed)], read_split(text(), "train")
    for number in range(rounds):
        made = HERE / f"kept_{seed}_{number}.jsonl"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            model, tokenizer = load_model(str(path[-1]))
            asked = beginnings(documents, tokenizer, prompts, 64, 1000 * seed + number)
            kept = best_answers(model, tokenizer, asked, answers, 1000 * seed + number)
            made.write_text("".join(json.dumps({"text": each}) + "\n" for each in kept))
        data = made.with_suffix("")
        once(data, "data.py", "--source", made, "--tokenizer", base(seed), "--val_fraction", 0.05, "--out", data)
        flags = f"--steps {steps} --learning_rate 5e-4 --schedule constant --save_every 20 --keep_every 20"
        run = train(HERE / f"run_{seed}_{number}", "--data", data, "--init_from", path[-1], "--seed", seed,
                    "--seq_len", 128, "--eval_tokens", 128, *flags.split())  # fmt: skip
        path += sorted(run.glob("step_*[1-9]*"))  # of which step 0 is known
    return path
