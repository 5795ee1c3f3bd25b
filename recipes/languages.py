"""Two languages that everybody has, and how well a model knows each: prose and code of Python's standard library.

    python recipes/languages.py --out FOLDER

Prose is docstrings without the lines of interactive sessions, and the help topics of pydoc; code has neither docstrings
nor comments. FOLDER/prose.jsonl and FOLDER/code.jsonl are for data.py: a line is a module or a topic. Tables of
characters are left out. Bits a byte are comparable over tokenizers, if they are those of the same passages.
"""

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from study import once

from data import Tokenizer
from lib.bits import BIT
from lib.cli import run_command
from lib.files import write_whole
from lib.perplexity import rolling_windows
from lib.sources import find_files

LANGUAGES = ("code", "prose")
SESSION = re.compile(r"^ *(>>>|\.\.\.)( .*)?\n?", re.M)


def languages_of(source: bytes | str) -> dict[str, str]:
    """The two languages of a module.

    >>> languages_of('def f():\\n    "Says a."  # now\\n    print("a")\\n')
    {'code': "def f():\\n    print('a')", 'prose': 'Says a.'}
    """
    tree, prose = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                prose.append(SESSION.sub("", text))
                node.body = node.body[1:] or [ast.Pass()]
    return {"code": ast.unparse(tree), "prose": "\n\n".join(prose)}


def write_languages(folder: Path):
    found = {"code": [], "prose": list(topics.values())}
    for path in find_files(("stdlib",), folder):
        if not {"encodings", "pydoc_data"} & set(path.parts):
            for language, text in languages_of(path.read_bytes()).items():
                found[language].append(text)
    folder.mkdir(parents=True, exist_ok=True)
    for language, texts in found.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
        write_whole(folder / f"{language}.jsonl", "".join(lines))
        print(f"{folder / language}.jsonl: {len(lines):,} documents, {sum(map(len, texts)) / 1e6:.1f} MB")


def dataset(made: Path, language: str, tokenizer: str | Path = "train:4096") -> Path:
    """A language as tokens; the same documents are held out whatever the tokenizer."""
    texts = once(made.with_name("text"), "recipes/languages.py", "--out", made.with_name("text"))
    how = ("--out", made, "--tokenizer", tokenizer, "--val_fraction", 0.1)
    return once(made, "data.py", "--source", texts / f"{language}.jsonl", *how)


def passages(data: Path, count: int, size: int = 600) -> list[str]:
    """Held-out text of a dataset: passages of whole lines, of size to twice size characters, spread evenly."""
    tokenizer, found = Tokenizer(data), []
    for ids in read_split(data):
        passage = ""
        for line in tokenizer.decode(ids).splitlines(keepends=True):
            passage += line
            if len(passage) >= size:
                found += [passage] * (len(passage) <= 2 * size)
                passage = ""
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def fertility(tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """Tokens a word, which is what stands between blanks, and bytes a token.

    >>> fertility(Tokenizer("bytes"), ["a bc", "d\\n"])
    (2.0, 1.0)
    """
    count = sum(len(tokenizer.encode(text)) for text in texts)
    return count / sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts) / count


@torch.no_grad()
def bits(model, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """The bits of each text over the bytes of an average one, so that their mean is the bits a byte of all."""
    found, size = [], np.mean([len(text.encode()) for text in texts])
    for text in texts:
        nats = 0.0
        for before, ids in rolling_windows(tokenizer.encode(text, bos=True), model.config.max_seq_len):
            whole = torch.tensor([before + ids])
            nats -= float(model.log_probs(whole[:, :-1], whole[:, 1:])[0, -len(ids) :].sum())
        found.append(float(nats / BIT / size))
    return found


@dataclass
class Config:
    """Write prose.jsonl and code.jsonl of Python's standard library."""

    out: str


def main(config: Config):
    write_languages(Path(config.out))


if __name__ == "__main__":
    run_command(main, Config)
