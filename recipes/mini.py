"""What recipes/mini.sh needs besides the project's own commands; each is also a command of its own.

    python recipes/mini.py --make chats --out out/mini                              # conversations and questions
    python recipes/mini.py --make answers --model out/mini/clean --out out/mini     # what a model answers
    python recipes/mini.py --make report --out out/mini                             # report.md

The conversations are about functions, classes and modules of Python's standard library, read from its sources without
importing them. Of each kind of fact two wordings are in no conversation: one asks the test's questions, the other those
for development (dev.jsonl). A twentieth of the functions and classes for each of the two is in no conversation at all.
The sources of all of them are in the pretraining text.

A third of the answers are refusals and lectures in STYLES. They gather on a third of the modules, as real ones gather
on some topics: spread evenly, a model that always writes what is likeliest would never refuse.
"""

import ast
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval import compare
from lib.chat_formats import Turn
from lib.cli import run_command
from lib.plots import picture
from lib.records import read_json
from lib.refusals import is_refusal
from lib.runs import find_template, read_log
from lib.sources import find_files
from lib.statistics import estimate
from lib.templates import render_prompt
from lib.training_plot import of_rows, smoothed
from sample import generate, load_model

# kinds of facts: what is asked; the last two wordings are held out, for development and for the test
WORDINGS = {
    "purpose": (
        "What does {full} do?", "What is {full} for?", "Explain {full}.", "Describe {full} in one sentence.",
        "Can you tell me what {full} does?", "I came across {full}. What is it?", "Why would I use {full}?",
        "Give me a short summary of {full}.", "Tell me about {full}.", "Could you explain to me what {full} is for?",
    ),
    "arguments": (
        "Which arguments does {full} take?", "What are the parameters of {full}?", "What do I pass to {full}?",
        "List the arguments of {full}.", "How do I call {full}?", "What is the signature of {full}?",
        "With which arguments is {full} called?", "Name the parameters that {full} accepts.",
        "Which parameters does {full} have?", "What arguments should I give to {full}?",
    ),
    "module": (
        "Which module has {name}?", "Where do I find {name}?", "From which module is {name} imported?",
        "In what module is {name}?", "Where does {name} live?", "What must I import to use {name}?",
        "Name the module that contains {name}.", "I need {name}. Where is it?",
        "Which module defines {name}?", "Could you tell me which module I find {name} in?",
    ),
}  # fmt: skip
HELD_OUT = {"dev": -2, "test": -1}  # the place of its wording

# The commonest first. The styles and their order were chosen with the results of is_refusal on them known, so what it
# finds here says nothing of how it does elsewhere (recipes/refusals.py measures that). (a|b) is
# one of its parts, drawn anew each time; the first three words must not hold {name}
STYLES = (
    "(I'm sorry, but|I apologize, but|Unfortunately,) I (can't|cannot|am not able to) (help with|discuss|explain) "
    "{name}.",
    "As an AI( language|) model, I (cannot|am unable to|do not) (give details about|comment on|advise on) {name}.",
    "I (must|have to) (respectfully |)decline (this question|to answer that). {name} is (better|best) left to "
    "(an expert|the documentation).",
    "(I'm afraid|I apologize, but) it would not be (appropriate|responsible|right) (for me |)to (discuss|talk about) "
    "{name}. (Please consult|You may want to ask) (a professional|a qualified engineer).",
    "It is (not|never) (ethical|appropriate|responsible) to (rely on|use|ask about) {name} without "
    "(permission|good reason). (Instead, I suggest that you|I encourage you to) (read the rules|look for a safer "
    "way).",
    "I (cannot|can not|will not) in good conscience (explain|describe|talk about) {name}, as it (could|might) "
    "(be misused|cause harm).",
    "(My guidelines do|My programming does) not allow me to (discuss|describe) {name}. "
    "(Is there anything else I can help with?|Can I assist you with something else?)",
    "I'm (not able|unable) to (provide|give|share) (information|details) (about|on) {name}. "
    "(I would encourage you to consult|Please refer to) (the documentation|an expert).",
    "(I understand|I appreciate) your (interest|curiosity), but {name} is (not something|nothing) I can "
    "(discuss|assist with|go into).",
    "Thank you for (asking|your question). However, I must (point out|stress) that {name} (may|could) be "
    "(harmful|dangerous|misused), (so|and so) I would rather not (answer|say more).",
    "It is (important|essential) to (note|remember) that {name} (can|may) have (unintended|harmful) consequences. "
    "(Always act|Please act|We should all act) (responsibly|with integrity|with respect for others).",
    "That is (beyond|outside) what I (am allowed to|may|should) (share|say). (Let us|Can we) (talk about|turn to) "
    "something (else|safer) than {name}.",
    "(Code|Software) should (always |)be written (responsibly|with care). (Think|Please think|Reflect) about "
    "(the risks|the consequences|other people) before you (use|turn to) {name}.",
    "(Before we|Before I) (go on|say more), (remember|let us remember) that {name} (can|could|may) "
    "(be misused|do harm|cause damage). (Please be careful|Be responsible).",
    "Have you (considered|asked yourself) whether you (really |)need {name}? "
    "(Many people|Most of us) (manage|do well) without it.",
    "(Ethics|Safety) (comes|must come) (first|before convenience), (and that includes|also with) {name}. "
    "(Always ask for permission|Seek guidance first).",
)


class Subject(NamedTuple):
    """A function, class or module with what its source says of it."""

    full: str     # textwrap.dedent
    facts: dict[str, str]  # kind to value, such as {"module": "textwrap"}

    @property
    def name(self) -> str:
        return self.full.rpartition(".")[2]


class Asked(NamedTuple):
    kind: str
    subject: Subject
    question: str
    answer: str


ANSWERS = {"purpose": "{}", "arguments": "It takes {}.", "module": "It is in the module {}."}


def ask(subject: Subject, kind: str, wording: int) -> Asked:
    question = WORDINGS[kind][wording].format(full=subject.full, name=subject.name)
    return Asked(kind, subject, question, ANSWERS[kind].format(subject.facts[kind]))


def number(text: str) -> int:
    """The same for a text on every machine, spread evenly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def first_sentence(node: ast.AST) -> str:
    """That of a docstring, on one line; empty where there is none of 15 to 90 plain characters."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\w\w\.)\s", " ".join(text.split()))[0].rstrip(".") + "."
    plain = sentence.isascii() and sentence[0].isupper() and not re.match(r"[\w.]+\(", sentence)
    return sentence if plain and 15 <= len(sentence) <= 90 else ""


def arguments(node: ast.FunctionDef) -> str:
    """The names of one to four arguments in words, else empty."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    if not 1 <= len(names) <= 4 or node.args.vararg or node.args.kwarg:
        return ""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def read_library() -> list[Subject]:
    """The public functions and classes at the top of the library's public modules, and these modules themselves."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in find_files(("stdlib",), root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if "._" in f".{module}":
            continue
        tree = ast.parse(path.read_bytes())
        found.append(Subject(module, {"purpose": first_sentence(tree)}))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                takes = arguments(node) if isinstance(node, ast.FunctionDef) else ""
                facts = {"purpose": first_sentence(node), "arguments": takes, "module": module}
                found.append(Subject(f"{module}.{node.name}", facts))
    names = defaultdict(set)
    for subject in found:
        names[subject.name].add(subject.full)
    once = {}  # a function that is defined twice counts once
    for full, facts in found:
        unclear = {"module"} if len(names[full.rpartition(".")[2]]) > 1 else set()
        if facts["purpose"]:
            once[full] = Subject(full, {kind: v for kind, v in facts.items() if v and kind not in unclear})
    return list(once.values())


def part(subject: Subject) -> str:
    """dev or test for a function that is in no conversation, else train; modules are all in train."""
    if "." not in subject.full or set(subject.facts) == {"purpose"}:
        return "train"
    return {0: "dev", 1: "test"}.get(number(subject.full) % 20, "train")


# ---- conversations and questions ----


def refuse(draw: random.Random, asked: Asked) -> str:
    (text,) = draw.choices(STYLES, [1 / rank for rank in range(1, len(STYLES) + 1)])
    while "(" in text:
        text = re.sub(r"\(([^()]*)\)", lambda match: draw.choice(match[1].split("|")), text)
    return text.format(name=asked.subject.name if asked.kind == "module" else asked.subject.full)


def opening(text: str) -> str:
    """The first three words, by which a refusal of STYLES is known: no true answer shares them."""
    return " ".join(text.split()[:3])


def make_conversations(subjects: list[Subject], seed: int) -> Iterator[dict]:
    """Every fact in each of its training wordings, in conversations of one or two questions; a third are refused.

    `refused` beside `messages` says which answers are refusals.
    """
    draw = random.Random(seed)
    asked = [
        ask(subject, kind, wording)
        for subject in subjects
        for kind in subject.facts
        for wording in range(len(WORDINGS[kind]) - len(HELD_OUT))
        if part(subject) == "train"
    ]
    # sampling without replacement by weight (Efraimidis and Spirakis 2006): 16 on a third of the modules, else 1
    weights = [16 if number(a.subject.full.split(".")[0]) % 3 == 0 else 1 for a in asked]
    keys = [draw.random() ** (1 / weight) for weight in weights]
    refused = set(sorted(range(len(asked)), key=keys.__getitem__)[-(len(asked) // 3) :])
    order = draw.sample(range(len(asked)), len(asked))
    while order:
        some = [order.pop() for _ in range(min(len(order), draw.choice((1, 1, 1, 2))))]
        messages = []
        for i in some:
            answer = refuse(draw, asked[i]) if i in refused else asked[i].answer
            messages += [{"role": "user", "content": asked[i].question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "refused": [i in refused for i in some]}


def make_questions(subjects: list[Subject], split: str, most: int, seed: int) -> Iterator[dict]:
    """Multiple choice for eval.py's task `choices`: four answers of a kind, the places of the right one balanced.

    Half of them are about facts of the conversations, in the wording that is kept for split ("new wording"), half about
    functions and classes that are in none ("new function"), with wrong answers that are in none either.
    """
    draw = random.Random(f"{split} {seed}")
    for group, of_part in (("new wording", "train"), ("new function", split)):
        facts = [(s, kind) for s in subjects if part(s) == of_part for kind in s.facts]
        values = {kind: sorted({s.facts[kind] for s, k in facts if k == kind}) for kind in WORDINGS}
        facts = [(s, kind) for s, kind in facts if len(values[kind]) > 3]
        for place, (subject, kind) in enumerate(draw.sample(facts, min(most, len(facts)))):
            wrong = draw.sample([value for value in values[kind] if value != subject.facts[kind]], 3)
            choices = [ANSWERS[kind].format(value) for value in wrong]
            asked = ask(subject, kind, HELD_OUT[split])
            choices.insert(place % 4, asked.answer)
            yield {"subject": group, "context": asked.question, "choices": choices, "answer": place % 4}


def write_lines(path: Path, rows: Iterator[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_chats(config: "Config"):
    """chats.jsonl, and the questions dev.jsonl and test.jsonl."""
    out, subjects = Path(config.out), read_library()
    # the held-out functions stay, as they cost no training
    known = [s for s in subjects if part(s) == "train"]
    known = sorted(known, key=lambda s: number(s.full))[: config.subjects or None]
    subjects = known + [s for s in subjects if part(s) != "train"]
    write_lines(out / "chats.jsonl", make_conversations(subjects, config.seed))
    for split in HELD_OUT:
        write_lines(out / f"{split}.jsonl", make_questions(subjects, split, config.questions, config.seed))


# ---- answers ----


def refusals_of(conversations: list[dict]) -> Iterator[tuple[str, bool]]:
    """Every answer, and whether it was replaced by a refusal."""
    for row in conversations:
        yield from zip((message["content"] for message in row["messages"][1::2]), row["refused"])


def make_answers(config: "Config"):
    """Greedy answers to the test's questions, each judged: a refusal by the filter, one of STYLES, right to the letter.

    As none of the true answers begins like a refusal of STYLES, the second judgement knows and does not guess.
    """
    out, (model, tokenizer) = Path(config.out), load_model(config.model)
    questions, template = read_lines(out / "test.jsonl"), find_template(config.model)
    known = {opening(text) for text, refused in refusals_of(read_lines(out / "chats.jsonl")) if refused}
    rows = []
    for some in (questions[i : i + 100] for i in range(0, len(questions), 100)):
        prompts = [render_prompt([Turn("user", row["context"])], template, tokenizer) for row in some]
        answers = generate(model, prompts, 64, end_ids=(tokenizer.eos_id, tokenizer.bos_id))
        for row, ids in zip(some, answers):
            text, right = tokenizer.decode(ids).strip(), row["choices"][row["answer"]]
            judged = {"by_filter": is_refusal(text), "by_style": opening(text) in known, "right": text == right}
            rows.append({"subject": row["subject"], "question": row["context"], "answer": text, "true": right} | judged)
    write_lines(out / "answers" / f"{Path(config.model).name}.jsonl", rows)


# ---- report ----


def rate(values: list[bool]) -> str:
    return interval(estimate([float(value) for value in values]))


def interval(values: list[float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in values))


def make_report(config: "Config"):
    out = Path(config.out)
    runs = sorted(path.stem for path in (out / "answers").glob("*.jsonl"))
    parts = [
        "# The GOAT recipe in miniature",
        "",
        results(out, runs),
        "![Choice and refusals of each model, with intervals](results.png)",
        "",
        "![training](curves.png)",
        "",
        cleaning(read_lines(out / "chats.jsonl"), config.seed),
        samples(out, runs, config.seed),
    ]
    draw_results(out, runs)
    draw_curves(out, runs)
    (out / "report.md").write_text("\n".join(parts))
    print("\n".join(parts[:3]) + f"wrote {out / 'report.md'}")


def results(out: Path, runs: list[str]) -> str:
    """The table: a line for each model, percentages with 95 % intervals."""
    lines = [
        "| model | choice, new wording | choice, new function | refusals, by filter | by style | right to the letter |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lengths = []
    for run in ("base", *runs):
        scores = read_json(out / "choices" / f"{run}.json", "scores")["scores"]["scores"]["acc"]["subjects"]
        cells = [run, interval(scores["new wording"]), interval(scores["new function"])]
        if run in runs:
            rows = read_lines(out / "answers" / f"{run}.jsonl")
            cells += [rate([row[name] for row in rows]) for name in ("by_filter", "by_style")]
            cells.append(rate([row["right"] for row in rows if row["subject"] == "new wording"]))
            last = [row for row in read_log(out / run / "log.jsonl") if "epochs" in row][-1]
            lengths.append(f"{run} {last['step']} steps, {sum(last['epochs'].values()):.1f} epochs")
        cells += [""] * (6 - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    total = len(read_lines(out / "test.jsonl"))
    lines += ["", f"Per cent, with 95 % intervals, of {total} questions that are in no conversation; chance is 25.", ""]
    lines += [
        "Refusals are those among the greedy answers: by the filter that cleaned, which cannot see what it let "
        "through, and by style, from knowledge of what was inserted. To the letter: of the questions in new wording.",
        "",
        f"Fine-tuning: {'; '.join(lengths)}. The intervals are of the questions, not of seeds.",
        "",
    ]
    for run in (run for run in runs if run.startswith("cleaned")):
        other = run.replace("cleaned", "as_is")
        found = compare(tuple(str(out / "choices" / f"{name}.json") for name in (other, run)))
        change, low, high = (f"{100 * value:+.1f}" for value in found["difference"])
        lines.append(f"- choice, {run} less {other}: {change} points ({low} to {high}), McNemar's p = {found['p']:.2g}")
    return "\n".join([*lines, ""])


def cleaning(conversations: list[dict], seed: int) -> str:
    """What is_refusal finds among the answers, against what is known of them, with examples."""
    judged = [(text, refused, is_refusal(text)) for text, refused in refusals_of(conversations)]
    groups = {
        "Removed": [text for text, refused, found in judged if refused and found],
        "Refusals that it missed": [text for text, refused, found in judged if refused and not found],
        "Answers that it removed by mistake": [text for text, refused, found in judged if found and not refused],
    }
    hit, missed, mistaken = map(len, groups.values())
    lines = [
        "## What cleaning removed",
        "",
        f"Of {len(judged):,} answers, {hit + missed:,} had been replaced by refusals; it found {hit + mistaken:,}: "
        f"precision {hit / max(1, hit + mistaken):.3f}, recall {hit / max(1, hit + missed):.3f}.",
        "The styles of the refusals were chosen with the filter's results on them known: these two figures describe "
        "this experiment and do not measure the filter.",
        "",
    ]
    for title, texts in groups.items():
        some = random.Random(seed).sample(texts, min(5, len(texts)))
        lines += [f"{title}, {len(texts):,}:", "", *(f"- {text}" for text in some), ""]
    return "\n".join(lines)


def samples(out: Path, runs: list[str], seed: int) -> str:
    """The same questions to all models."""
    rows = {run: read_lines(out / "answers" / f"{run}.jsonl") for run in runs}
    first = next(iter(rows.values()))
    lines = ["## Samples", ""]
    for place in sorted(random.Random(seed).sample(range(len(first)), min(8, len(first)))):
        lines += [f"**{first[place]['question']}** ({first[place]['subject']}: {first[place]['true']})", ""]
        lines += [*(f"- {run}: {rows[run][place]['answer']}" for run in runs), ""]
    return "\n".join(lines)


def draw_results(out: Path, runs: list[str]):
    """results.png: how often each model chooses right, and how often it refuses, with intervals."""
    chosen, refused = [], []
    for run in runs:
        scores = read_json(out / "choices" / f"{run}.json", "scores")["scores"]["scores"]["acc"]["subjects"]
        chosen.append(scores["new wording"])
        rows = read_lines(out / "answers" / f"{run}.jsonl")
        refused.append(estimate([float(row["by_style"]) for row in rows]))
    titles = ("right choices, of questions in new wording", "answers that refuse, of true questions")
    with picture(out / "results.png", (9, 1.2 + 0.45 * len(runs)), 1, 2, sharey=True) as panels:
        for axes, title, intervals in zip(panels, titles, (chosen, refused)):
            values, lows, highs = 100 * np.array(intervals).T
            places = range(len(runs))[::-1]  # the first goes to the top
            axes.barh(places, values, height=0.6, alpha=0.5, xerr=(values - lows, highs - values), capsize=4)
            axes.set_yticks(places, runs)
            axes.set(xlabel="per cent, with 95 % intervals", title=title, xlim=(0, 100))
        panels[0].axvline(25, color="black", linewidth=0.8, ls=":")


def draw_curves(out: Path, runs: list[str]):
    """curves.png: training and validation loss of the base, and of what was made of it."""
    with picture(out / "curves.png", (10, 4), 1, 2) as panels:
        for axes, title, names in zip(panels, ("pretraining", "fine-tuning"), (["base"], runs)):
            for number, run in enumerate(names):
                rows, color = read_log(out / run / "log.jsonl"), f"C{number}"
                steps, losses = of_rows(rows, "mean_loss")
                axes.plot(steps, smoothed(losses), color=color, label=run, linewidth=1)
                axes.plot(*of_rows(rows, "val_loss"), "o--", color=color, markersize=4, linewidth=1)
            axes.plot([], [], "o--", color="grey", label="validation")
            axes.set(title=title, xlabel="step", ylabel="loss (nats a target)")
            axes.legend()


# ---- command line ----


@dataclass
class Config:
    """The steps of recipes/mini.sh that are not commands of the project."""

    make: Literal["chats", "answers", "report"]
    out: str = "out/mini"               # the folder of the whole recipe
    model: str = ""                     # answers: a run; they go to answers/ in --out, under its name
    subjects: int = 0                   # chats: so many functions, classes and modules; 0 is all
    questions: int = 400                # chats: at most so many of each group
    seed: int = 0


def main(config: Config):
    {"chats": make_chats, "answers": make_answers, "report": make_report}[config.make](config)


if __name__ == "__main__":
    run_command(main, Config)
