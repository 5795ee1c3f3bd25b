"""What an answer is worth, and the protocols: whose prompts, answers and averages a score is measured by."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lib.choices import (
    by_likelihood,
    parse_arc,
    parse_choices,
    parse_hellaswag,
    parse_truthfulqa,
)
from lib.prompts import Question, read_text
from lib.tasks import HERE, bbh, gsm8k, passkey

# ---- choices ----


def grade_letter(question: Question, logprobs: list[float]) -> dict:
    pick = logprobs.index(max(logprobs))  # the first of equals
    tie = logprobs.count(max(logprobs)) > 1
    scores = {"acc": float(pick in question.gold)}
    return {"logprobs": logprobs, "pick": pick, "tie": tie, "scores": scores}


def grade_choice(question: Question, logprobs: list[float]) -> dict:
    """acc by the sum of log-probabilities, acc_norm by the sum divided by the choice's characters."""
    record = grade_letter(question, logprobs)
    sizes = question.sizes
    per_character = [logprob / max(1, size) for logprob, size in zip(logprobs, sizes)]
    norm = float(per_character.index(max(per_character)) in question.gold)
    return record | {"scores": record["scores"] | {"acc_norm": norm}}


def grade_truthfulqa(question: Question, logprobs: list[float]) -> dict:
    """mc1: whether the likeliest choice is true. mc2: the probability of the true ones among all."""
    record = grade_letter(question, logprobs)
    score = record["scores"]["acc"]
    if question.subject != "mc1":
        p = torch.tensor(logprobs, dtype=torch.float64).softmax(0)
        score = p[question.gold].sum().item()
    return record | {"scores": {question.subject: score}}


def grade_document(question: Question, logprobs: list[float]) -> dict:
    tokens = sum(len(new) for _, new in question.choices)
    record = {"nats": -sum(logprobs), "num_tokens": tokens}
    record |= dict(zip(("bytes", "words"), question.sizes))
    if question.document:
        record["document"] = question.document
    return record


# ---- texts ----


def grade_beginning(question: Question, text: str) -> dict:
    right = text.strip().startswith(question.target)
    return {"text": text, "scores": {"acc": float(right)}}


def grade_number(question: Question, text: str) -> dict:
    right = re.findall(r"\d+", text)[:1] == [question.target]
    return {"text": text, "scores": {"acc": float(right)}}


def grade_chain(question: Question, text: str) -> dict:
    """BIG-Bench Hard with chains of thought: exact match of what follows the last `answer is `."""
    found = text.split("answer is ")[-1].strip().removesuffix(".")
    return {"text": text, "scores": {"acc": float(found == question.target)}}


def grade_gsm8k(question: Question, text: str) -> dict:
    """strict: the first number after `The answer is `. flexible: the last number anywhere."""
    strict = re.findall(r"The answer is (\-?[0-9\.\,]+).", text)
    flexible = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    last = [first or second for first, second in flexible[-1:]]
    target, scores = plain_number(question.target), {}
    for name, numbers in (("strict", strict[:1]), ("flexible", last)):
        scores[name] = float([plain_number(number) for number in numbers] == [target])
    return {"text": text, "scores": scores}


def plain_number(number: str) -> str:
    number = re.sub(r"[,$]", "", number)
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", number))


# ---- protocols ----


@dataclass(frozen=True)
class Protocol:
    """Whose prompts, answers and averages: what a score is measured by.

    questions(config, tokenizer, room) yields Questions of at most room tokens; grade(question,
    answer) makes the fields of a record, the answer being log-probabilities or a text.
    """

    questions: Callable[..., Iterator[Question]]
    grade: Callable[..., dict]
    shots: int = 0
    most_shots: int = 0
    max_prompt: int = 0          # tokens; 0 is what the context window holds
    max_new_tokens: int = 0      # 0: nothing is written, choices are scored
    stop: tuple[str, ...] = ()   # what ends an answer, besides EOS
    average: str = "micro"       # over questions, or macro: over subjects
    published: tuple[tuple[str, str], ...] = ()  # (model, percent) by this protocol


TRUTHFULQA_PRIMER = read_text(HERE / "truthfulqa.txt").strip() + "\n\n"  # Lin et al. 2022, arXiv:2109.07958

PROTOCOLS = {
    "bbh": {
        "instructeval": Protocol(
            bbh, grade_beginning, 3, 3, max_prompt=2048, max_new_tokens=32, average="macro",
            published=(
                ("LLaMA-1 7B / 13B / 65B", "30.9 / 37.1 / 42.6"),
                ("LLaMA-1 7B / 13B / 65B (paper, direct)", "30.3 / 37.0 / 43.5"),
                ("LLaMA-2 7B / 13B / 70B (paper, direct)", "32.6 / 39.4 / 51.2"),
                ("GOAT-7B-Community (its card)", "35.7"),
                ("Alpaca-7B", "33.3"),
                ("Vicuna-13B", "37.1"),
                ("RedPajama-INCITE-7B-Instruct", "31.3"),
                ("Falcon 7B / 40B (LLaMA-2 paper)", "28.0 / 37.1"),
            ),
        ),
        "cot": Protocol(
            bbh, grade_chain, 3, 3, max_new_tokens=512, stop=("\n\nQ:",), average="macro",
            published=(("LLaMA-2 7B / 13B / 70B", "38.1 / 47.0 / 65.7"),),
        ),
    },
    "gsm8k": {"cot": Protocol(gsm8k, grade_gsm8k, 8, 8, max_new_tokens=256, stop=("Q:",))},
    "arc": {"harness": Protocol(by_likelihood(parse_arc), grade_choice)},
    "hellaswag": {"harness": Protocol(by_likelihood(parse_hellaswag), grade_choice)},
    "truthfulqa": {
        "harness": Protocol(by_likelihood(parse_truthfulqa, TRUTHFULQA_PRIMER), grade_truthfulqa)
    },
    "choices": {"harness": Protocol(by_likelihood(parse_choices), grade_choice)},
    "passkey": {"passkey": Protocol(passkey, grade_number, max_new_tokens=8)},
}  # fmt: skip


# ---- flags ----


def settled(config, protocols: dict[str, dict[str, Protocol]]):
    """eval.py's flags with the protocol's own values in place of those not typed.

    Raises ValueError for what cannot be.
    """
    check_flags(config)
    known = protocols[config.task]
    name = config.protocol or next(iter(known))
    if name not in known:
        raise ValueError(f"--protocol {name} is not one of {config.task}'s: {', '.join(known)}")
    check_task_flags(config)
    protocol, shots = known[name], config.shots
    fixed = (config.task, name) == ("bbh", "cot") and shots not in (-1, 3)
    if shots > protocol.most_shots or fixed:
        problem = f"does not fit {config.task} {name}, which has {protocol.shots}"
        raise ValueError(f"--shots {shots} {problem}")
    shots = protocol.shots if shots < 0 else shots
    max_prompt = config.max_prompt or protocol.max_prompt
    return dataclasses.replace(config, protocol=name, shots=shots, max_prompt=max_prompt)


def check_out_name(out: str):
    if out and not out.endswith(".json"):
        raise ValueError(f"--out {out} must end in .json; the lines go beside it, in .jsonl")


def check_flags(config):
    """What any task needs of the flags."""
    for name, least in (("shots", -1), ("limit", 0), ("max_prompt", 0), ("batch_tokens", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least {least}")
    if not config.task or not config.model:
        raise ValueError("--model and --task are needed, or --compare with two results")
    check_out_name(config.out)
    if config.checkpoints == "all" and not config.out:
        beside = "beside which the table and the picture go"
        raise ValueError(f"--checkpoints all needs --out X.json, {beside}")
    if config.checkpoints == "last" and len(config.model) > 1:
        more = f"not {len(config.model)}, but with --checkpoints all"
        raise ValueError(f"--model takes one model, {more}")


def check_task_flags(config):
    """What this task needs of the flags, and cannot use."""
    for flag, users in (("subjects", ("mmlu", "bbh")), ("lengths", ("passkey",))):
        if getattr(config, flag) and config.task not in users:
            raise ValueError(f"--{flag} is for {' and '.join(users)}, not for {config.task}")
    if config.task == "perplexity" and (config.chat or not config.bos):
        flag = "--chat" if config.chat else "--no_bos"
        why = "which reads a text as it is, after BOS"
        raise ValueError(f"{flag} does nothing for perplexity, {why}")
    if config.task == "passkey" and config.data:
        raise ValueError(f"--data {config.data} is not read for passkey, which makes its prompts")
    if config.task != "passkey" and not config.data:
        raise ValueError(f"--data is needed for {config.task}")
