"""The small model that writes data for recipes: the laptop's, taught four prompts of published schemes.

It answers questions about Python's library as they are, under principles (with thoughts before the answer, as in
SELF-ALIGN, Sun et al. 2023, arXiv:2305.03047), and from a passage (as Self-Specialization retrieves them, Kang et al.
2023, arXiv:2310.00160), and it goes on with a numbered list of questions (Self-Instruct, Wang et al. 2022,
arXiv:2212.10560). The facts are those of recipes/mini.py.
"""

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judging import KINDS, subjects_of
from mini import HELD_OUT, WORDINGS, Asked, Subject, ask, write_lines
from principles import STYLE, principled, with_thoughts
from study import OUT, base, once, train

from lib.sources import find_files

HERE = OUT / "instructed"
KNOWN = 600  # functions and classes that it is told of
DOMAINS = {"dev": (KNOWN, KNOWN + 300), "test": (KNOWN + 300, KNOWN + 700)}  # that it is not
TOLD = len(WORDINGS["module"]) - len(HELD_OUT)  # wordings that it meets


@cache
def subjects() -> list[Subject]:
    return subjects_of(DOMAINS["test"][1])


def asked_of(some: list[Subject], wording: int) -> list[Asked]:
    """Every fact of some functions and classes in this wording."""
    return [ask(subject, kind, wording) for subject in some for kind in KINDS if kind in subject.facts]


@cache
def passages() -> dict[str, str]:
    """What the library's source says first of each function and class, by its full name: module, name, arguments."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in find_files(("stdlib",), root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef):
                found[f"{module}.{node.name}"] = f"# module {module}\ndef {node.name}({ast.unparse(node.args)}):"
            elif isinstance(node, ast.ClassDef):
                found[f"{module}.{node.name}"] = f"# module {module}\nclass {node.name}:"
    return found


def with_passage(passage: str, question: str) -> str:
    """The prompt of a question with what was retrieved for it."""
    return f"{passage}\n\n{question}"


def listed(questions: list[str]) -> str:
    """Self-Instruct's prompt: a numbered list to go on with."""
    lines = [f"{number}. {question}" for number, question in enumerate(questions, 1)]
    return "\n".join(["Come up with a series of tasks:", *lines, f"{len(lines) + 1}."])


def conversations() -> Iterator[dict]:
    """For data.py: each fact in wordings as they are, under principles and from a passage; and lists."""
    known, draw = subjects()[:KNOWN], random.Random(0)
    for wording in range(TOLD):
        for each in asked_of(known, wording):
            if wording < 6:
                yield {"instruction": each.question, "output": each.answer}
            if wording % 2:
                answer = with_thoughts(each.kind, f"{STYLE} {each.answer}")
                yield {"instruction": principled(each.question), "output": answer}
            elif each.subject.full in passages():
                prompt = with_passage(passages()[each.subject.full], each.question)
                yield {"instruction": prompt, "output": each.answer}
    for _ in range(400):
        some = [draw.choice(asked_of([draw.choice(known)], draw.randrange(TOLD))).question for _ in range(16)]
        more = [f"{number}. {question}" for number, question in enumerate(some[8:], 9)]
        yield {"instruction": listed(some[:8]), "output": "\n".join(more).removeprefix("9. ")}


def tune(out: Path, start: Path, rows, seed: int, epochs: float, rate: float = 1e-3) -> Path:
    """A model fine-tuned on conversations, which are written as out.jsonl."""
    chats, data = out.with_suffix(".jsonl"), out.with_name(f"{out.name}_data")
    if not chats.exists():
        write_lines(chats, rows)
    form = ("--template", "plain", "--max_len", 256, "--val_fraction", 0.02)
    once(data, "data.py", "--source", chats, *form, "--tokenizer", start, "--out", data)
    length = ("--learning_rate", rate, "--epochs", epochs, "--eval_tokens", 2048)
    return train(out, "--data", data, "--init_from", start, "--seed", seed, *length)


def writer_of(seed: int) -> Path:
    """The writer of a seed (2 minutes)."""
    return tune(HERE / f"writer_{seed}", base(seed), conversations(), seed, 2, 2e-3)
