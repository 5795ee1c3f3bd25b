"""Grades: what an answer is worth.

grade(question, answer) makes the fields of a question's record, the scores among them. An answer is
the log-probabilities of the choices or, where the model writes, a text.
"""

import re

import torch

from lib.prompts import Question

# ---- choices ----


def grade_letter(question: Question, logprobs: list[float]) -> dict:
    pick = logprobs.index(max(logprobs))  # the first of equals
    tie = logprobs.count(max(logprobs)) > 1
    scores = {"acc": float(pick in question.gold)}
    return {"logprobs": logprobs, "pick": pick, "tie": tie, "scores": scores}


def grade_choice(question: Question, logprobs: list[float]) -> dict:
    """acc by the sum of log-probabilities, acc_norm by the sum a character of the choice."""
    record = grade_letter(question, logprobs)
    sizes = question.sizes
    per_character = [logprob / max(1, size) for logprob, size in zip(logprobs, sizes)]
    norm = float(per_character.index(max(per_character)) in question.gold)
    return record | {"scores": record["scores"] | {"acc_norm": norm}}


def grade_truthfulqa(question: Question, logprobs: list[float]) -> dict:
    """mc1: whether the likeliest choice is true. mc2: the probability of all that are true."""
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
