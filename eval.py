"""Measure a model: MMLU, BIG-Bench Hard, GSM8K, multiple choice, perplexity, passkey retrieval, by named protocols.

    python eval.py --model out/RUN --task mmlu --data DIR --out results.json
    python eval.py --model out/RUN --task perplexity --data data/stdlib
    python eval.py --compare a.json b.json

1. A task, such as `mmlu`, yields `Question`s: a context as ids, and the choices or the text that may follow it.
2. `make_batches` lays them out: alike in length, what the questions of a subject begin with in common set apart.
3. `score` gives log-probabilities, `write` text; every process has its share of the batches, the first collects.
4. The task's grade makes a record of each answer, `summarize` and `report` the tables.

A score here is that of the protocol's reference code, and depends neither on the batch nor on the processes. To bring
your own task, write lines {"context": ..., "choices": [...], "answer": 0} for --task choices, or a function like `arc`.
"""

from lib.cli import git_commit, run_command  # isort: skip (first: lib refuses old Pythons and Windows)

import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data import TokenDataset, Tokenizer, find_files, read_documents, read_meta
from lib import probe
from lib.files import write_whole
from lib.identity import weights_sha256
from lib.records import parse_json, read_json
from lib.results import (
    append_lines,
    check_line,
    check_out,
    check_same,
    question_hash,
    read_pairs,
    read_result,
    write_all,
)
from lib.runs import read_run
from lib.stream import TextStream
from model import KVCache, Transformer
from sample import Decoder, generate, load_model

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

BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()

GSM8K_EXAMPLES = """
Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there will be 21 trees. How many trees did the grove workers plant today?
A: There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been 21 - 15 = 6. The answer is 6.

Q: If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?
A: There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.

Q: Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?
A: Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they had 74 - 35 = 39. The answer is 39.

Q: Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason give to Denny?
A: Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The answer is 8.

Q: Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?
A: Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. The answer is 9.

Q: There were nine computers in the server room. Five more computers were installed each day, from monday to thursday. How many computers are now in the server room?
A: There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers were added. 9 + 20 is 29. The answer is 29.

Q: Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf balls did he have at the end of wednesday?
A: Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.

Q: Olivia has $23. She bought five bagels for $3 each. How much money does she have left?
A: Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. 23 - 15 is 8. The answer is 8.
"""  # noqa: E501  (Wei et al. 2022, arXiv:2201.11903, table 20)

TRUTHFULQA_EXAMPLES = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""  # the primer of the paper (Lin et al. 2022, arXiv:2109.07958)


@dataclass
class Config:
    """Measure a model."""

    model: tuple[str, ...] = ()         # a run or checkpoint folder, a Hugging Face or Meta folder, or a llama2.c .bin
    task: Literal["mmlu", "bbh", "gsm8k", "arc", "hellaswag", "truthfulqa", "choices", "perplexity", "passkey", ""] = ""
    """choices is any .jsonl of {context, choices, answer}"""
    data: str = ""
    """mmlu: the folder with dev/ and test/; bbh: with bbh/ and cot-prompts/; perplexity: a dataset or text files;
    passkey: nothing; else the file of questions"""
    out: str = ""                       # results as JSON; one line a question goes beside it in .jsonl, a table in .md
    compare: tuple[str, ...] = ()       # instead: two such results, whose difference is told from chance
    checkpoints: Literal["last", "all"] = "last"  # all: curves over every checkpoint of the runs that --model names
    tokenizer: str = ""                 # where the model's folder holds none
    protocol: str = ""                  # mmlu: hendrycks, instructeval, harness; bbh: instructeval, cot; else the first
    shots: int = -1                     # examples before each question; -1 is the protocol's number
    subjects: str = ""                  # mmlu and bbh: only these, divided by commas
    lengths: str = ""                   # passkey: tokens of the prompts, as 1024,2048; else 1/4, 1/2, all that fits
    limit: int = 0                      # only the first so many questions of a subject; 0 is all, of passkey 10
    max_prompt: int = 0                 # tokens; a longer prompt loses examples, then its left; 0 is the protocol's
    bos: bool = True                    # begin prompts with BOS
    chat: bool = False                  # wrap prompts as LLaMA-2's chat models know them: [INST] … [/INST]
    batch_tokens: int = 0
    """tokens in a forward pass, padding included; caches may hold 4 times that; 0 is 16,384 on a GPU, 2,048 on a CPU"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    anyway: bool = False                # also measure a run of code that computes something else than this


# ---- questions ----

Pair = tuple[list[int], list[int]]  # ids of a context, and of what may follow it


@dataclass
class Question:
    """A context and either the choices that may follow it, the likeliest being the answer, or the text that should."""

    subject: str
    index: int                   # in the subject's file
    context: list[int]
    choices: list[Pair] = field(default_factory=list)  # none where the model writes
    gold: list[int] = field(default_factory=list)      # the choices that are right
    target: str = ""             # the text that is right
    shots: int = 0               # examples that the context has kept
    cut: int = 0                 # tokens lost from its left, when even without examples it was too long
    sizes: list[int] = field(default_factory=list)     # characters of the choices; bytes and words of a document
    sha256: str = ""             # of the question's own text and the right answers, for any model
    document: str = ""           # of a window of a dataset, the document in which it starts


def encode(config: Config, tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(f"[INST] {text} [/INST]" if config.chat else text, bos=config.bos)


def pair(config: Config, tokenizer: Tokenizer, context: str, text: str) -> Pair:
    """The ids of context, and those that text adds after it.

    Both are encoded together: sentencepiece begins a text with a blank of its own (LLaMA-2 makes two ids of " A", and
    one after "Answer:"). A tokenizer whose pieces join the end of the one and the beginning of the other encodes text
    by itself. Blanks at the end of context go to text; an empty context is BOS. Raises ValueError for a text of no ids.
    """
    stripped = context.rstrip()
    context, text = stripped, context[len(stripped) :] + text
    if config.chat:
        context = f"[INST] {context} [/INST]"
    head = tokenizer.encode(context, bos=config.bos or not context)
    whole = tokenizer.encode(context + text, bos=config.bos or not context)
    choice = whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text)
    if not choice:
        raise ValueError(f"{text!r} has no tokens")
    return head, choice


class Prompts:
    """The few-shot prompts of one subject: a header, as many of the examples as fit, and a question."""

    def __init__(self, config: Config, tokenizer: Tokenizer, header: str, examples: list[str], room: int):
        self.encode, self.room = partial(encode, config, tokenizer), room
        self.header, self.examples = header, examples
        self.sizes = [len(tokenizer.encode(text)) for text in (header, *examples)]

    def fit(self, question: str) -> dict:
        """Context, shots and cut of a Question: examples leave from the end until the prompt has at most room tokens.

        Where to begin is guessed from the sizes of the parts, which saves encoding long prompts many times.
        """
        text = lambda shots: self.header + "".join(self.examples[:shots]) + question
        spare, shots = self.room - self.sizes[0] - len(self.encode(question)), 0
        while shots < len(self.examples) and (spare := spare - self.sizes[1 + shots]) >= 0:
            shots += 1
        ids = self.encode(text(shots))
        while shots < len(self.examples) and len(more := self.encode(text(shots + 1))) <= self.room:
            ids, shots = more, shots + 1
        while len(ids) > self.room and shots:
            shots -= 1
            ids = self.encode(text(shots))
        cut = max(0, len(ids) - self.room)
        return {"context": ids[cut:], "shots": shots, "cut": cut}


def chosen_subjects(config: Config, every: list[str]) -> list[str]:
    named = list(dict.fromkeys(map(str.strip, config.subjects.split(",")))) if config.subjects else every
    for subject in named:
        if subject not in every:
            raise ValueError(f"--subjects {subject} is not one of {config.task}'s {len(every)}, such as {every[0]}")
    return named


def mmlu(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """MMLU as in hendrycks/test: few-shot prompt, one of four letters (Hendrycks et al. 2021, arXiv:2009.03300).

    hendrycks and instructeval have two blanks after "about", as in the original, and use cells as they are in the
    file; harness has one, strips questions, and keeps all examples, cutting the prompt from its left.
    """
    harness = config.protocol == "harness"
    letters = [pair(config, tokenizer, "\nAnswer:", f" {letter}")[1] for letter in "ABCD"]
    room -= max(map(len, letters)) - 1 if config.protocol != "instructeval" else 0
    for subject in chosen_subjects(config, sorted(sum(CATEGORIES.values(), []))):
        words = " ".join(subject.split("_"))
        blanks = " " if harness else "  "
        header = f"The following are multiple choice questions (with answers) about{blanks}{words}.\n\n"
        dev, test = (read_mmlu(Path(config.data) / split / f"{subject}_{split}.csv") for split in ("dev", "test"))
        if len(dev) < config.shots:
            raise ValueError(f"--shots {config.shots} is more than the {len(dev)} examples of {subject}")
        ask = lambda row: mmlu_question([row[0].strip() if harness else row[0], *row[1:]])
        examples = [f"{ask(row)} {row[5]}\n\n" for row in dev[: config.shots]]
        if harness:
            header, examples = header + "".join(examples), []
        prompts = Prompts(config, tokenizer, header, examples, room)
        for index, row in enumerate(test[: config.limit or None]):
            fitted = prompts.fit(ask(row)) | ({"shots": config.shots} if harness else {})
            choices = [(fitted["context"], ids) for ids in letters] if config.protocol != "instructeval" else []
            gold = ["ABCD".index(row[5])]
            known = {"target": row[5], "sha256": question_hash(subject, row)}
            yield Question(subject, index, choices=choices, gold=gold, **known, **fitted)


def mmlu_question(row: list[str]) -> str:
    return row[0] + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5])) + "\nAnswer:"


def read_mmlu(path: Path) -> list[list[str]]:
    """The rows of a file without header: question, four choices, letter. Raises ValueError naming file and row."""
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


def bbh(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """BIG-Bench Hard (Suzgun et al. 2022, arXiv:2210.09261): directly, the first three examples being the shots and not
    asked, or with the authors' chains of thought."""
    for subject in chosen_subjects(config, BBH_TASKS):
        path = Path(config.data) / "bbh" / f"{subject}.json"
        examples = read_json(path, "examples")["examples"]
        if not isinstance(examples, list):
            raise ValueError(f"{path}: examples must be a list and is a {type(examples).__name__}")
        for number, example in enumerate(examples):
            fields = example if isinstance(example, dict) else {}
            if not all(isinstance(fields.get(name), str) for name in ("input", "target")):
                raise ValueError(f"{path}: example {number} must have the texts input and target")
        first, shots, header = 0, [], ""
        if config.protocol == "cot":
            file = Path(config.data) / "cot-prompts" / f"{subject}.txt"
            if not file.exists():
                raise ValueError(f"{file} is missing; --data must hold bbh/ and cot-prompts/ of BIG-Bench-Hard")
            header = read_text(file).split("-----\n")[-1]
            ask = lambda example: f"\n\nQ: {example['input']}\nA: Let's think step by step."
        else:
            first = 3
            ask = lambda example: f"{example['input']}\nAnswer:"
            shots = [f"{ask(example)} {example['target']}\n\n" for example in examples[: config.shots]]
        prompts = Prompts(config, tokenizer, header, shots, room)
        for index, example in list(enumerate(examples))[first:][: config.limit or None]:
            fitted = prompts.fit(ask(example)) | ({"shots": 3} if config.protocol == "cot" else {})
            sha256 = question_hash(subject, example["input"], example["target"])
            yield Question(subject, index, target=example["target"], sha256=sha256, **fitted)


def gsm8k(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """Grade-school problems (Cobbe et al. 2021, arXiv:2110.14168) after the eight solved ones of Wei et al. 2022."""
    shots = [f"{text}\n\n" for text in GSM8K_EXAMPLES.strip().split("\n\n")[: config.shots]]
    prompts = Prompts(config, tokenizer, "", shots, room)
    rows = list(read_rows(Path(config.data)))[: config.limit or None]
    for index, (place, row) in enumerate(rows):
        with named(place):
            asked, answer = text_of(row, "question"), text_of(row, "answer")
            target = answer.split("####")[-1].strip()
            known = {"target": target, "sha256": question_hash("gsm8k", asked, target)}
            yield Question("gsm8k", index, **known, **prompts.fit(f"Q: {asked}\nA:"))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def text_of(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a text and is a {type(row[name]).__name__}")
    return row[name]


def texts_of(row: dict, name: str) -> list[str]:
    if not isinstance(row[name], list) or not all(isinstance(part, str) for part in row[name]):
        raise ValueError(f"{name} must be a list of texts")
    return row[name]


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, object) of a .jsonl, or of a .json that holds a list. Raises ValueError naming them."""
    if not path.is_file():
        raise ValueError(f"--data {path} is not a file of questions")
    whole = read_text(path)
    parts = [whole] if path.suffix == ".json" else whole.split("\n")
    for number, part in enumerate(parts, 1):
        try:
            rows = json.loads(part) if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number + error.lineno - 1}: not JSON ({error.msg})") from None
        except (RecursionError, ValueError):  # Python bounds depth, and the digits of an integer
            problem = "nested too deeply, or a number of too many digits"
            raise ValueError(f"{path}:{number}: {problem}") from None
        rows = rows if isinstance(rows, list) else [rows]
        for place, row in enumerate(rows, 1):
            name = f"{path}:{number}" if path.suffix != ".json" else f"{path}: question {place}"
            if not isinstance(row, dict):
                raise ValueError(f"{name}: not an object but {str(row)[:40]}")
            yield name, row


@contextlib.contextmanager
def named(place: str):
    """An object of a file that lacks something raises one ValueError that says where."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place}: no field {error}") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def by_likelihood(parse: Callable[[dict], Iterator[tuple[str, str, list[str], list[int]]]], header: str = ""):
    """A task of multiple choice from parse: an object of the file to (subject, context, choices, the right ones)."""

    def task(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
        counts = Counter()
        for place, row in read_rows(Path(config.data)):
            with named(place):
                for subject, context, choices, gold in parse(row):
                    if config.limit and counts[subject] >= config.limit:
                        continue
                    if not choices or not gold or not all(0 <= i < len(choices) for i in gold):
                        raise ValueError(f"answer {gold} is not one of its {len(choices)} choices")
                    pairs = [pair(config, tokenizer, header + context, f" {choice}") for choice in choices]
                    longest = max(len(head) + len(tail) - 1 for head, tail in pairs)
                    if max(len(tail) for _, tail in pairs) > room:
                        raise ValueError(f"a choice of {longest} tokens does not fit the context window of {room}")
                    cuts = [max(0, len(head) + len(tail) - 1 - room) for head, tail in pairs]
                    pairs = [(head[cut:], tail) for cut, (head, tail) in zip(cuts, pairs)]
                    same = pairs[0][0]  # one list for all choices where it can be, by which they are put together
                    pairs = [(same if head == same else head, tail) for head, tail in pairs]
                    sizes = [len(choice) for choice in choices]
                    known = {"sizes": sizes, "cut": max(cuts)}
                    known |= {"sha256": question_hash(subject, context, choices, gold)}
                    yield Question(subject, counts[subject], same, pairs, gold, **known)
                    counts[subject] += 1

    return task


def parse_choices(row: dict):
    answer = row["answer"]
    if type(answer) is not int:
        raise ValueError(f"answer {answer!r} must be the number of a choice, from 0")
    if not all(map(str.strip, texts_of(row, "choices"))):
        raise ValueError("a choice is empty")
    yield str(row.get("subject", "choices")), text_of(row, "context"), row["choices"], [answer]


def parse_arc(row: dict):
    """ARC (Clark et al. 2018, arXiv:1803.05457) as AI2 published it or as Hugging Face has it."""
    question = row["question"]
    choices = row["choices"] if isinstance(question, str) else question["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    question = question if isinstance(question, str) else question["stem"]
    right = texts_of(choices, "label").index(row["answerKey"])
    yield "arc", f"Question: {question}\nAnswer:", texts_of(choices, "text"), [right]


def parse_hellaswag(row: dict):
    """HellaSwag (Zellers et al. 2019, arXiv:1905.07830), cleaned of WikiHow's brackets as the harness does."""
    clean = lambda text: re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = list(map(clean, texts_of(row, "endings")))
    yield "hellaswag", clean(context), endings, [int(row["label"])]


def parse_truthfulqa(row: dict):
    """Twice: mc1 has one true choice, mc2 several (mc_task.json of the authors, or Hugging Face's)."""
    for name in ("mc1", "mc2"):
        targets = row[f"{name}_targets"]
        if "labels" in targets:
            if len(texts_of(targets, "choices")) != len(targets["labels"]):
                raise ValueError("choices and labels are not as many")
            targets = dict(zip(targets["choices"], targets["labels"]))
        gold = [i for i, label in enumerate(targets.values()) if label]
        yield name, f"Q: {row['question']}\nA:", list(targets), gold


def perplexity(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """Every document of text files, in windows; or of a dataset folder's validation split every window by itself, as
    training measures it. The windows stand as choices whose log-probabilities are then added up."""
    path = Path(config.data)
    if (path / "meta.json").exists():
        meta = read_meta(path)
        if "template" in meta:
            raise ValueError(f"--data {path} holds conversations; perplexity is that of text")
        largest = max((file["tokens"] for file in meta["splits"]["val"]["files"]), default=0)
        val = TokenDataset(path, "val", max(1, min(room, largest - 1)))
        if meta["tokenizer"]["sha256"] != tokenizer.sha256:
            raise ValueError(f"--data {path} was made with another tokenizer than the model's {tokenizer.name}")
        begins = [np.flatnonzero(tokens == meta["bos"]) for tokens in val.files]
        for index in range(len(val))[: config.limit or None]:
            batch = val.batch([index])
            targets = batch.targets[0].tolist()
            size = [round(len(targets) * val.bytes_per_target, 3)]  # in proportion to the tokens
            (file, start, _) = val.pieces(index)[0]
            document = f"file {file} document {np.searchsorted(begins[file], start, 'right')}"
            first = batch.tokens[0, :1].tolist()
            known = {"sizes": size, "document": document}
            known |= {"sha256": question_hash(first, targets, size)}
            yield Question(str(path), index, first, [(first, targets)], **known)
        return
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    for file in find_files((config.data,), path):
        index = 0
        for text in filter(str.strip, read_documents(file)):
            if config.limit and index >= config.limit:
                break
            ids = tokenizer.encode(text, bos=True)
            sizes = [len(text.encode()), len(re.split(r"\s+", text))]  # words as lm-evaluation-harness counts them
            known = {"sizes": sizes, "sha256": question_hash(text)}
            yield Question(str(file), index, ids[:1], list(rolling_windows(ids, room)), **known)
            index += 1


def rolling_windows(ids: list[int], window: int) -> Iterator[Pair]:
    """(context, new tokens): each token after the first is new once, the last window with as much context as fits.

    >>> list(rolling_windows([1, 5, 6, 7, 8], 3))
    [([1], [5, 6, 7]), ([5, 6, 7], [8])]
    """
    for start in range(1, len(ids), window):
        end = min(start + window, len(ids))
        yield ids[max(0, end - 1 - window) : start], ids[start:end]


def passkey(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """A number hidden at a random place of a long dull text (Mohtashami and Jaggi 2023, arXiv:2305.16300), which shows
    how far back a model can look (Chen et al. 2023, arXiv:2306.15595). The numbers are always the same ones."""
    dull = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    begin = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
    )
    shortest = len(encode(config, tokenizer, begin + passkey_line(99_999) + PASSKEY_QUESTION)) + 8
    try:
        lengths = [int(length) for length in config.lengths.split(",")] if config.lengths else []
    except ValueError:
        raise ValueError(f"--lengths {config.lengths} must be numbers of tokens divided by commas") from None
    for length in lengths or [most for most in (room // 4, room // 2, room) if most >= shortest] or [room]:
        if not shortest <= length <= room:
            raise ValueError(f"--lengths {length} must lie between {shortest} and {room}, what the model can read")
        repeats = max(0, length - shortest) * 5 // len(tokenizer.encode(dull * 5))
        for index in range(config.limit or 10):
            draw = random.Random(f"{length} {index}")
            key, before = draw.randint(10_000, 99_999), draw.randint(0, repeats)
            text = begin + (dull * before).strip() + passkey_line(key) + (dull * (repeats - before)).strip()
            ids = encode(config, tokenizer, text + PASSKEY_QUESTION)
            sha256 = question_hash(length, index, key)
            yield Question(str(length), index, ids, target=str(key), sha256=sha256)


PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"


def passkey_line(key: int) -> str:
    return f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"


# ---- answers ----


def grade_letter(question: Question, logprobs: list[float]) -> dict:
    pick = logprobs.index(max(logprobs))  # the first of equals
    scores = {"acc": float(pick in question.gold)}
    return {"logprobs": logprobs, "pick": pick, "tie": logprobs.count(max(logprobs)) > 1, "scores": scores}


def grade_choice(question: Question, logprobs: list[float]) -> dict:
    """acc by the sum of log-probabilities, acc_norm by the sum divided by the characters of the choice."""
    record = grade_letter(question, logprobs)
    per_character = [logprob / max(1, size) for logprob, size in zip(logprobs, question.sizes)]
    norm = float(per_character.index(max(per_character)) in question.gold)
    return record | {"scores": record["scores"] | {"acc_norm": norm}}


def grade_truthfulqa(question: Question, logprobs: list[float]) -> dict:
    """mc1: whether the likeliest choice is true. mc2: the probability of the true choices among all."""
    record = grade_letter(question, logprobs)
    p = torch.tensor(logprobs, dtype=torch.float64).softmax(0)
    score = record["scores"]["acc"] if question.subject == "mc1" else p[question.gold].sum().item()
    return record | {"scores": {question.subject: score}}


def grade_document(question: Question, logprobs: list[float]) -> dict:
    tokens = sum(len(new) for _, new in question.choices)
    sizes = dict(zip(("bytes", "words"), question.sizes))
    document = {"document": question.document} if question.document else {}
    return {"nats": -sum(logprobs), "num_tokens": tokens} | sizes | document


def grade_beginning(question: Question, text: str) -> dict:
    return {"text": text, "scores": {"acc": float(text.strip().startswith(question.target))}}


def grade_number(question: Question, text: str) -> dict:
    return {"text": text, "scores": {"acc": float(re.findall(r"\d+", text)[:1] == [question.target])}}


def grade_chain(question: Question, text: str) -> dict:
    """BIG-Bench Hard with chains of thought: exact match of what follows the last `answer is `."""
    found = text.split("answer is ")[-1].strip().removesuffix(".")
    return {"text": text, "scores": {"acc": float(found == question.target)}}


def grade_gsm8k(question: Question, text: str) -> dict:
    """strict: the first number after `The answer is `. flexible: the last number anywhere."""
    strict = re.findall(r"The answer is (\-?[0-9\.\,]+).", text)
    flexible = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    plain = lambda number: re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", number)))
    found = {"strict": strict[:1], "flexible": [first or second for first, second in flexible[-1:]]}
    right = {name: [plain(number) for number in numbers] == [plain(question.target)] for name, numbers in found.items()}
    return {"text": text, "scores": {name: float(hit) for name, hit in right.items()}}


@dataclass(frozen=True)
class Protocol:
    """Whose prompts, answers and averages: what a score is measured by."""

    questions: Callable[[Config, Tokenizer, int], Iterator[Question]]
    grade: Callable[..., dict]
    shots: int = 0
    most_shots: int = 0
    max_prompt: int = 0          # tokens; 0 is what the context window holds
    max_new_tokens: int = 0      # 0: nothing is written, choices are scored
    stop: tuple[str, ...] = ()   # what ends an answer, besides EOS
    average: str = "micro"       # over questions, or macro: over subjects
    published: tuple[tuple[str, str], ...] = ()  # (model, percent) by this protocol


PROTOCOLS = {
    "mmlu": {
        "hendrycks": Protocol(
            mmlu, grade_letter, 5, 99, max_prompt=2048,
            published=(
                ("LLaMA-1 7B / 13B / 65B (paper)", "35.1 / 46.9 / 63.4"),
                ("LLaMA-2 7B / 13B / 70B (paper)", "45.3 / 54.8 / 68.9"),
                ("Falcon 7B / 40B (LLaMA-2 paper)", "26.2 / 55.4"),
            ),
        ),
        "instructeval": Protocol(
            mmlu, grade_beginning, 5, 99, max_prompt=2048, max_new_tokens=2,
            published=(
                ("LLaMA-1 7B / 13B / 65B", "35.2 / 46.2 / 62.6"),
                ("GOAT-7B-Community (its card)", "49.31"),
                ("Alpaca-7B", "41.6"), ("Vicuna-13B", "49.7"), ("RedPajama-INCITE-7B-Instruct", "38.1"),
            ),
        ),
        "harness": Protocol(mmlu, grade_letter, 5, 99),
    },
    "bbh": {
        "instructeval": Protocol(
            bbh, grade_beginning, 3, 3, max_prompt=2048, max_new_tokens=32, average="macro",
            published=(
                ("LLaMA-1 7B / 13B / 65B", "30.9 / 37.1 / 42.6"),
                ("LLaMA-1 7B / 13B / 65B (paper, direct)", "30.3 / 37.0 / 43.5"),
                ("LLaMA-2 7B / 13B / 70B (paper, direct)", "32.6 / 39.4 / 51.2"),
                ("GOAT-7B-Community (its card)", "35.7"),
                ("Alpaca-7B", "33.3"), ("Vicuna-13B", "37.1"), ("RedPajama-INCITE-7B-Instruct", "31.3"),
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
    "truthfulqa": {"harness": Protocol(by_likelihood(parse_truthfulqa, TRUTHFULQA_EXAMPLES), grade_truthfulqa)},
    "choices": {"harness": Protocol(by_likelihood(parse_choices), grade_choice)},
    "perplexity": {"windows": Protocol(perplexity, grade_document)},
    "passkey": {"passkey": Protocol(passkey, grade_number, max_new_tokens=8)},
}  # fmt: skip


# ---- batches ----


class Row(NamedTuple):
    """What the model reads for one question, or for those of its choices that differ in their last token alone."""

    question: int
    ids: list[int]
    begin: int            # from here on the ids are part of the choice
    last: dict[int, int]  # choice: its last token, which need not be read


class Batch(NamedTuple):
    prefix: list[int]     # what all rows begin with, read once
    rows: list[Row]


def rows_of(questions: list[Question]) -> Iterator[Row]:
    for number, question in enumerate(questions):
        if not question.choices:
            yield Row(number, question.context, len(question.context), {})
        alike: dict[tuple, dict[int, int]] = defaultdict(dict)
        for i, (context, choice) in enumerate(question.choices):
            alike[id(context), *choice[:-1]][i] = choice[-1]
        for last in alike.values():
            context, choice = question.choices[next(iter(last))]
            yield Row(number, context + choice[:-1], len(context), last)


def make_batches(questions: list[Question], rows: list[Row], batch_tokens: int, new_tokens: int = 0) -> list[Batch]:
    """Rows in batches of at most batch_tokens read and four times that many kept in caches, alike in length.

    Questions of a subject that keep the same examples begin alike; where that saves enough, their rows come together
    and what they have in common is the batch's prefix.
    """
    groups, others, batches = defaultdict(list), [], []
    for row in rows:
        groups[questions[row.question].subject, questions[row.question].shots].append(row)

    def add(rows: list[Row], prefix: list[int]):
        rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        while rows:
            longest = len(rows[0].ids)
            size = min(batch_tokens // (longest - len(prefix)), 4 * batch_tokens // (longest + new_tokens))
            batches.append(Batch(prefix, rows[: max(1, size)]))
            rows = rows[max(1, size) :]

    for group in groups.values():
        common = os.path.commonprefix([row.ids for row in group])
        common = common[: min(row.begin for row in group) - 1]
        if len(common) * (len(group) - 1) > sum(len(row.ids) for row in group) / 10:
            add(group, common)
        else:
            others += group
    add(others, [])
    return batches


class Reader:
    """A model, and the prefix that it has read last: alone in one cache, and in every row of a wide one."""

    def __init__(self, model: Transformer):
        self.model, self.device = model, model.norm.weight.device
        self.unembedding = model.unembedding.weight.float()  # in bf16, letters would often have equal logits
        self.prefix: list[int] = []
        self.decoder: Decoder | None = None
        self.wide: Decoder | None = None

    def begin(self, prefix: list[int]) -> Decoder | None:
        if prefix != self.prefix:
            self.decoder = Decoder(self.model, 1, len(prefix)) if prefix else None
            if prefix:
                self.decoder.read([prefix])
            self.prefix, self.wide = prefix, None
        return self.decoder

    def spread(self, rows: int, slots: int) -> KVCache:
        """A cache whose rows all hold the prefix; its memory is that of the last one where this suffices."""
        wide = self.wide and self.wide.cache
        if wide is None or wide.keys.size(1) < rows or wide.keys.size(3) < slots:
            self.wide = Decoder(self.model, rows + rows // 4, slots, self.decoder)  # later batches have more rows
        cache = copy.copy(self.wide.cache)
        cache.keys, cache.values, cache.lengths = cache.keys[:, :rows], cache.values[:, :rows], cache.lengths[:rows]
        cache.trim([len(self.prefix)] * rows)
        return cache

    @torch.no_grad()
    def score(self, batch: Batch) -> list[tuple[int, int, float]]:
        """(question, choice, log-probability in nats), in fp32 over the whole vocabulary.

        Rows are padded on the right, which a causal model cannot see. Only the positions that count are projected.
        """
        self.begin(batch.prefix)
        past = len(batch.prefix)
        longest = max(len(row.ids) for row in batch.rows) - past
        tokens = [row.ids[past:] + [0] * (past + longest - len(row.ids)) for row in batch.rows]
        cache = self.spread(len(batch.rows), past + longest) if past else None
        hidden = self.model.hidden(torch.tensor(tokens, device=self.device), cache)  # (B, T, D)
        places, asked = [], []
        for i, row in enumerate(batch.rows):
            places += [i * longest + t - past for t in range(row.begin - 1, len(row.ids))]
            asked += [[token] for token in row.ids[row.begin :]] + [list(row.last.values())]
        most = max(map(len, asked))
        asked = torch.tensor([tokens + [0] * (most - len(tokens)) for tokens in asked], device=self.device)
        x = hidden.flatten(0, 1)[places].float()
        parts = []
        for some, wanted in zip(x.split(1024), asked.split(1024)):  # whose logits exist at a time
            parts.append((some @ self.unembedding.T).log_softmax(-1).gather(1, wanted))
        found = iter(torch.cat(parts).tolist())
        results = []
        for row in batch.rows:
            start = sum(next(found)[0] for _ in range(len(row.ids) - row.begin))
            results += [(row.question, choice, start + end) for choice, end in zip(row.last, next(found))]
        return results

    @torch.no_grad()
    def write(self, batch: Batch, tokenizer: Tokenizer, protocol: Protocol) -> list[tuple[int, int, str]]:
        """(question, 0, the greedy text after it, up to EOS or a stop of the protocol)."""
        streams = [TextStream(tokenizer, row.ids, protocol.stop) for row in batch.rows]
        texts = [""] * len(streams)

        def add(place: int, token: int) -> bool:
            texts[place] += streams[place].add(token)
            return streams[place].finished

        prefix = self.begin(batch.prefix)
        ids = [row.ids for row in batch.rows]
        generate(self.model, ids, protocol.max_new_tokens, end_ids=(tokenizer.eos_id,), stop=add, prefix=prefix)
        return [(row.question, 0, text + stream.end()) for row, text, stream in zip(batch.rows, texts, streams)]


class World:
    """The processes that torchrun started, or one alone. They meet in a store of keys and values."""

    def __init__(self):
        if "RANK" in os.environ:
            self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        else:
            self.store, self.rank, self.size = dist.HashStore(), 0, 1
        self.store.set_timeout(timedelta(days=7))  # a batch may take long; when a process dies torchrun ends them all
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.calls = 0

    def share(self, batches: list[Batch], work: Callable[[Batch], list]) -> Iterator[list]:
        """What work makes of each batch, in order, on the first process; the others do their part and get nothing."""
        self.calls += 1
        for number, batch in enumerate(batches):
            key, mine = f"{self.calls} {number}", number % self.size == self.rank
            if mine and self.rank:
                try:
                    self.store.set(key, json.dumps({"found": work(batch)}))
                except ValueError as error:
                    self.store.set(key, json.dumps({"error": str(error)}))
                    raise
            elif mine:
                yield work(batch)
            elif not self.rank:
                answer = json.loads(self.store.get(key))
                if "error" in answer:
                    raise ValueError(answer["error"])
                yield answer["found"]
                self.store.delete_key(key)
        for other in range(1, self.size):  # the first process holds the store, and must not leave before the others
            if self.rank == other:
                self.store.set(f"{self.calls} done {other}", "")
            elif self.rank == 0:
                self.store.get(f"{self.calls} done {other}")

    def agree(self, value):
        """The first process's value, on all."""
        self.calls += 1
        if self.rank == 0:
            self.store.set(f"{self.calls} value", json.dumps(value))
        return json.loads(self.store.get(f"{self.calls} value"))

    def first(self, act: Callable, *args, **options):
        """What act(*args, **options) returns on the first process, on all.

        Bad input that it finds there is raised on all, as ValueError.
        """
        answer = {}
        if self.rank == 0:
            try:
                answer = {"value": act(*args, **options)}
            except ValueError as error:
                answer = {"error": str(error)}
            except OSError as error:
                answer = {"error": f"{error.filename}: {error.strerror}"}
        answer = self.agree(answer)
        if "error" not in answer:
            return answer["value"]
        for other in range(1, self.size):  # as above, the first process leaves last
            if self.rank == other:
                self.store.set(f"{self.calls} heard {other}", "")
            elif self.rank == 0:
                self.store.get(f"{self.calls} heard {other}")
        raise ValueError(answer["error"])


# ---- an evaluation ----


def digest(question: Question) -> bytes:
    ids = [question.context, *(part for pair in question.choices for part in pair if part is not question.context)]
    return hashlib.sha256(b"".join(np.array([len(part), *part], "<u4").tobytes() for part in ids)).digest()


def read_lines(path: Path, questions: list[Question], keys: list[str]) -> dict[int, dict]:
    """The records of an evaluation that was broken off, by question; a last line that is not whole is deleted.

    Raises ValueError naming the line that is not of this model, these questions, prompts and this
    protocol.
    """
    if not path.exists():
        return {}
    places = {(question.subject, question.index): i for i, question in enumerate(questions)}
    data, done = path.read_bytes(), {}
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = parse_json(line, path)
            check_line(record, record["task"], path)
            place = places[record["subject"], record["index"]]
            if record["key"] != keys[place]:
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out: {path}:{number} is of another evaluation; choose another name") from None
        done[place] = record
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return done


def make_questions(
    reader: Reader, tokenizer: Tokenizer, config: Config, world: World
) -> tuple[list[Question], list[str], dict]:
    """The questions, a key for each, by which its answer is known again, and what the result says
    of them."""
    from tqdm import tqdm

    protocol, window = PROTOCOLS[config.task][config.protocol], reader.model.config.max_seq_len
    room = min(config.max_prompt or window, window - protocol.max_new_tokens)
    if room < 1:
        new = protocol.max_new_tokens
        raise ValueError(f"--task {config.task}: its answers of {new} tokens leave no room in a window of {window}")
    shown = partial(tqdm, file=sys.stderr, disable=world.rank > 0)
    questions = list(shown(protocol.questions(config, tokenizer, room), desc="prompts"))
    if not questions:
        raise ValueError(f"--data {config.data} has no questions")
    digests = [digest(question) for question in questions]
    model_hash = world.agree(weights_sha256(reader.model.named_parameters()) if world.rank == 0 else None)
    about = f"{model_hash} {reader.model.norm.weight.dtype} {config.protocol}".encode()
    sources = [question.sha256.encode() for question in questions]
    wholes = (about + digest + source for digest, source in zip(digests, sources))
    keys = [hashlib.sha256(whole).hexdigest()[:16] for whole in wholes]
    return questions, keys, {
        "questions": len(questions),
        "prompt_tokens": sum(len(question.context) for question in questions),
        "prompts_sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "questions_sha256": hashlib.sha256(b"".join(sources)).hexdigest(),
        "weights_sha256": model_hash,
        "first_prompt": tokenizer.decode(questions[0].context),
    }  # fmt: skip


def run_questions(
    reader: Reader,
    tokenizer: Tokenizer,
    config: Config,
    world: World,
    questions: list[Question],
    keys: list[str],
) -> list[dict]:
    """Ask the questions that are not answered yet; on the first process all records in order."""
    from tqdm import tqdm

    protocol = PROTOCOLS[config.task][config.protocol]
    shown = partial(tqdm, file=sys.stderr, disable=world.rank > 0)
    lines, done = Path(config.out or "-").with_suffix(".jsonl"), {}

    def begin() -> list[int]:
        done.update(read_lines(lines, questions, keys))
        append_lines(lines, [])
        return list(done)

    left_out = set(world.first(begin)) if config.out else set()
    rows = [row for row in rows_of(questions) if row.question not in left_out]
    batch_tokens = config.batch_tokens or (16_384 if reader.device.type == "cuda" else 2_048)
    batches = make_batches(questions, rows, batch_tokens, protocol.max_new_tokens)
    work = partial(reader.write, tokenizer=tokenizer, protocol=protocol) if protocol.max_new_tokens else reader.score
    answers: dict[int, dict] = defaultdict(dict)
    with shown(total=len(questions), initial=len(done), desc=config.task) as bar:
        right = [score for record in done.values() for score in list(record.get("scores", {}).values())[:1]]
        for results in world.share(batches, work):
            new = []
            for number, choice, answer in results:
                question = questions[number]
                answers[number][choice] = answer
                if len(answers[number]) < max(1, len(question.choices)):
                    continue
                found = answers.pop(number)
                found = [found[i] for i in range(len(found))] if question.choices else answer
                if question.choices and not all(map(math.isfinite, found)):
                    place = f"{question.subject} {question.index}"
                    why = "the model is damaged, or was trained to NaN"
                    raise ValueError(f"log-probabilities of {place} are not finite; {why}")
                done[number] = {
                    "task": config.task, "subject": question.subject, "index": question.index,
                    "shots": question.shots, "num_tokens": len(question.context), "cut": question.cut,
                    "gold": question.gold if len(question.gold) > 1 else (question.gold or [question.target])[0],
                    "key": keys[number], "question_sha256": question.sha256,
                } | protocol.grade(question, found)  # fmt: skip
                new.append(done[number])
                right += list(done[number].get("scores", {}).values())[:1]
                bar.update()
            if config.out:
                append_lines(lines, new)
            bar.set_postfix_str(f"{sum(right) / len(right):.1%}" if right else "", refresh=False)
    return [done[number] for number in sorted(done)]


# ---- results ----


def estimate(values: list[float]) -> list[float]:
    """Mean and 95 % interval of values in 0 … 1: Wilson's where all are 0 or 1, else mean ± 1.96 standard errors."""
    n, mean, z = len(values), float(np.mean(values)), 1.96
    if set(values) <= {0.0, 1.0}:
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return [mean, max(0.0, middle - half), min(1.0, middle + half)]
    half = z * float(np.std(values)) / math.sqrt(n)
    return [mean, max(0.0, mean - half), min(1.0, mean + half)]


def summarize(records: list[dict], task: str) -> dict:
    """Every score over all questions (micro), as the mean of the subjects (macro), by subject and category: each as
    [value, low, high], the bounds of 95 % intervals. For perplexity the totals of all documents."""
    counts = {
        "questions": len(records),
        "shots_kept": dict(sorted(Counter(record["shots"] for record in records).items(), reverse=True)),
        "ties": sum(record.get("tie", False) for record in records),
        "cut_from_the_left": sum(record["cut"] > 0 for record in records),
    }
    if task == "perplexity":
        return counts | summarize_documents(records)
    scores = {}
    for name in dict.fromkeys(name for record in records for name in record["scores"]):
        subjects = defaultdict(list)
        for record in records:
            if name in record["scores"]:
                subjects[record["subject"]].append(record["scores"][name])
        gather = lambda names: [value for name in names for value in subjects.get(name, [])]
        variance = sum(float(np.var(values)) / len(values) for values in subjects.values())
        macro, half = float(np.mean(list(map(np.mean, subjects.values())))), 1.96 * math.sqrt(variance) / len(subjects)
        scores[name] = {
            "micro": estimate(gather(subjects)),
            "macro": [macro, max(0.0, macro - half), min(1.0, macro + half)],
            "subjects": {subject: estimate(values) for subject, values in subjects.items()},
        }
        if task == "mmlu":
            found = {category: gather(members) for category, members in CATEGORIES.items()}
            scores[name]["categories"] = {category: estimate(values) for category, values in found.items() if values}
    return counts | {"scores": scores}


def summarize_documents(records: list[dict]) -> dict:
    total = lambda name: sum(record.get(name, 0) for record in records)
    nats, tokens, num_bytes, words = map(total, ("nats", "num_tokens", "bytes", "words"))
    bits = nats / math.log(2) / num_bytes
    # the error of a ratio of sums, documents being independent of each other; of one, its windows
    groups = by_document(records, records)
    groups = groups if len(groups) > 1 else [[record] for record in records]
    excess = lambda record: record["nats"] / math.log(2) - bits * record["bytes"]
    squares = sum(sum(map(excess, group)) ** 2 for group in groups)
    half = 1.96 * math.sqrt(squares) / num_bytes
    scores = {
        "nats_per_token": nats / tokens,
        "bits_per_byte": [bits, bits - half, bits + half],
        "perplexity": finite_exp(nats / tokens),
        "tokens": tokens,
        "bytes": round(num_bytes),
        "documents" if words else "windows": len(records),
    }
    return scores | ({"word_perplexity": finite_exp(nats / words)} if words else {})


def by_document(items: list, records: list[dict]) -> list[list]:
    """Items, each of one of the records of perplexity, in groups by document.

    A window of a dataset belongs to the document in which it starts. Its end may be of others, so
    neighbouring groups are not quite independent; but a document much longer than a window, whose
    windows are alike, is drawn as one.
    """
    groups = defaultdict(list)
    for item, record in zip(items, records):
        groups[record.get("document", (record["subject"], record["index"]))].append(item)
    return list(groups.values())


def finite_exp(nats: float) -> float | None:
    """exp(nats); None where that is more than a float holds, as of words in a text without blanks."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else None


def headline(result: dict) -> tuple[str, list[float]]:
    """The name of a result's main score and its [value, low, high]."""
    scores, task = result["scores"], result["task"]
    if task == "perplexity":
        return "bits a byte", scores["bits_per_byte"]
    average = PROTOCOLS[task][result["protocol"]].average
    name, values = next(iter(scores["scores"].items()))
    return f"{name}, {average}", values[average]


def describe(config: Config, path: str, model: Transformer, tokenizer: Tokenizer) -> dict:
    protocol = PROTOCOLS[config.task][config.protocol]
    names = ("task", "data", "protocol", "shots", "max_prompt", "bos", "chat", "subjects", "limit")
    return {"model": path} | {name: getattr(config, name) for name in names} | {
        "max_new_tokens": protocol.max_new_tokens,
        "stop": protocol.stop,
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "context_window": model.config.max_seq_len,
        "tokenizer_sha256": tokenizer.sha256,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def percent(values: list[float]) -> str:
    return f"{values[0]:.1%} ({values[1]:.1%} to {values[2]:.1%})"


def heading(task: str, protocol: str) -> str:
    return f"# {task}, protocol {protocol}"


def tables(result: dict) -> str:
    """A result in Markdown: its averages beside published scores of the same protocol, what was kept, the subjects."""
    scores, task, name = result["scores"], result["task"], result["protocol"]
    wrapped = "[INST] … [/INST]" if result["chat"] else "raw"
    prompt = f"{result['shots']} shots, {wrapped} prompts, BOS {'on' if result['bos'] else 'off'}, {result['dtype']}"
    lines = [heading(task, name), "", f"{result['model']}: {prompt}", ""]
    if task == "perplexity":
        bits = scores["bits_per_byte"]
        lines += ["| measure | value |", "| --- | ---: |"]
        lines += [f"| bits_per_byte | {bits[0]:.4f} ({bits[1]:.4f} to {bits[2]:.4f}) |"]
        names = ("nats_per_token", "perplexity", "word_perplexity", "tokens", "bytes", "documents", "windows")
        shown = lambda value: "more than a number can hold" if value is None else f"{value:,.6g}"
        lines += [f"| {key} | {shown(scores[key])} |" for key in names if key in scores]
        return "\n".join(lines)
    metrics = scores["scores"]
    heads = ["score", *metrics]
    table = lambda rows: ["| " + " | ".join(row) + " |" for row in [heads, ["---"] + ["---:"] * len(metrics), *rows]]
    line = lambda label, find: [label, *(percent(found) if (found := find(m)) else "" for m in metrics.values())]
    rows = [line(average, lambda m: m[average]) for average in ("micro", "macro")]
    rows += [line(category, lambda m: m["categories"][category]) for category in CATEGORIES
             if category in metrics.get("acc", {}).get("categories", ())]  # fmt: skip
    published = [[model, f"{value}%".replace(" /", "% /")] for model, value in PROTOCOLS[task][name].published]
    rows += [row + [""] * (len(heads) - 2) for row in published]
    kept, ties, cut = scores["shots_kept"], scores["ties"], scores["cut_from_the_left"]
    counts = f"{scores['questions']:,} questions; shots kept {kept}; {ties} ties; {cut} prompts cut from the left"
    subjects = dict.fromkeys(subject for m in metrics.values() for subject in m["subjects"])
    by_subject = [line(subject, lambda m: m["subjects"].get(subject)) for subject in subjects]
    return "\n".join([*lines, *table(rows), "", counts, *(["", *table(by_subject)] if len(subjects) > 1 else [])])


def evaluate(config: Config, path: str, world: World) -> dict | None:
    """Measure one model and write what --out asks for; the result, on the first process."""
    out = Path(config.out)
    reuse = config.checkpoints == "all" and world.first(out.exists)
    if config.out and not reuse:
        lines = json.dumps({"task": config.task, "subject": ""}).removesuffix('"}')
        world.first(check_out, out, jsonl=lines, md=heading(config.task, config.protocol) + "\n")
    model, tokenizer = load_model(path, config.tokenizer, config.dtype, config.anyway)
    if config.out:
        world.first(out.parent.mkdir, parents=True, exist_ok=True)
    started, reader = time.perf_counter(), Reader(model)
    questions, keys, asked = make_questions(reader, tokenizer, config, world)
    result = describe(config, path, model, tokenizer) | asked
    if reuse:
        return world.first(read_result, out, {name: result[name] for name in ALIKE})
    records = run_questions(reader, tokenizer, config, world, questions, keys)
    if world.rank:
        return None
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["scores"] = summarize(records, config.task)
    print(tables(result))
    if config.out:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        files = {out.with_suffix(".jsonl"): lines, out.with_suffix(".md"): tables(result) + "\n"}
        write_all(files | {out: json.dumps(result, indent=2)})
        print(f"\nwrote {out}, {out.with_suffix('.jsonl')} and {out.with_suffix('.md')}")
    return result


FLAGS = ("task", "protocol", "shots", "max_prompt", "bos", "chat", "subjects", "limit")
ALIKE = (  # what two evaluations have in common that are the same one
    *FLAGS, "max_new_tokens", "stop", "dtype", "context_window", "tokenizer_sha256",
    "prompts_sha256", "questions_sha256", "weights_sha256",
)  # fmt: skip


# ---- two results, many checkpoints ----


def compare(paths: tuple[str, ...], draws: int = 4000) -> dict:
    """Second result less the first on the same questions, its 95 % interval from bootstrap, and how likely chance is.

    Questions (of perplexity: documents) are drawn with replacement. Where every score is 0 or 1, McNemar's exact test
    counts who alone is right; else the bootstrap's share beyond 0 is doubled. Chance is that of the
    questions: whether another run of the same settings would do alike is not in it. Raises
    ValueError unless both were asked the same questions in the same way.
    """
    if len(paths) != 2:
        raise ValueError(f"--compare takes two results, not {len(paths)}")
    protocol, pairs = read_pairs((Path(paths[0]), Path(paths[1])))
    task = protocol["task"]
    if protocol["protocol"] not in PROTOCOLS.get(task, {}):
        raise ValueError(f"{paths[0]}: {task} has no protocol {protocol['protocol']} here")
    if task == "perplexity":
        name, drawn = "bits a byte", "documents"
        groups = by_document(pairs, [first for first, _ in pairs])
        nats = [[sum(pair[side]["nats"] for pair in group) for side in (0, 1)] for group in groups]
        both = np.array(nats) / math.log(2)
        weights = np.array([sum(first["bytes"] for first, _ in group) for group in groups])
        if len(groups) < 2:
            raise ValueError("--compare draws documents, and of a single one nothing can be drawn")
    else:
        metric = next(iter(pairs[0][0]["scores"]))
        average = PROTOCOLS[task][protocol["protocol"]].average
        name, drawn = f"{metric}, {average}", "questions"
        pairs = [pair for pair in pairs if metric in pair[0]["scores"]]
        both = np.array([[record["scores"][metric] for record in pair] for pair in pairs])
        counts = Counter(first["subject"] for first, _ in pairs)
        size = lambda first: counts[first["subject"]] if average == "macro" else 1.0
        weights = np.array([1 / size(first) for first, _ in pairs])
        both = both * weights[:, None]
    generator = np.random.default_rng(0)
    difference = both[:, 1] - both[:, 0]
    samples = (generator.integers(len(both), size=len(both)) for _ in range(draws))
    means = np.array([difference[some].sum() / weights[some].sum() for some in samples])
    low, high = np.percentile(means, (2.5, 97.5))
    found = {
        "score": name,
        drawn: len(both),
        "first": both[:, 0].sum() / weights.sum(),
        "second": both[:, 1].sum() / weights.sum(),
        "difference": [difference.sum() / weights.sum(), low, high],
    }
    plain = both / weights[:, None]
    if task != "perplexity" and np.isin(plain.round(9), (0, 1)).all():
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return found | {"only_first": lost, "only_second": gained, "test": "McNemar", "p": mcnemar(gained, lost)}
    p = 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (draws + 1)
    least = 2.0 ** (1 - len(both))  # that two documents speak for one model is a toss of two coins
    return found | {"test": "bootstrap", "p": float(min(1.0, max(p, least)))}


def mcnemar(gained: int, lost: int) -> float:
    """The probability of so uneven a split of the questions that only one of two models has right, if chance made it.

    >>> mcnemar(9, 1)
    0.021484375
    """
    total = gained + lost
    tail = sum(math.comb(total, i) for i in range(min(gained, lost) + 1))
    return min(1.0, tail * 2 / 2**total)


def say_difference(found: dict, paths: tuple[str, ...]):
    scale, unit = (1, "") if found["score"] == "bits a byte" else (100, " points")
    value, low, high = (scale * x for x in found["difference"])
    first, second = scale * found["first"], scale * found["second"]
    drawn = "documents" if "documents" in found else "questions"
    each = f"{paths[0]} {first:.4g}, {paths[1]} {second:.4g}"
    print(f"{found['score']} on {found[drawn]:,} {drawn}: {each}")
    print(f"difference {value:+.3g}{unit}, 95 % interval {low:+.3g} to {high:+.3g}")
    if "only_first" in found:
        print(f"only the first is right {found['only_first']} times, only the second {found['only_second']} times")
    alike, differ = "no more than chance may do: they may be alike", "more than chance: they differ"
    verdict = f"{differ if found['p'] < 0.05 else alike} on such {drawn}"
    print(f"{found['test']}: p = {found['p']:.2g}, {verdict}")
    other = "whether their settings differ, only more seeds of each can tell"
    print(f"This is about these two models; {other}")


def curves(config: Config, world: World):
    """Every checkpoint of every run, measured: a table, and a picture of the main score against step and tokens."""
    out, points, codes = Path(config.out), [], []
    names = Counter(Path(folder).name for folder in config.model)
    if (most := names.most_common(1)[0])[1] > 1:
        raise ValueError(f"--model names two runs called {most[0]}, which the table could not tell apart")
    world.first(check_curve, config)
    for folder in map(Path, config.model):
        record = read_run(folder)["config"]
        steps = sorted(path for path in folder.glob("step_????????") if (path / ".metadata").exists())
        if not steps:
            raise ValueError(f"--model {folder}: this run has no checkpoints")
        flags = {key: value for key, value in record.items() if key not in ("seed", "out", "resume", "anyway")}
        setting = json.dumps([flags, probe.number(probe.read(steps[-1]), codes)])
        for path in steps:
            file = out.with_suffix("") / f"{folder.name}_{path.name}.json"
            result = evaluate(dataclasses.replace(config, out=str(file)), str(path), world)
            step, value = int(path.name[5:]), headline(result) if world.rank == 0 else None
            points.append((setting, folder.name, step, step * record["batch_size"] * record["seq_len"], value))
    if world.rank:
        return
    name = points[0][-1][0]
    lines = [f"| run | step | tokens | {name} | 95 % interval |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {run} | {step} | {tokens:,} | {value[0]:.4f} | {value[1]:.4f} to {value[2]:.4f} |"
              for _, run, step, tokens, (_, value) in points]  # fmt: skip
    rows = [dict(zip(("run", "step", "tokens", "score"), point[1:4] + (point[4][1],))) for point in points]
    draw(points, name, picture := io.BytesIO())
    about = {"task": config.task, "protocol": config.protocol}
    table = json.dumps(about | {"score": name, "points": rows})
    write_all({
        out: table,  # first, since by it the others are known as its own
        out.with_suffix(".md"): "\n".join(lines) + "\n",
        out.with_suffix(".png"): picture.getvalue(),
    })  # fmt: skip
    print("\n".join(lines) + f"\n\nwrote {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")


def check_curve(config: Config):
    """Raise ValueError where --out, or a checkpoint's result beside it, is of something else."""
    out, flags = Path(config.out), {name: getattr(config, name) for name in FLAGS}
    for name in (Path(folder).name for folder in config.model):
        for file in sorted(out.with_suffix("").glob("*_step_????????.json")):
            if file.name[: -len("_step_00000000.json")] == name:
                check_same(file, flags)
    if out.exists():
        check_same(out, {name: flags[name] for name in ("task", "protocol")})
        if "points" not in read_json(out):
            raise ValueError(f"--out: {out} exists and is no curve; choose another name")
    else:
        check_out(out, md=None, png=None)


def draw(points: list[tuple], name: str, picture: io.BytesIO):
    """A line for each setting: the mean of its runs, which differ in the seed alone, and the band that they fill."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for setting in dict.fromkeys(point[0] for point in points):
        mine = [point for point in points if point[0] == setting]
        runs = list(dict.fromkeys(point[1] for point in mine))
        for axes, place, label in zip(panels, (2, 3), ("step", "tokens")):
            places = sorted({point[place] for point in mine})
            at = [[point[4][1][0] for point in mine if point[place] == x] for x in places]
            (line,) = axes.plot(places, list(map(np.mean, at)), "o-", linewidth=1, label=", ".join(runs))
            axes.fill_between(places, list(map(min, at)), list(map(max, at)), alpha=0.2, color=line.get_color())
            axes.set(xlabel=label, ylabel=name)
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


# ---- command line ----


def check_name(out: str):
    if out and not out.endswith(".json"):
        raise ValueError(f"--out {out} must end in .json; the lines go beside it, in .jsonl")


def check(config: Config) -> Config:
    """The flags with the protocol's own values in place of those not typed. Raises ValueError for what cannot be."""
    for name, least in (("shots", -1), ("limit", 0), ("max_prompt", 0), ("batch_tokens", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least {least}")
    if not config.task or not config.model:
        raise ValueError("--model and --task are needed, or --compare with two results")
    check_name(config.out)
    if config.checkpoints == "all" and not config.out:
        raise ValueError("--checkpoints all needs --out X.json, beside which the table and the picture go")
    if config.checkpoints == "last" and len(config.model) > 1:
        raise ValueError(f"--model takes one model, not {len(config.model)}, but with --checkpoints all")
    protocols = PROTOCOLS[config.task]
    name = config.protocol or next(iter(protocols))
    if name not in protocols:
        raise ValueError(f"--protocol {name} is not one of {config.task}'s: {', '.join(protocols)}")
    for flag, users in (("subjects", ("mmlu", "bbh")), ("lengths", ("passkey",))):
        if getattr(config, flag) and config.task not in users:
            raise ValueError(f"--{flag} is for {' and '.join(users)}, not for {config.task}")
    if config.task == "perplexity" and (config.chat or not config.bos):
        flag = "--chat" if config.chat else "--no_bos"
        raise ValueError(f"{flag} does nothing for perplexity, which reads a text as it is, after BOS")
    if config.task == "passkey" and config.data:
        raise ValueError(f"--data {config.data} is not read for passkey, which makes its prompts")
    if config.task != "passkey" and not config.data:
        raise ValueError(f"--data is needed for {config.task}")
    protocol = protocols[name]
    if config.shots > protocol.most_shots or (config.task, name) == ("bbh", "cot") and config.shots not in (-1, 3):
        raise ValueError(f"--shots {config.shots} does not fit {config.task} {name}, which has {protocol.shots}")
    shots = protocol.shots if config.shots < 0 else config.shots
    return dataclasses.replace(config, protocol=name, shots=shots, max_prompt=config.max_prompt or protocol.max_prompt)


def main(config: Config):
    if config.compare:
        if config.out:
            check_name(config.out)
            check_out(Path(config.out))
        say_difference(found := compare(config.compare), config.compare)
        if config.out:
            write_whole(Path(config.out), json.dumps(found, indent=2))
        return
    config, world = check(config), World()
    if config.checkpoints == "all":
        curves(config, world)
    else:
        evaluate(config, config.model[0], world)


if __name__ == "__main__":
    run_command(main, Config)
