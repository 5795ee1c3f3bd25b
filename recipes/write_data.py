"""A model that writes training data: seven published schemes, what each writes, what its filters drop, what is kept.

Papers      Self-Instruct (Wang et al. 2022, arXiv:2212.10560), Alpaca (Taori et al. 2023), LaMini (Wu et al. 2023,
            arXiv:2304.14402), Evol-Instruct (Xu et al. 2023, arXiv:2304.12244) and Orca (Mukherjee et al. 2023,
            arXiv:2306.02707) as OpenBezoar used them (Dissanayake et al. 2024, arXiv:2404.12195), SELF-ALIGN (Sun et
            al. 2023, arXiv:2305.03047), Self-Specialization (Kang et al. 2023, arXiv:2310.00160).
Command     python recipes/write_data.py
            python recipes/write_data.py --model Llama-2-7b-chat-hf --seeds seed_tasks.jsonl --judge MODEL --calls 1000
Hardware    one core, no GPU; 0.4 minutes (2026-11-27, AMD EPYC), without the writer of recipes/engrave.py.
Claim       Large models write data from which others learn to follow instructions. No model of a laptop's size can,
            so this shows the machinery and what the filters let through; recipes/engrave.py and recipes/specialize.py
            decide what this size can decide of SELF-ALIGN and Self-Specialization.
Miniature   The writer of recipes/instructed.py, a model of 1.3 M parameters that knows four of the prompts, starts from
            20 questions about Python's library; 60 calls a scheme, one seed.
Predicted   before the run, but after one of 20 calls: ROUGE-L drops over 95 % of what continues lists, as questions in
            eight wordings are alike but for a name; nothing of Alpaca's and LaMini's forms can be parsed; over 90 % of
            Evol-Instruct's and Orca's answers pass all filters, though not one in ten of Orca's is true.
Result      ROUGE-L drops 1,259 of 1,260 instructions, no task of Alpaca's or LaMini's form is there, and all 60 answers
            of Evol-Instruct and of Orca pass, Evol-Instruct's nonsense: as predicted. But 46 of Orca's 60 are true: a
            line before a question does not disturb this writer, so the last part is refuted. What such data are worth
            is not decided at this size: it wants a writer that follows instructions, as the 40B of OpenBezoar.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filters import Funnel
from instructed import KNOWN, asked_of, passages, subjects, writer_of
from mini import write_lines
from schemes import evolve, judged, lamini, orca, self_align, specialize
from self_instruct import alpaca, self_instruct
from study import OUT, Report
from writing import TextWriter

from lib.cli import BadInput, run_command
from lib.record_files import read_records

SCHEMES = {
    "Self-Instruct": self_instruct, "Alpaca": alpaca, "LaMini": lamini, "Evol-Instruct": evolve, "Orca": orca,
    "SELF-ALIGN": self_align, "Self-Specialization": specialize,
}  # fmt: skip
TOPICAL = ("LaMini", "SELF-ALIGN")


@dataclass
class Config:
    """Write training data with a model by published schemes, with a report of what their filters drop."""

    model: str = ""
    """a run or Hugging Face folder; without one the small writer of recipes/instructed.py, with its own seeds"""
    seeds: str = ""
    """a .jsonl of tasks, with instruction, input and output or, as Self-Instruct's, instances of these"""
    topics: str = ""    # LaMini, SELF-ALIGN: a text file, a topic a line
    passages: str = ""  # Self-Specialization: a text file, passages between blank lines
    judge: str = ""     # a model that says yes to what is kept of LaMini, Evol-Instruct and Orca
    scheme: tuple[str, ...] = tuple(SCHEMES)
    calls: int = 60     # of each
    seed: int = 0
    out: str = str(OUT / "write_data")
    """a folder: of each scheme a file of what is kept, for data.py, and one of what was removed and why"""


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


def counted(write, cut: Counter):
    """A writer that counts its prompts, and those that its window had no room for."""

    def counting(prompts, *settings):
        found = write(prompts, *settings)
        cut.update(prompts=len(found), cut=sum(not each.whole for each in found))
        return found

    return counting


def tell(report: Report, rows: list[list], examples: dict[str, dict]):
    report.say("Written, dropped by the first filter that says so, and kept, by stage. Prompts: how many a scheme "
               "made, and how many of these lost their beginning, as the model's window has no room.")  # fmt: skip
    report.table(["scheme", "prompts", "of them cut", "stage", "written", "dropped", "kept"], rows)
    report.say("The first that each kept, of instructions and answers both:")
    for name, task in examples.items():
        report.say(f"- {name}: {json.dumps(task['instruction'])} {json.dumps(task['output'])}")


def main(config: Config):
    for name in set(config.scheme) - set(SCHEMES):
        raise BadInput(f"--scheme {name} is none of {', '.join(SCHEMES)}")
    if bool(config.model) != bool(config.seeds):
        raise BadInput("--model needs --seeds with tasks, and --seeds a --model that can do them")
    write, judge = TextWriter(config.model or writer_of(0)), TextWriter(config.judge) if config.judge else None
    tasks = read_tasks(config.seeds) if config.seeds else own_tasks()
    topics, texts = lines_of(config.topics, "\n"), lines_of(config.passages, "\n\n")
    if not config.model:
        topics = topics or tuple(sorted({subject.full.split(".")[0] for subject in subjects()}))
        texts = texts or tuple(passages().values())
    report, rows, examples = Report("write_data", "Writing data with a model"), [], {}
    for name in config.scheme:
        funnels, cut, draw = defaultdict(Funnel), Counter(), random.Random(config.seed)
        more = {"topics": topics} if name in TOPICAL else {"passages": texts} if name == "Self-Specialization" else {}
        kept = SCHEMES[name](counted(write, cut), tasks, draw, config.calls, funnels, **more)
        if judge and name in ("LaMini", "Evol-Instruct", "Orca"):
            kept = judged(judge, kept, funnels["judge"])
        for stage, funnel in funnels.items():
            rows.append([name, cut["prompts"], cut["cut"], stage, funnel.written, funnel.reasons, funnel.kept])
        removed = [{"stage": stage} | row for stage, funnel in funnels.items() for row in funnel.removed]
        write_lines(Path(config.out) / f"{name}.removed.jsonl", removed)
        write_lines(Path(config.out) / f"{name}.jsonl", kept)
        examples |= {name: kept[0]} if kept else {}
        if name == "Orca" and kept:  # its questions are the seeds, so true answers are known
            true = {task["instruction"]: task["output"] for task in tasks}
            same = sum(true[task["instruction"]] == task["output"] for task in kept)
    tell(report, rows, examples)
    if "Orca" in examples:
        report.say(f"Of the answers kept of Orca, {same} are those of the seeds to the letter.")
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
