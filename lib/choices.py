"""Tasks of multiple choice from a file of questions: ARC, HellaSwag, TruthfulQA, your own."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.prompts import Question, named, pair, question_hash, read_rows, text_of, texts_of

# subject, context, choices, the places of the right ones
Parsed = tuple[str, str, list[str], list[int]]


def by_likelihood(parse: Callable[[dict], Iterator[Parsed]], header: str = "") -> Callable:
    """A task from parse, which says what is asked by an object of the file."""

    def task(config, tokenizer, room: int) -> Iterator[Question]:
        counts = Counter()
        for place, row in read_rows(Path(config.data)):
            with named(place):
                for subject, context, choices, gold in parse(row):
                    if config.limit and counts[subject] >= config.limit:
                        continue
                    if not choices or not gold or not all(0 <= i < len(choices) for i in gold):
                        raise ValueError(f"answer {gold} is not one of its {len(choices)} choices")
                    pairs = [
                        pair(config, tokenizer, header + context, f" {choice}")
                        for choice in choices
                    ]
                    cut, pairs = cut_to(room, pairs)
                    question = Question(subject, counts[subject], pairs[0][0], pairs, gold)
                    question.sizes, question.cut = [len(choice) for choice in choices], cut
                    question.sha256 = question_hash(subject, context, choices, gold)
                    yield question
                    counts[subject] += 1

    return task


def cut_to(room: int, pairs: list) -> tuple[int, list]:
    """Pairs of at most room tokens read, cut from the left, and how many tokens are lost at most.

    Contexts that are equal become one list, by which their choices are put together.
    """
    lengths = [len(head) + len(tail) - 1 for head, tail in pairs]  # the last token is not read
    if max(len(tail) for _, tail in pairs) > room:
        problem = f"does not fit the context window of {room}"
        raise ValueError(f"a choice of {max(lengths)} tokens {problem}")
    cuts = [max(0, length - room) for length in lengths]
    pairs = [(head[cut:], tail) for cut, (head, tail) in zip(cuts, pairs)]
    first = pairs[0][0]
    return max(cuts), [(first if head == first else head, tail) for head, tail in pairs]


def parse_choices(row: dict) -> Iterator[Parsed]:
    answer = row["answer"]
    if type(answer) is not int:
        raise ValueError(f"answer {answer!r} must be the number of a choice, from 0")
    if not all(map(str.strip, texts_of(row, "choices"))):
        raise ValueError("a choice is empty")
    subject = str(row.get("subject", "choices"))
    yield subject, text_of(row, "context"), row["choices"], [answer]


def parse_arc(row: dict) -> Iterator[Parsed]:
    """ARC (Clark et al. 2018, arXiv:1803.05457) as AI2 published it or as Hugging Face has it."""
    question = row["question"]
    choices = row["choices"] if isinstance(question, str) else question["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    question = question if isinstance(question, str) else question["stem"]
    right = texts_of(choices, "label").index(row["answerKey"])
    yield "arc", f"Question: {question}\nAnswer:", texts_of(choices, "text"), [right]


def parse_hellaswag(row: dict) -> Iterator[Parsed]:
    """HellaSwag (Zellers et al. 2019, arXiv:1905.07830), cleaned of WikiHow's brackets as the harness does."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean_hellaswag(ending) for ending in texts_of(row, "endings")]
    yield "hellaswag", clean_hellaswag(context), endings, [int(row["label"])]


def clean_hellaswag(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def parse_truthfulqa(row: dict) -> Iterator[Parsed]:
    """Twice: mc1 has one true choice, mc2 several (mc_task.json of the authors, or Hugging Face's)."""
    for name in ("mc1", "mc2"):
        targets = row[f"{name}_targets"]
        if "labels" in targets:
            if len(texts_of(targets, "choices")) != len(targets["labels"]):
                raise ValueError("choices and labels are not as many")
            targets = dict(zip(targets["choices"], targets["labels"]))
        gold = [i for i, label in enumerate(targets.values()) if label]
        yield name, f"Q: {row['question']}\nA:", list(targets), gold
