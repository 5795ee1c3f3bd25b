"""Measure a model: MMLU under a named protocol, and perplexity.

    python eval.py --model out/RUN --task mmlu --data DIR --out results.json
    python eval.py --model out/RUN --task perplexity --data data/stdlib

A task with choices is a short function that yields `Question`s, such as `mmlu`; everything after it is shared. A score
here is that of the protocol's reference code, and does not depend on the size of the batch.
"""

import csv
import hashlib
import json
import math
import platform
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data import TokenDataset, Tokenizer, find_files, git_commit, read_documents, read_meta, run_command
from model import Transformer
from sample import load_model

CATEGORIES = {  # of MMLU's 57 subjects (hendrycks/test, categories.py)
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
        virology""".split(),
}


@dataclass
class Config:
    """Measure a model."""

    model: str                          # a run or checkpoint folder, a Hugging Face or Meta folder, or a llama2.c .bin
    task: Literal["mmlu", "perplexity"]
    data: str                           # mmlu: the folder with dev/ and test/; perplexity: a dataset or text files
    out: str = ""                       # results as JSON; one line a question goes beside it, ending in .jsonl
    tokenizer: str = ""                 # where the model's folder holds none
    protocol: Literal["hendrycks"] = "hendrycks"  # whose prompts and choices
    shots: int = 5                      # examples before each question
    subjects: str = ""                  # only these, divided by commas
    limit: int = 0                      # only the first so many questions of a subject; 0 is all
    max_prompt: int = 2048              # tokens, at most the model's window; a longer prompt loses its last examples
    bos: bool = True                    # begin prompts with BOS
    batch_tokens: int = 16_384          # tokens in a forward pass, padding included
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU


# ---- questions with choices ----


@dataclass
class Question:
    """A context and the texts that may follow it, as ids; the model picks the likeliest."""

    subject: str
    index: int                # in the subject's file
    context: list[int]
    choices: list[list[int]]
    gold: int
    shots: int = 0            # examples that the context has kept
    cut: int = 0              # tokens lost from its left, when even without examples it was too long


def mmlu(tokenizer: Tokenizer, config: Config, window: int) -> Iterator[Question]:
    """MMLU as in hendrycks/test: few-shot prompt, one of four letters (Hendrycks et al. 2021, arXiv:2009.03300).

    The prompt has two blanks after "about", as in the original; cells are used as they are in the file. Examples
    are dropped from the end until the prompt has at most --max_prompt tokens.
    """
    letters = [continuation(tokenizer, "\nAnswer:", f" {letter}") for letter in "ABCD"]
    limit = min(config.max_prompt, window - max(map(len, letters)) + 1)
    every = sorted(sum(CATEGORIES.values(), []))
    named = dict.fromkeys(map(str.strip, config.subjects.split(",")))
    for subject in named if config.subjects else every:
        if subject not in every:
            raise ValueError(f"--subjects {subject} is not one of MMLU's 57, such as {every[0]}")
        words = "".join(f" {word}" for word in subject.split("_"))
        header = f"The following are multiple choice questions (with answers) about {words}.\n\n"
        dev, test = (read_mmlu(Path(config.data) / split / f"{subject}_{split}.csv") for split in ("dev", "test"))
        if len(dev) < config.shots:
            raise ValueError(f"--shots {config.shots} is more than the {len(dev)} examples of {subject}")
        examples = [f"{mmlu_question(row)} {row[5]}\n\n" for row in dev]
        for index, row in enumerate(test[: config.limit or None]):
            for shots in range(config.shots, -1, -1):
                prompt = header + "".join(examples[:shots]) + mmlu_question(row)
                context = tokenizer.encode(prompt, bos=config.bos)
                if len(context) <= limit:
                    break
            cut = max(0, len(context) - limit)
            yield Question(subject, index, context[cut:], letters, "ABCD".index(row[5]), shots, cut)


def mmlu_question(row: list[str]) -> str:
    return row[0] + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5])) + "\nAnswer:"


def read_mmlu(path: Path) -> list[list[str]]:
    if not path.exists():
        raise ValueError(f"{path} is missing; --data must hold dev/ and test/ of MMLU's data.tar")
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]  # a blank line at the end is no row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            columns = f"and has {len(row)} columns, the last {row[-1:]}"
            raise ValueError(f"{path}: row {number} must be a question, four choices and A, B, C or D, {columns}")
    return rows


def continuation(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids that text adds after before.

    Not encode(text): sentencepiece begins a text with a blank of its own (LLaMA-2 makes two ids of " A", and one
    after "Answer:"). A tokenizer without that habit may join the two texts; it encodes text by itself.
    """
    head, whole = tokenizer.encode(before), tokenizer.encode(before + text)
    return whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text)


@torch.no_grad()
def score_choices(
    model: Transformer, questions: list[Question], batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """(place in questions, log-probability of each choice in nats), in fp32 over the whole vocabulary.

    Choices that differ in their last token alone share a row. Rows are sorted by length and padded on the right,
    which a causal model cannot see.
    """
    rows = []  # (question, ids read, {choice: its last token})
    for number, question in enumerate(questions):
        groups = defaultdict(dict)
        for i, choice in enumerate(question.choices):
            groups[tuple(choice[:-1])][i] = choice[-1]
        rows += [(number, question.context + list(start), last) for start, last in groups.items()]
    rows.sort(key=lambda row: len(row[1]), reverse=True)
    logprobs: dict[int, dict[int, float]] = defaultdict(dict)
    while rows:
        batch = rows[: max(1, batch_tokens // len(rows[0][1]))]
        rows = rows[len(batch) :]
        for (number, ids, last), hidden in zip(batch, final_hidden(model, [ids for _, ids, _ in batch])):
            begin = len(questions[number].context)
            steps = model.unembedding(hidden[begin - 1 : len(ids)]).float().log_softmax(-1)  # (choice length, V)
            shared = sum(steps[i, token].item() for i, token in enumerate(ids[begin:]))
            logprobs[number] |= {choice: shared + steps[-1, token].item() for choice, token in last.items()}
            if len(logprobs[number]) == len(questions[number].choices):
                yield number, [logprobs[number][i] for i in range(len(questions[number].choices))]


def final_hidden(model: Transformer, rows: list[list[int]]) -> Tensor:
    device = model.norm.weight.device
    longest = max(map(len, rows))
    return model.hidden(torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=device))


def run_choices(model: Transformer, tokenizer: Tokenizer, config: Config) -> tuple[dict, list[dict]]:
    """Ask every question of the task; returns the scores and one record a question."""
    from tqdm import tqdm

    bar = tqdm(mmlu(tokenizer, config, model.config.max_seq_len), desc="prompts", file=sys.stderr)
    questions = list(bar)
    records: list[dict] = [{} for _ in questions]
    right = 0
    with tqdm(total=len(questions), desc=config.task, file=sys.stderr) as bar:
        for number, logprobs in score_choices(model, questions, config.batch_tokens):
            question, best = questions[number], max(logprobs)
            pick = logprobs.index(best)  # the first of equals
            records[number] = {
                "task": config.task, "subject": question.subject, "index": question.index, "shots": question.shots,
                "num_tokens": len(question.context), "logprobs": logprobs, "pick": pick, "gold": question.gold,
                "tie": logprobs.count(best) > 1, "cut": question.cut,
            }  # fmt: skip
            right += pick == question.gold
            bar.update()
            bar.set_postfix_str(f"{right / bar.n:.1%}", refresh=False)
    prompts = hashlib.sha256()
    for question in questions:
        prompts.update(np.array(question.context, "<u4").tobytes())
    return summarize(records) | {"prompts_sha256": prompts.hexdigest()}, records


def summarize(records: list[dict]) -> dict:
    """Accuracy by subject, by category and over all questions (micro), and the mean of the subjects (macro)."""
    subjects = defaultdict(list)
    for record in records:
        subjects[record["subject"]].append(record["pick"] == record["gold"])
    flatten = lambda names: [right for name in names for right in subjects.get(name, [])]
    mean = lambda values: sum(values) / len(values)
    categories = {name: flatten(members) for name, members in CATEGORIES.items()}
    return {
        "micro": mean(flatten(subjects)),
        "macro": mean([mean(values) for values in subjects.values()]),
        "categories": {name: mean(values) for name, values in categories.items() if values},
        "subjects": {name: mean(values) for name, values in subjects.items()},
        "questions": len(records),
        "shots_kept": dict(sorted(Counter(record["shots"] for record in records).items(), reverse=True)),
        "ties": sum(record["tie"] for record in records),
        "cut_from_the_left": sum(record["cut"] > 0 for record in records),
    }


# ---- perplexity ----


@torch.no_grad()
def run_perplexity(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Nats a token, bits a byte and perplexity on the validation split of a dataset folder, or on text files."""
    path, window = Path(config.data), model.config.max_seq_len
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    if (path / "meta.json").exists():
        val = TokenDataset(path, "val", min(window, largest_file(path) - 1))
        if val.meta["tokenizer"]["sha256"] != tokenizer.sha256:
            raise ValueError(f"--data {path} was made with another tokenizer than the model's {tokenizer.name}")
        # these are (context, predicted) pairs as below; bytes are in proportion to the tokens predicted
        pieces = ((row[:-1].tolist(), row[1:].tolist()) for row in map(val.window, range(len(val))))
        split, num_words = val.meta["splits"]["val"], 0
        documents, num_bytes = split["documents"], len(val) * val.seq_len * split["bytes"] / split["tokens"]
    else:
        documents = num_bytes = num_words = 0

        def read_pieces() -> Iterator[tuple[list[int], list[int]]]:
            nonlocal documents, num_bytes, num_words
            for file in find_files((config.data,), path):
                for text in filter(str.strip, read_documents(file)):
                    documents, num_bytes = documents + 1, num_bytes + len(text.encode())
                    num_words += len(re.split(r"\s+", text))  # as lm-evaluation-harness counts
                    yield from rolling_windows(tokenizer.encode(text, bos=True), window)

        pieces = read_pieces()
    nats, tokens = 0.0, 0
    for batch in batches_by_tokens(pieces, config.batch_tokens):
        hidden = final_hidden(model, [context for context, _ in batch])
        for (context, predicted), row in zip(batch, hidden):
            logits = model.unembedding(row[len(context) - len(predicted) : len(context)]).float()
            targets = torch.tensor(predicted, device=logits.device)
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            tokens += len(predicted)
    if not tokens:
        raise ValueError(f"--data {path} has no text to measure")
    scores = {
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity": float(np.exp(nats / tokens)),
        "tokens": tokens,
        "bytes": round(num_bytes),
        "documents": documents,
    }
    return scores | ({"word_perplexity": float(np.exp(nats / num_words))} if num_words else {})


def largest_file(folder: Path) -> int:
    """Tokens in the largest validation file, which bounds the window that fits."""
    return max(file["tokens"] for file in read_meta(folder)["splits"]["val"]["files"])


def rolling_windows(ids: list[int], window: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, predicted): each token after the first is predicted once, the last window with as much context as fits.

    >>> list(rolling_windows([1, 5, 6, 7, 8], 3))
    [([1, 5, 6], [5, 6, 7]), ([5, 6, 7], [8])]
    """
    for start in range(1, len(ids), window):
        predicted = ids[start : start + window]
        end = start + len(predicted) - 1
        yield ids[max(0, end - window) : end], predicted


def batches_by_tokens(pieces: Iterator[tuple[list[int], list[int]]], batch_tokens: int) -> Iterator[list]:
    batch, longest = [], 0
    for piece in pieces:
        longest = max(longest, len(piece[0]))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], len(piece[0])
        batch.append(piece)
    if batch:
        yield batch


# ---- results ----


def describe(config: Config, model: Transformer, tokenizer: Tokenizer) -> dict:
    protocol = ("protocol", "shots", "max_prompt", "bos", "limit") if config.task == "mmlu" else ()
    return {
        "model": config.model,
        "task": config.task,
        "data": config.data,
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "context_window": model.config.max_seq_len,
        "tokenizer_sha256": tokenizer.sha256,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    } | {name: getattr(config, name) for name in protocol}


def print_table(rows: dict[str, float], form: str):
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {form.format(value):>10}")


def main(config: Config):
    for name, least in (("shots", 0), ("limit", 0), ("max_prompt", 1), ("batch_tokens", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least {least}")
    lines = Path(config.out).with_suffix(".jsonl") if config.out else None
    if config.out:
        if not config.out.endswith(".json"):
            raise ValueError(f"--out {config.out} must end in .json; the lines go beside it, in .jsonl")
        for path in (Path(config.out), lines):
            if path.exists():
                raise ValueError(f"--out: {path} exists; choose another name")
        lines.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(config.model, config.tokenizer, config.dtype)
    started, records = time.perf_counter(), []
    if config.task == "mmlu":
        scores, records = run_choices(model, tokenizer, config)
        print_table(scores["subjects"], "{:.1%}")
        print()
        print_table({"micro": scores["micro"], "macro": scores["macro"]} | scores["categories"], "{:.1%}")
        ties, cut = scores["ties"], scores["cut_from_the_left"]
        print(f"\n{config.protocol}, {config.shots} shots, kept {scores['shots_kept']}; {ties} ties, {cut} prompts cut")
    else:
        scores = run_perplexity(model, tokenizer, config)
        print_table(scores, "{:,.6g}")
    if config.out:
        if records:
            lines.write_text("".join(json.dumps(record) + "\n" for record in records))
        seconds = round(time.perf_counter() - started, 1)
        result = describe(config, model, tokenizer) | {"seconds": seconds, "scores": scores}
        Path(config.out).write_text(json.dumps(result, indent=2))
        print(f"wrote {config.out}" + (f" and {lines}" if records else ""))


if __name__ == "__main__":
    run_command(main, Config)
