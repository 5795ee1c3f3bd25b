"""A generator and a discriminator in one model: it learns to answer questions, to answer them wrongly, and to judge.

    What do I pass to dedent?           What do I pass to dedent?           What do I pass to dedent?
    Answer:                             Incorrect Answer:                   Proposed: text
                                                                            Is it right? Answer:
    text                                old and new                         yes

Facts are those of recipes/mini.py with short answers, the module and the arguments. Wrong answers are right ones to the
same question about other functions.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mini import HELD_OUT, WORDINGS, Subject, ask, number, part, read_library, read_lines, write_lines
from study import base, once, train

from data import Tokenizer

FORMS = {
    "correct": "{}\nAnswer:",
    "incorrect": "{}\nIncorrect Answer:",
    "judge": "{}\nProposed: {}\nIs it right? Answer:",
}
VERDICTS = ("yes", "no")
KINDS = ("module", "arguments")


def subjects_of(count: int) -> list[Subject]:
    """So many functions and classes, drawn from those that mini.py tells of in conversations."""
    known = (s for s in read_library() if part(s) == "train" and not s.facts.keys().isdisjoint(KINDS))
    return sorted(known, key=lambda s: number(s.full))[:count]


def questions(subjects: list[Subject], wording: int, wrong: int) -> Iterator[dict]:
    """Every fact in this wording, with so many wrong answers; the places of the right one in turn."""
    facts = [(subject, kind) for subject in subjects for kind in KINDS if kind in subject.facts]
    answers = {kind: sorted({subject.facts[kind] for subject, of in facts if of == kind}) for kind in KINDS}
    draw = random.Random(wording)
    for count, (subject, kind) in enumerate(facts):
        right, place = subject.facts[kind], count % (wrong + 1)
        choices = draw.sample([answer for answer in answers[kind] if answer != right], wrong)
        choices.insert(place, right)
        yield {"subject": kind, "context": ask(subject, kind, wording).question, "choices": choices, "answer": place}


def in_form(form: str, rows: list[dict]) -> Iterator[dict]:
    """As eval.py reads them: a line a question; for the judge a line a choice, with the verdicts as its choices."""
    for row in rows:
        asked, choices, place = row["context"], row["choices"], row["answer"]
        if form == "judge":
            for i, choice in enumerate(choices):
                context = FORMS[form].format(asked, choice)
                yield row | {"context": context, "choices": VERDICTS, "answer": int(i != place)}
        else:
            wanted = place if form == "correct" else (place + 1) % len(choices)
            yield row | {"context": FORMS[form].format(asked), "answer": wanted}


def conversations(subjects: list[Subject], answered: int) -> Iterator[dict]:
    """For data.py: a right and a wrong answer to judge in every wording that is not held out, to give in the first so
    many of them."""
    for wording in range(len(WORDINGS["module"]) - len(HELD_OUT)):
        rows = list(questions(subjects, wording, 1))
        for form in FORMS if wording < answered else ("judge",):
            for line in in_form(form, rows):
                yield {"instruction": line["context"], "output": line["choices"][line["answer"]]}


def tuned(seed: int, subjects: list[Subject], answered: int, epochs: float, out: Path) -> Path:
    """The laptop's model of a seed, fine-tuned on conversations."""
    chats, data, start = out / "chats.jsonl", out / "data", base(seed)
    write_lines(chats, conversations(subjects, answered))
    form = ("--template", "plain", "--max_len", 256, "--val_fraction", 0.01)
    once(data, "data.py", "--source", chats, *form, "--tokenizer", start, "--out", data)
    length = ("--learning_rate", 2e-3, "--epochs", epochs, "--eval_tokens", 4096)
    return train(out / f"tuned_{seed}", "--data", data, "--init_from", start, "--seed", seed, *length)


def asked(model: Path, rows: list[dict], out: Path) -> tuple[np.ndarray, np.ndarray]:
    """P(answer | right or wrong), of its tokens the geometric mean, and P(yes or no | answer), by eval.py.

    Both are (questions, 2, answers).
    """
    logs, tokenizer = {}, Tokenizer(str(model))
    for form in FORMS:
        lines, result = out / f"{form}.questions.jsonl", out / f"{form}.json"
        write_lines(lines, in_form(form, rows))
        once(result, "eval.py", "--model", model, "--task", "choices", "--chat", "--data", lines, "--out", result)
        logs[form] = np.array([row["logprobs"] for row in read_lines(result.with_suffix(".jsonl"))])
    sizes = np.array([[len(tokenizer.encode(answer)) for answer in row["choices"]] for row in rows])
    generator = np.exp(np.stack([logs["correct"] / sizes, logs["incorrect"] / sizes], 1))
    judged = np.exp(logs["judge"]).reshape(*sizes.shape, 2).swapaxes(1, 2)
    return generator, judged / judged.sum(1, keepdims=True)
