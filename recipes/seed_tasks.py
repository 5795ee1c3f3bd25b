"""What schemes that write data begin with: a few tasks with answers, topics, passages."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from instructed import KNOWN, asked_of, subjects

from lib.errors import BadInput
from lib.record_files import read_records


def read_tasks(path: str) -> list[dict]:
    """Tasks of a file; of several instances the first."""
    found = []
    for place, record in read_records(Path(path)):
        first = {"input": ""} | (record.get("instances") or [record])[0]
        task = {"instruction": record.get("instruction"), "input": first["input"], "output": first.get("output")}
        if not all(isinstance(value, str) for value in task.values()):
            raise BadInput(f"{place}: a task has texts as instruction, input and output")
        found.append(task | {"classes": bool(record.get("is_classification"))})
    if len(found) < 3:
        raise BadInput(f"{path} has {len(found)} tasks, and the schemes show three at a time")
    return found


def own_tasks(count: int = 20) -> list[dict]:
    """Questions and answers about the library, for the small writer."""
    asked = [each for wording in range(6) for each in asked_of(subjects()[:KNOWN], wording)]
    some = random.Random(0).sample(asked, count)
    return [{"instruction": each.question, "input": "", "output": each.answer} for each in some]


def lines_of(path: str, between: str) -> tuple[str, ...]:
    text = Path(path).read_text(encoding="utf-8") if path else ""
    return tuple(part.strip() for part in text.split(between) if part.strip())
