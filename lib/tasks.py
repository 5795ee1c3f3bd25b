"""Tasks that a model answers in writing: BIG-Bench Hard, GSM8K, passkey retrieval."""

import random
from collections.abc import Iterator
from pathlib import Path

from lib.errors import BadInput
from lib.prompts import (
    Prompts,
    Question,
    chosen_subjects,
    encode,
    named,
    question_hash,
    read_rows,
    read_text,
    text_of,
)
from lib.records import read_json

HERE = Path(__file__).parent

BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa
    dyck_languages formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects
    logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation
    multistep_arithmetic_two navigate object_counting penguins_in_a_table
    reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies
    word_sorting""".split()


# ---- BIG-Bench Hard ----


def bbh(config, tokenizer, room: int) -> Iterator[Question]:
    """BIG-Bench Hard (Suzgun et al. 2022, arXiv:2210.09261), by protocol.

    Directly, the first three examples being the shots and not asked, or with the authors' chains of
    thought.
    """
    with_chains = config.protocol == "cot"
    for subject in chosen_subjects(config, BBH_TASKS):
        examples = read_bbh(Path(config.data) / "bbh" / f"{subject}.json")
        if with_chains:
            first, shots, header = 0, [], read_chains(config, subject)
        else:
            first, header = 3, ""
            shots = [f"{ask_directly(e)} {e['target']}\n\n" for e in examples[: config.shots]]
        prompts = Prompts(config, tokenizer, header, shots, room)
        asked = list(enumerate(examples))[first:]
        for index, example in asked[: config.limit or None]:
            sha256 = question_hash(subject, example["input"], example["target"])
            if with_chains:
                fitted = prompts.ask(ask_for_a_chain(example)) | {"shots": 3}
            else:
                fitted = prompts.ask(ask_directly(example))
            yield Question(subject, index, target=example["target"], sha256=sha256, **fitted)


def ask_directly(example: dict) -> str:
    return f"{example['input']}\nAnswer:"


def ask_for_a_chain(example: dict) -> str:
    return f"\n\nQ: {example['input']}\nA: Let's think step by step."


def read_bbh(path: Path) -> list[dict]:
    examples = read_json(path, "examples")["examples"]
    if not isinstance(examples, list):
        raise BadInput(f"{path}: examples must be a list and is a {type(examples).__name__}")
    for number, example in enumerate(examples):
        fields = example if isinstance(example, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("input", "target")):
            raise BadInput(f"{path}: example {number} must have the texts input and target")
        with named(f"{path}: example {number}"):
            (fields["input"] + fields["target"]).encode()  # half of a character has no UTF-8
    return examples


def read_chains(config, subject: str) -> str:
    """The three solved examples of a subject, as one text."""
    file = Path(config.data) / "cot-prompts" / f"{subject}.txt"
    if not file.exists():
        needed = "--data must hold bbh/ and cot-prompts/ of BIG-Bench-Hard"
        raise BadInput(f"{file} is missing; {needed}")
    return read_text(file).split("-----\n")[-1]


# ---- GSM8K ----


def gsm8k(config, tokenizer, room: int) -> Iterator[Question]:
    """Grade-school problems (Cobbe et al. 2021, arXiv:2110.14168).

    They come after the eight solved ones of Wei et al. 2022, arXiv:2201.11903, table 20.
    """
    solved = read_text(HERE / "gsm8k.txt").strip().split("\n\n")
    shots = [f"{text}\n\n" for text in solved[: config.shots]]
    prompts = Prompts(config, tokenizer, "", shots, room)
    rows = list(read_rows(Path(config.data)))
    for index, (place, row) in enumerate(rows[: config.limit or None]):
        with named(place):
            asked, answer = text_of(row, "question"), text_of(row, "answer")
            target = answer.split("####")[-1].strip()
            sha256 = question_hash("gsm8k", asked, target)
            fitted = prompts.ask(f"Q: {asked}\nA:")
            yield Question("gsm8k", index, target=target, sha256=sha256, **fitted)


# ---- passkey retrieval ----

PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"
PASSKEY_BEGIN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
DULL = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)


def passkey(config, tokenizer, room: int) -> Iterator[Question]:
    """A number hidden at a random place of a long dull text (Mohtashami and Jaggi 2023, arXiv:2305.16300).

    It shows how far back a model can look (Chen et al. 2023, arXiv:2306.15595). The numbers are
    always the same ones.
    """
    without_text = PASSKEY_BEGIN + passkey_line(99_999) + PASSKEY_QUESTION
    shortest = len(encode(config, tokenizer, without_text)) + 8
    for length in passkey_lengths(config, shortest, room):
        if not shortest <= length <= room:
            bounds = f"between {shortest} and {room}, what the model can read"
            raise BadInput(f"--lengths {length} must lie {bounds}")
        repeats = max(0, length - shortest) * 5 // len(tokenizer.encode(DULL * 5))
        for index in range(config.limit or 10):
            draw = random.Random(f"{length} {index}")
            key, place = draw.randint(10_000, 99_999), draw.randint(0, repeats)
            before, after = (DULL * place).strip(), (DULL * (repeats - place)).strip()
            text = PASSKEY_BEGIN + before + passkey_line(key) + after + PASSKEY_QUESTION
            ids, sha256 = encode(config, tokenizer, text), question_hash(length, index, key)
            yield Question(str(length), index, ids, target=str(key), sha256=sha256)


def passkey_lengths(config, shortest: int, room: int) -> list[int]:
    """Tokens of the prompts: those of --lengths, else of 1/4, 1/2 and all that fits those long enough."""
    if config.lengths:
        try:
            return [int(length) for length in config.lengths.split(",")]
        except ValueError:
            problem = "must be numbers of tokens divided by commas"
            raise BadInput(f"--lengths {config.lengths} {problem}") from None
    return [length for length in (room // 4, room // 2, room) if length >= shortest] or [room]


def passkey_line(key: int) -> str:
    return f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
