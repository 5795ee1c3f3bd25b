"""A model fine-tuned on questions with answers, and what can be measured of its own answers."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from curating import Record, good
from study import base, once, train

from data import Tokenizer
from lib.chat_formats import Turn
from lib.sampling import Sampling
from lib.templates import end_ids, render, render_prompt
from sample import generate, load_model

TEMPLATE, WINDOW, ROOM = "plain", 256, 160  # tokens of a question with its answer, and of an answer that is written


def rendered(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Its tokens, and a mask with 1 for those of the answer and its end."""
    return render([Turn("user", record.question), Turn("assistant", record.answer)], TEMPLATE, tokenizer)


def fitting(records: list[Record], tokenizer: Tokenizer) -> list[Record]:
    """Those that fit in the window, always in the same random order."""
    mixed = random.Random(0).sample(records, len(records))
    return [record for record in mixed if len(rendered(record, tokenizer)[0]) <= WINDOW]


def tuned(records: list[Record], seed: int, out: Path) -> Path:
    """The laptop's model of a seed, fine-tuned on these for three epochs."""
    chats, data = out.with_suffix(".jsonl"), out.with_name(f"{out.name}_data")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": record.question, "output": record.answer} for record in records]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ("--template", TEMPLATE, "--max_len", WINDOW, "--val_fraction", 0.05, "--near_duplicates", 0)
    once(data, "data.py", "--source", chats, *form, "--tokenizer", base(seed), "--out", data)
    length = ("--epochs", 3, "--learning_rate", 1e-3, "--eval_tokens", 1024)
    return train(out, "--data", data, "--init_from", base(seed), "--seed", seed, *length)


@torch.no_grad()
def measure(run: Path, tests: list[Record], written: int, bounds: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """Bits of each held-out answer (tests,), and of so many that are written whether each ends and is good.

    They are written as LIMA's were, at temperature 0.7 and top_p 0.9 with a repetition penalty of 1.2.
    """
    (model, tokenizer), bits = load_model(str(run)), []
    for record in tests:
        ids, mask = (torch.tensor([row]) for row in rendered(record, tokenizer))
        bits.append(-float((model.log_probs(ids[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum()) / np.log(2))
    prompts = [render_prompt([Turn("user", record.question)], TEMPLATE, tokenizer) for record in tests[:written]]
    lima = Sampling(0.7, top_p=0.9, repetition_penalty=1.2, seed=seed)
    answers = generate(model, prompts, ROOM, lima, end_ids(TEMPLATE, tokenizer))
    fine = [len(ids) < ROOM and good(tokenizer.decode(ids).strip(), *bounds) for ids in answers]
    return {"bits": np.array(bits), "good": np.array(fine, float)}
