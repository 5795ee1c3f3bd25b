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
            test what this size can decide of SELF-ALIGN and Self-Specialization.
Miniature   The writer of recipes/instructed.py, a model of 1.3 M parameters that knows four of the prompts, starts from
            20 questions about Python's library; 60 calls a scheme, one seed.
Predicted   before the run, but after one of 20 calls: ROUGE-L drops over 95 % of what continues lists, as questions in
            eight wordings are alike but for a name; nothing of Alpaca's and LaMini's forms can be parsed; over 90 % of
            Evol-Instruct's and Orca's answers pass all filters, though not one in ten of Orca's is true.
Result      ROUGE-L drops 1,259 of 1,260 instructions, no task of Alpaca's or LaMini's form is there, and all 60 answers
            of Evol-Instruct and of Orca pass, Evol-Instruct's nonsense: as predicted. All of Alpaca's 60 prompts lost
            their beginning to the window of 256 tokens (of Self-Instruct and Self-Specialization 36 of 60, of
            SELF-ALIGN 48 of 61), so that may be the window's fault; LaMini's were whole. But 46 of Orca's 60 are true,
            answers to 20 questions that this writer was taught: a line before one does not disturb it, so the last part
            is refuted. What such data are worth was not tested: it wants a writer that follows instructions.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filters import Funnel
from instructed import passages, subjects, writer_of
from mini import write_lines
from schemes import evolve, judged, lamini, orca, self_align, specialize
from seed_tasks import lines_of, own_tasks, read_tasks
from self_instruct import alpaca, self_instruct
from study import OUT, Report
from writing import TextWriter, counted

from lib.cli import BadInput, run_command

SCHEMES = {
    "Self-Instruct": self_instruct, "Alpaca": alpaca, "LaMini": lamini, "Evol-Instruct": evolve, "Orca": orca,
    "SELF-ALIGN": self_align, "Self-Specialization": specialize,
}  # fmt: skip
TOPICAL = ("LaMini", "SELF-ALIGN")
ABOUT = """Self-Instruct (arXiv:2212.10560), Alpaca, LaMini (2304.14402), Evol-Instruct (2304.12244), Orca (2306.02707),
SELF-ALIGN (2305.03047) and Self-Specialization (2310.00160) are schemes by which a model writes training data. Here
each has {calls} calls of one writer, {writer}. They write in stages: whole *tasks* (instruction, input, output) or
*instructions*, then *answers*. Each text is kept, or counted under the first filter that drops it. *ROUGE-L above 0.7*:
as alike as that to a seed or an instruction kept before. *Not three parts*: not an instruction, an input and an output.
*No example in it*: the marks that LaMini asks for are missing. Lists of eight instructions are gone on with to the
fifteenth: seven new ones a call. *Prompts* are those of all stages of a scheme; *cut* ones lost their beginning, for
which the model's window has no room: their scheme may fail by that alone. Nothing was trained on what is kept."""
OWN = """a LLaMA-2 model of 1.3 M parameters that was taught facts about Python's library, with 20 of the questions that
it was taught, and their answers, as seeds"""


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


def tell(report: Report, rows: list[list], kept: dict[str, list[dict]]):
    report.table(["scheme", "prompts", "of them cut", "stage", "written", "dropped", "kept"], rows)
    lines = [f"- {name}: {json.dumps(task['instruction'])} {json.dumps(task['output'])}"
             for name, tasks in kept.items() for task in tasks[:3]]  # fmt: skip
    report.say("\n".join(["The first three that each kept, instruction and answer:", "", *lines]))


def predicted(report: Report, funnels: dict[str, dict[str, Funnel]], true: int):
    """The predictions for the small writer, by counts."""

    def say(words: str, found: int, of: int, fine: bool):
        report.say(f"- Predicted: {words}. Found: {found:,} of {of:,}. **{'confirmed' if fine else 'refuted'}**")

    lists = [funnels[name]["instructions"] for name in ("Self-Instruct", "SELF-ALIGN", "Self-Specialization")]
    found, of = (sum(some) for some in zip(*((each.dropped["ROUGE-L above 0.7"], each.written) for each in lists)))
    say("ROUGE-L drops over 95 % of what continues lists", found, of, found > 0.95 * of)
    tasks, examples = funnels["Alpaca"]["tasks"], funnels["LaMini"]["instructions"]
    found = tasks.dropped["not three parts"] + examples.dropped["no example in it"]
    of = tasks.written + examples.written
    say("nothing of Alpaca's and LaMini's forms can be parsed; could not be", found, of, found == of)
    for name in ("Evol-Instruct", "Orca"):
        kept, of = funnels[name]["answers"].kept, funnels[name]["answers"].written
        say(f"over 90 % of {name}'s answers pass all filters", kept, of, kept > 0.9 * of)
    say("not one in ten of Orca's answers is true", true, kept, true < 0.1 * kept)


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
    report, rows, found, counts = Report("write_data", "Writing data with a model"), [], {}, {}
    report.about(ABOUT.format(calls=config.calls, writer=config.model or OWN))
    for name in config.scheme:
        counts[name] = funnels = defaultdict(Funnel)
        cut, draw = Counter(), random.Random(config.seed)
        more = {"topics": topics} if name in TOPICAL else {"passages": texts} if name == "Self-Specialization" else {}
        kept = SCHEMES[name](counted(write, cut), tasks, draw, config.calls, funnels, **more)
        if judge and name in ("LaMini", "Evol-Instruct", "Orca"):
            kept = judged(judge, kept, funnels["judge"])
        for number, (stage, funnel) in enumerate(funnels.items()):
            prompts = ["", ""] if number else [cut["prompts"], cut["cut"]]
            rows.append([name, *prompts, stage, funnel.written, funnel.reasons, funnel.kept])
        removed = [{"stage": stage} | row for stage, funnel in funnels.items() for row in funnel.removed]
        write_lines(Path(config.out) / f"{name}.removed.jsonl", removed)
        write_lines(Path(config.out) / f"{name}.jsonl", kept)
        found[name] = kept
    tell(report, rows, found)
    if orcas := found.get("Orca"):  # whose questions are the seeds, so true answers are known
        true = {task["instruction"]: task["output"] for task in tasks}
        same = sum(true[task["instruction"]] == task["output"] for task in orcas)
        report.say(f"Of Orca's {len(orcas)} answers, {same} are those of the seeds to the letter; they answer "
                   f"{len({task['instruction'] for task in orcas})} different questions.")  # fmt: skip
        if not config.model and counts.keys() == SCHEMES.keys():
            predicted(report, counts, same)
    report.end("Counts of one run with one seed, without intervals: a verdict says whether the count is as predicted.")


if __name__ == "__main__":
    run_command(main, Config)
