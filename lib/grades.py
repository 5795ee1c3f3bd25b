"""Grades: what an answer is worth.

grade(question, answer) makes the fields of a question's record, the scores among them. An answer is
the log-probabilities of the choices or, where the model writes, a text.
"""

import re

import torch

from lib.prompts import Question

# ---- choices ----


def grade_letter(question: Question, logprobs: list[float]) -> dict:
    """acc: whether the likeliest choice is right; of equals, the first one is taken."""
    largest = max(logprobs)
    pick = logprobs.index(largest)
    return {
        "logprobs": logprobs,
        "pick": pick,
        "tie": logprobs.count(largest) > 1,
        "scores": {"acc": float(pick in question.gold)},
    }


def grade_choice(question: Question, logprobs: list[float]) -> dict:
    """acc by the sum of log-probabilities, acc_norm by the sum a character of the choice."""
    record = grade_letter(question, logprobs)
    per_character = []
    for logprob, size in zip(logprobs, question.sizes):
        per_character.append(logprob / max(1, size))
    pick = per_character.index(max(per_character))
    record["scores"]["acc_norm"] = float(pick in question.gold)
    return record


def grade_truthfulqa(question: Question, logprobs: list[float]) -> dict:
    """mc1: whether the likeliest choice is true. mc2: the probability of all that are true."""
    record = grade_letter(question, logprobs)
    score = record["scores"]["acc"]
    if question.subject != "mc1":
        probabilities = torch.tensor(logprobs, dtype=torch.float64).softmax(0)
        score = probabilities[question.gold].sum().item()
    record["scores"] = {question.subject: score}
    return record


def grade_document(question: Question, logprobs: list[float]) -> dict:
    """Nats, and what they are divided by: tokens, and the bytes and words of text."""
    record = {
        "nats": -sum(logprobs),
        "num_tokens": sum(len(new) for _, new in question.choices),
    }
    record |= dict(zip(("bytes", "words"), question.sizes))  # of windows only bytes
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
    answer = text.split("answer is ")[-1].strip().removesuffix(".")
    return {"text": text, "scores": {"acc": float(answer == question.target)}}


def grade_gsm8k(question: Question, text: str) -> dict:
    """strict: the first number after `The answer is `. flexible: the last number anywhere."""
    target = plain_number(question.target)
    after_words = re.findall(r"The answer is (\-?[0-9\.\,]+).", text)
    anywhere = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    strict = flexible = False
    if after_words:
        strict = plain_number(after_words[0]) == target
    if anywhere:
        long, short = anywhere[-1]
        flexible = plain_number(long or short) == target
    scores = {"strict": float(strict), "flexible": float(flexible)}
    return {"text": text, "scores": scores}


def plain_number(number: str) -> str:
    """Without commas, currency, what comes before `#### `, and a full stop at its end."""
    number = re.sub(r"[,$]", "", number)
    number = re.sub(r"(?s).*#### ", "", number)
    return re.sub(r"\.$", "", number)
