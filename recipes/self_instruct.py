"""Self-Instruct and Alpaca: a model makes up tasks from a few that people wrote, over writing.TextWriter's call.

Settings, parsing and filters are those of the authors' code (Wang et al. 2022, arXiv:2212.10560; Taori et al. 2023).
Examples in prompts are made of the seed tasks, other words are our own. Left out: their presence penalties, which the
sampler does not have, and that Self-Instruct lowers all letters but the first.

A task is a dict of instruction, input and output, of a seed also `classes`: whether it asks for one of a few labels.
Where writing comes in stages, each counts in a filters.Funnel of its own.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filters import ALPACA_BLOCKED, BLOCKED, Pool, consistent, invalid, unfit

from lib.sampling import Sampling

ROUND = 5  # calls after which what was kept counts as known
CUT = "cut by its length"
INTRO = """Write 20 different tasks. Each has an instruction of one or two sentences, in various verbs and kinds, an
input with what it is about, or <noinput> where it needs none, and an output of less than 100 words."""
LISTED = ("\n\n", "\n16", "16.", "16 .")  # what ends a list
FEW = (12, 19)  # examples of tasks with classes and of others
FORM = "Task: {instruction}\nInput: {input}\nOutput: {output}"
FORM_OF_CLASSES = "Task: {instruction}\nClass label: {output}\n{input}"


def drawn(draw, temperature: float, top_p: float = 1.0) -> Sampling:
    return Sampling(temperature, top_p=top_p, seed=draw.randrange(1 << 30))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def list_prompt(instructions: list[str], topic: str = "") -> str:
    lines = [f"{number}. {squeezed(text).rstrip(':')}" for number, text in enumerate(instructions, 1)]
    about = f" about {topic}" if topic else ""
    return "\n".join([f"Come up with a series of tasks{about}:", *lines, f"{len(lines) + 1}."])


def items_of(text: str) -> list[str]:
    """What stands behind the numbers of a list, the first of which is in the prompt."""
    items = map(squeezed, re.split(r"\n\d+\s?\. ", text))
    return [item[0].upper() + item[1:] for item in items if item]


def new_instructions(write, seeds: list[str], draw, calls: int, funnel, topics: tuple[str, ...] = ()) -> list[str]:
    """Lists of 8 instructions, two of them by the model, go on to 16; of a list that is cut nothing is kept."""
    pool, kept = Pool(seeds), []
    for begin in range(0, calls, ROUND):
        prompts = []
        for _ in range(min(ROUND, calls - begin)):
            some = draw.sample(kept, min(2, len(kept)))
            some += draw.sample(seeds, min(8 - len(some), len(seeds)))
            draw.shuffle(some)
            prompts.append(list_prompt(some, draw.choice(topics) if topics else ""))
        for text, ended, _ in write(prompts, 1024, drawn(draw, 0.7, 0.5), LISTED):
            for item in items_of(text):
                reason = unfit(item, BLOCKED) if ended else CUT
                reason, record = (reason, {}) if reason else pool.add(item)
                if funnel.passes(reason, instruction=item, **record):
                    kept.append(item)
    return kept


def instances_of(text: str, classes: bool) -> list[tuple[str, str]]:
    """Inputs and outputs as a model wrote them behind an instruction."""
    if classes:
        parts = [part.strip().partition("\n") for part in text.split("Class label:")[1:]]
        return [(given.strip(), label.strip()) for label, _, given in parts]
    found = []
    for part in re.split(r"Example\s?\d*\.?", text):
        given, *outputs = re.split(r"Output\s*\d*\s*:", part.strip())
        if outputs:
            output = re.split(r"Input\s*\d*\s*:", outputs[0])[0]
            found.append((re.sub(r"^Input\s*\d*\s*:", "", given).strip(), output.strip()))
    return found


def are_classes(write, instructions: list[str], tasks: list[dict]) -> list[bool]:
    """Whether the model says that instructions ask for a class; without seeds that do, none does."""
    yes = [task for task in tasks if task.get("classes")][: FEW[0]]
    no = [task for task in tasks if not task.get("classes")][: FEW[1]]
    if not yes or not instructions:
        return [False] * len(instructions)
    ask = "Task: {}\nIs it classification?"
    shown = [f"{ask.format(task['instruction'])} {word}" for word, some in (("Yes", yes), ("No", no)) for task in some]
    prompts = ["\n\n".join([*shown, ask.format(text)]) for text in instructions]
    return [text in ("Yes", "yes", "YES") for text, *_ in write(prompts, 3, Sampling(), ("\n",))]


def self_instruct(write, tasks: list[dict], draw, calls: int, funnels) -> list[dict]:
    """Instructions, then up to five instances of each: an input and its output, or for classes the label first."""
    kept = new_instructions(write, [task["instruction"] for task in tasks], draw, calls, funnels["instructions"])
    kinds, prompts = are_classes(write, kept, tasks), []
    for text, kind in zip(kept, kinds):
        form = FORM_OF_CLASSES if kind else FORM
        shown = [form.format(**task) for task in tasks if bool(task.get("classes")) == kind]
        prompts.append("\n\n".join([*shown[:5], f"Task: {text}\n"]))
    written = write(prompts, 350, Sampling(), ("Example 6", "Task:")) if prompts else []
    found = []
    for instruction, kind, (text, ended, _) in zip(kept, kinds, written):
        pairs = instances_of(text, kind)
        reasons = [invalid(*pair) for pair in pairs]
        if pairs and not ended:
            reasons[-1] = CUT
        agreed = consistent([pair for pair, reason in zip(pairs, reasons) if not reason])[:5]
        left = list(agreed)
        for (given, output), reason in zip(pairs, reasons):
            reason = reason or ("" if (given, output) in left else "again, disagreeing, or a sixth")
            if funnels["instances"].passes(reason, instruction=instruction, input=given, output=output):
                left.remove((given, output))
                found.append({"instruction": instruction, "input": given, "output": output})
        if not pairs:
            funnels["instances"].passes("no instance in it", instruction=instruction, output=text)
    return found


def block(task: dict, number: int) -> str:
    given = task["input"] or "<noinput>"
    name = squeezed(task["instruction"]).rstrip(":")
    return f"###\n{number}. Instruction: {name}\n{number}. Input:\n{given}\n{number}. Output:\n{task['output']}\n"


def alpaca(write, tasks: list[dict], draw, calls: int, funnels, intro: str = INTRO) -> list[dict]:
    """Three seed tasks go on to twenty whole ones; all that are kept before count as known."""
    pool, kept = Pool([task["instruction"] for task in tasks]), []
    for begin in range(0, calls, ROUND):
        prompts = []
        for _ in range(min(ROUND, calls - begin)):
            shown = [block(task, number) for number, task in enumerate(draw.sample(tasks, 3), 1)]
            prompts.append(f"{intro}\n{''.join(shown)}###\n4. Instruction:")
        for text, ended, _ in write(prompts, 3072, drawn(draw, 1.0), ("\n20", "20.")):
            blocks = f"4. Instruction:{text}".split("###")
            for number, part in enumerate(blocks, 4):
                fields = [field.strip() for field in re.split(rf"{number}\.\s+(?:Instruction|Input|Output):", part)[1:]]
                name, given, output = fields if len(fields) == 3 else (squeezed(part), "", "")
                given = "" if given.lower() == "<noinput>" else given
                last = number == len(blocks) + 3 and not ended
                reason = CUT if last else "not three parts" if len(fields) != 3 else unfit(name, ALPACA_BLOCKED)
                reason, record = (reason, {}) if reason else pool.add(name)
                task = {"instruction": name, "input": given, "output": output}
                if funnels["tasks"].passes(reason, **task, **record):
                    kept.append(task)
    return kept
