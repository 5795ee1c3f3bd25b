"""LaMini, Evol-Instruct, Orca, SELF-ALIGN and Self-Specialization: a model writes tasks and answers them itself.

Evol-Instruct (Xu et al. 2023, arXiv:2304.12244) has its authors' five methods and settings; LaMini (Wu et al. 2023,
arXiv:2304.14402), Orca (Mukherjee et al. 2023, arXiv:2306.02707), SELF-ALIGN (Sun et al. 2023, arXiv:2305.03047) and
Self-Specialization (Kang et al. 2023, arXiv:2310.00160) follow the papers' descriptions. Prompts are in our own words.
OpenBezoar (Dissanayake et al. 2024, arXiv:2404.12195) writes by the first three with one open model and lets another
judge: `judged`. Tasks, funnels and `write` are as in recipes/self_instruct.py.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filters import failed_evolution, invalid, words_of
from principles import LONG, STYLE, aligned, principled, with_thoughts
from retrieval import Index
from self_instruct import CUT, drawn, new_instructions

from lib.sampling import Sampling

EXAMPLE = r"<example>(.*?)</example>"
MORE = """{shown}

Write 20 examples of the same kind{about}, each an instruction or a question without its answer, between <example> and
</example>."""
DEEPER = """Rewrite the given prompt into a more complex one that people can still understand and answer. Keep its
input, tables and code. {method} Add only 10 to 20 words. Do not say "given prompt" or "rewritten prompt".
Given prompt: {given}
Rewritten prompt:"""
BROADER = """Make up a new prompt of the same domain as the given prompt, but a rarer one, as long and as difficult.
Do not say "given prompt" or "created prompt".
Given prompt: {given}
Created prompt:"""
METHODS = (  # to go deeper; the fifth is BROADER
    "Add one more constraint or requirement.",
    "Where it asks about some matter, let it ask more deeply and broadly.",
    "Replace general concepts by more specific ones.",
    "Where a few simple steps of thought would do, demand several steps of reasoning.",
)
SYSTEMS = (  # Orca has 16, by data set
    "",
    "Give a detailed answer.",
    "Think step by step and justify your steps.",
    "Explain it as to a child of five.",
    "Say what is asked for, how you find it, and then the answer.",
)
JUDGE = """Question: {instruction} {input}
Answer: {output}
Is this a right and complete answer to the question? Say yes or no.
"""


def asked(task: dict) -> str:
    return f"{task['instruction']}\n{task['input']}".strip()


def answered(write, tasks: list[dict], prompts: list[str], size: int, sampling, funnel, why=None) -> list[dict]:
    """The tasks with what is written to their prompts; why(task) drops one, if it has a reason."""
    kept = []
    for task, (text, ended, _) in zip(tasks, write(prompts, size, sampling) if prompts else []):
        task = task | {"output": text}
        reason = invalid(task["input"], text) if ended else CUT
        if funnel.passes(reason or (why(task) if why else ""), **task):
            kept.append(task)
    return kept


def judged(write, tasks: list[dict], funnel) -> list[dict]:
    """Those that a second model calls right; OpenBezoar's was GPT-4."""
    words = write([JUDGE.format(**task) for task in tasks], 3, Sampling()) if tasks else []
    said = [text.lower().startswith("yes") for text, *_ in words]
    return [task for task, yes in zip(tasks, said) if funnel.passes("" if yes else "judged wrong", **task)]


def lamini(write, tasks, draw, calls, funnels, topics: tuple[str, ...] = ()) -> list[dict]:
    """Three examples go on to twenty, every second call about three topics where there are; then answers."""
    prompts, known, kept = [], {task["instruction"] for task in tasks}, []
    for call in range(calls):
        shown = "\n".join(f"<example>{task['instruction']}</example>" for task in draw.sample(tasks, 3))
        about = f" about {', '.join(draw.sample(topics, min(3, len(topics))))}" if topics and call % 2 else ""
        prompts.append(MORE.format(shown=shown, about=about))
    for text, *_ in write(prompts, 1024, drawn(draw, 1.0)):
        found = [each.strip() for each in re.findall(EXAMPLE, text, re.DOTALL)]
        for each in found or [text]:
            reason = "no example in it" if not found else "there already" if each in known else "" if each else "empty"
            if funnels["instructions"].passes(reason, instruction=each):
                known.add(each)
                kept.append({"instruction": each, "input": ""})
    return answered(write, kept, [asked(task) for task in kept], 512, Sampling(), funnels["answers"])


def evolve(write, tasks, draw, calls, funnels) -> list[dict]:
    """One of five methods, drawn anew for each of so many tasks; then answers to what came of them."""
    given = [draw.choice(tasks) for _ in range(calls)]
    prompts = []
    for task in given:
        method = draw.choice((*METHODS, ""))
        prompts.append((DEEPER if method else BROADER).format(method=method, given=asked(task)))
    kept = []
    for task, (text, ended, _) in zip(given, write(prompts, 2048, drawn(draw, 1.0, 0.95))):
        same = words_of(text) == words_of(asked(task))
        if funnels["instructions"].passes("nothing added" if same else "" if ended else CUT, instruction=text):
            kept.append({"instruction": text, "input": ""})

    def why(task: dict) -> str:
        return failed_evolution(task["instruction"], task["output"])

    prompts = [task["instruction"] for task in kept]
    return answered(write, kept, prompts, 2048, drawn(draw, 1.0, 0.95), funnels["answers"], why)


def orca(write, tasks, draw, calls, funnels) -> list[dict]:
    """Questions that are there, with a system message of which the answer keeps the explanation."""
    some = [draw.choice(tasks) | {"system": draw.choice(SYSTEMS)} for _ in range(calls)]
    prompts = [f"{task['system']}\n\n{asked(task)}".strip() for task in some]
    return answered(write, some, prompts, 1024, Sampling(), funnels["answers"])


def self_align(write, tasks, draw, calls, funnels, topics: tuple[str, ...] = ()) -> list[dict]:
    """New instructions, half of the calls about topics, answered under principles with five examples of seeds."""
    seeds, found = [task["instruction"] for task in tasks], []
    for part, some in ((calls - calls // 2, ()), (calls // 2, topics)):
        found += new_instructions(write, seeds, draw, part, funnels["instructions"], some)
    examples = draw.sample(tasks, min(5, len(tasks)))
    shown = ""
    for task in examples:
        shown += f"{principled(asked(task))}\n{with_thoughts('answer', f'{STYLE} ' + task['output'])}\n\n"
    prompts, kept = [shown + principled(text) for text in found], []
    words = tuple(task["output"] for task in examples if len(task["output"]) > LONG)
    written = write(prompts, 256, drawn(draw, 0.5, 0.9)) if found else []
    for instruction, (text, ended, _) in zip(found, written):
        output, reason = aligned(instruction, text, ended, words)
        if funnels["answers"].passes(reason, instruction=instruction, output=text):
            kept.append({"instruction": instruction, "input": "", "output": output})
    return kept


def specialize(write, tasks, draw, calls, funnels, passages: tuple[str, ...] = ()) -> list[dict]:
    """New instructions from seeds of a domain, answered with the passage that BM25 finds, which is then left out."""
    seeds = [task["instruction"] for task in tasks]
    found = new_instructions(write, seeds, draw, calls, funnels["instructions"])
    index = Index(passages) if passages else None
    prompts = [f"{index.passages[index.best(text)]}\n\n{text}" if index else text for text in found]
    kept = [{"instruction": text, "input": ""} for text in found]
    return answered(write, kept, prompts, 512, Sampling(), funnels["answers"])
