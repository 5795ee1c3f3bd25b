"""Protocols: whose prompts, answers and averages a score is measured by. MMLU's are in eval.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lib.choices import (
    by_likelihood,
    parse_arc,
    parse_choices,
    parse_hellaswag,
    parse_truthfulqa,
)
from lib.grades import (
    grade_beginning,
    grade_chain,
    grade_choice,
    grade_gsm8k,
    grade_number,
    grade_truthfulqa,
)
from lib.prompts import Question, read_text
from lib.tasks import HERE, bbh, gsm8k, passkey


@dataclass(frozen=True)
class Protocol:
    """Whose prompts, answers and averages: what a score is measured by.

    questions(config, tokenizer, room) yields Questions of at most room tokens; grade(question,
    answer) makes the fields of a record, the answer being log-probabilities or a text.
    """

    questions: Callable[..., Iterator[Question]]
    grade: Callable[..., dict]
    shots: int = 0               # examples before each question, where --shots is not typed
    most_shots: int = 0          # of --shots
    max_prompt: int = 0          # tokens; 0 is what the context window holds
    max_new_tokens: int = 0      # 0: nothing is written, choices are scored
    stop: tuple[str, ...] = ()   # what ends an answer, besides EOS
    average: str = "micro"       # over questions, or macro: over subjects
    published: tuple[tuple[str, str], ...] = ()  # (model, percent) by this protocol


# six questions and answers before each question (Lin et al. 2022, arXiv:2109.07958)
TRUTHFULQA_PRIMER = read_text(HERE / "truthfulqa.txt").strip() + "\n\n"

# (model, percent) of MMLU by these protocols
MMLU_HENDRYCKS = (
    ("LLaMA-1 7B / 13B / 65B (paper)", "35.1 / 46.9 / 63.4"),
    ("LLaMA-2 7B / 13B / 70B (paper)", "45.3 / 54.8 / 68.9"),
    ("Falcon 7B / 40B (LLaMA-2 paper)", "26.2 / 55.4"),
)
MMLU_INSTRUCTEVAL = (
    ("LLaMA-1 7B / 13B / 65B", "35.2 / 46.2 / 62.6"),
    ("GOAT-7B-Community (its card)", "49.31"),
    ("Alpaca-7B", "41.6"),
    ("Vicuna-13B", "49.7"),
    ("RedPajama-INCITE-7B-Instruct", "38.1"),
)
OTHER_TASKS = {  # by task and name; the first of a task is used where none is named
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
