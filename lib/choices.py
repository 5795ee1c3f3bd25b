"""Tasks of multiple choice from a file of questions: ARC, HellaSwag, TruthfulQA, your own."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.errors import BadInput
from lib.prompts import Question, named, pair, question_hash, read_rows, text_of, texts_of

# subject, context, choices, the places of the right ones
Parsed = tuple[str, str, list[str], list[int]]


def by_likelihood(parse: Callable[[dict], Iterator[Parsed]], header: str = "") -> Callable:
    """A task from parse, which says what is asked by an object of the file."""

    def task(config, tokenizer, room: int) -> Iterator[Question]:
        counts = Counter()
        for place, row in read_rows(Path(config.data)):
            with named(place):
                for parsed in parse(row):
                    subject = parsed[0]
                    number = counts[subject]
                    if config.limit and number >= config.limit:
                        continue
                    yield make_question(parsed, number, header, config, tokenizer, room)
                    counts[subject] += 1

    return task


def make_question(
    parsed: Parsed,
    number: int,
    header: str,
    config,
    tokenizer,
    room: int,
) -> Question:
    """Raises ValueError for an answer that is none of the choices, or does not fit."""
    subject, context, choices, gold = parsed
    known = all(0 <= place < len(choices) for place in gold)
    if not choices or not gold or not known:
        raise BadInput(f"answer {gold} is not one of its {len(choices)} choices")
    prompt = header + context
    pairs = [pair(config, tokenizer, prompt, f" {choice}") for choice in choices]
    cut, pairs = cut_to(room, pairs)
    first_context, _ = pairs[0]
    question = Question(subject, number, first_context, pairs, gold)
    question.sizes = [len(choice) for choice in choices]
    question.cut = cut
    question.sha256 = question_hash(subject, context, choices, gold)
    return question


def cut_to(room: int, pairs: list) -> tuple[int, list]:
    """Pairs of at most room tokens read, cut from the left, and how many tokens are lost at most.

    Contexts that are equal become one list, by which their choices are put together.
    """
    lengths = [len(context) + len(choice) - 1 for context, choice in pairs]  # the last is not read
    if max(len(choice) for _, choice in pairs) > room:
        problem = f"does not fit the context window of {room}"
        raise BadInput(f"a choice of {max(lengths)} tokens {problem}")
    cuts = [max(0, length - room) for length in lengths]
    contexts = [context[cut:] for cut, (context, _) in zip(cuts, pairs)]
    first = contexts[0]
    kept = []
    for context, (_, choice) in zip(contexts, pairs):
        kept.append((first if context == first else context, choice))
    return max(cuts), kept


def parse_choices(row: dict) -> Iterator[Parsed]:
    answer = row["answer"]
    if type(answer) is not int:
        raise BadInput(f"answer {answer!r} must be the number of a choice, from 0")
    if not all(map(str.strip, texts_of(row, "choices"))):
        raise BadInput("a choice is empty")
    subject = str(row.get("subject", "choices"))
    subject.encode()  # half of a character cannot be printed
    yield subject, text_of(row, "context"), row["choices"], [answer]


def parse_arc(row: dict) -> Iterator[Parsed]:
    """ARC (Clark et al. 2018, arXiv:1803.05457) as AI2 published it or as Hugging Face has it."""
    question = row["question"]
    if isinstance(question, str):
        choices = row["choices"]
    else:
        choices = question["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    if not isinstance(question, str):
        question = question["stem"]
    right = texts_of(choices, "label").index(row["answerKey"])
    context = f"Question: {question}\nAnswer:"
    yield "arc", context, texts_of(choices, "text"), [right]


def parse_hellaswag(row: dict) -> Iterator[Parsed]:
    """HellaSwag (Zellers et al. 2019, arXiv:1905.07830), cleaned as the harness does."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean_hellaswag(ending) for ending in texts_of(row, "endings")]
    right = int(row["label"])
    yield "hellaswag", clean_hellaswag(context), endings, [right]


def clean_hellaswag(text: str) -> str:
    """Without the brackets of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def parse_truthfulqa(row: dict) -> Iterator[Parsed]:
    """Twice: mc1 has one true choice, mc2 several; of the authors' mc_task.json or Hugging Face."""
    for name in ("mc1", "mc2"):
        targets = row[f"{name}_targets"]
        if "labels" in targets:
            if len(texts_of(targets, "choices")) != len(targets["labels"]):
                raise BadInput("choices and labels are not as many")
            targets = dict(zip(targets["choices"], targets["labels"]))
        gold = [place for place, label in enumerate(targets.values()) if label]
        context = f"Q: {row['question']}\nA:"
        yield name, context, list(targets), gold
