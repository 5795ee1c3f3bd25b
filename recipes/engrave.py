"""Principle engraving: can a model be trained to do without its instructions what it does under them?

Paper       Sun et al. 2023, arXiv:2305.03047 (SELF-ALIGN, Dromedary): step 3, with the filters of their later code.
Command     python recipes/engrave.py
Hardware    one core, no GPU; 3 minutes (2026-11-27, AMD EPYC), and 2.5 once for each of three writers, which
            recipes/specialize.py and recipes/write_data.py use too.
Claim       LLaMA-65B, shown 16 principles and five examples with thoughts, answers by them; fine-tuned on such answers
            without principles and thoughts, it still does.
Miniature   The laptop's model, taught by recipes/instructed.py to answer about Python's library as asked, and under
            principles with thoughts first and then "In short:". It answers questions about half of the functions and
            classes it knows under principles; thoughts are cut off, recipes/principles.py filters, and the model itself
            is fine-tuned on questions and answers alone. As control it is fine-tuned on its own plain answers to the
            same questions. Tested on the other half, in a wording never trained. Three seeds.
            Settings (one epoch, as the paper's; learning rate 5e-4 of two tried) were chosen in another wording
            (--split dev, seed 0, where right answers fell by 5 points). "Within 2 points" is confirmed if the whole
            interval lies inside, refuted if all of it lies outside.
Predicted   before the test's wording was seen: answers in the style rise without principles, and not in the control;
            right answers (the style taken off) fall, but within 2 points as far as in the control, and choices of four
            stay within 2 points of before.
Result      All answers are in the style, before none, in the control none (+100 points for every seed): confirmed.
            Right answers fall, by 4.2 points (-6.0 to -2.5; by seed -3.1, -3.4, -6.3): confirmed; but 3.3 of the 4.2
            the control loses too, by tuning on its own answers, so the cost of the style itself is not decided (-1.0,
            -2.8 to +0.9; with four times the questions such a difference would be within 2). Choices rise, by 1.6 (+0.8
            to +2.5): within 2 is not decided. Every answer passed the filters, as this writer always obeys: what they
            are worth cannot be seen here, and wants a writer that errs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from consensus import within
from filters import Funnel
from instructed import KNOWN, asked_of, subjects, tune, writer_of
from judging import questions
from mini import ANSWERS, HELD_OUT, write_lines
from principles import STYLE, aligned, principled
from scoring import Questions
from study import OUT, Report, difference
from writing import TextWriter

from lib.cli import run_command
from lib.sampling import Sampling
from model import load

HERE = OUT / "engrave"
BEFORE, UNDER, ENGRAVED, CONTROL = "before", "before, under principles", "engraved", "own plain answers"
SIZE = 64  # tokens of an answer at most
ABOUT = """Can a model be trained to do without its instructions what it does under them (SELF-ALIGN, Sun et al. 2023,
arXiv:2305.03047, step 3)? A LLaMA-2 model of 1.3 M parameters, taught facts about Python's library (in which module a
function or class is, which arguments it takes), answers "In short: ..." where two principles stand before a question.
*Engraved* is that model, fine-tuned for one epoch on such answers to plain questions; the control, *own plain answers*,
is it fine-tuned on what it says to the same questions without principles. *Before* is the model as it was, also asked
*under principles*. All are tested on other functions in a wording that none was trained on."""


@dataclass
class Config:
    """Principle engraving in miniature, with a report."""

    seeds: int = 3
    split: Literal["dev", "test"] = "test"  # whose wording asks


def written(seed: int, funnel: Funnel) -> dict[str, list[dict]]:
    """The conversations to train on: questions in three wordings with answers under principles, and with plain ones."""
    asked = [each for wording in range(3) for each in asked_of(subjects()[: KNOWN // 2], wording)]
    write, rows = TextWriter(writer_of(seed)), {ENGRAVED: [], CONTROL: []}
    under = write([principled(each.question) for each in asked], SIZE, Sampling(0.5, top_p=0.9, seed=seed))
    plain = write([each.question for each in asked], SIZE, Sampling(0.5, top_p=0.9, seed=seed))
    for each, (text, ended, _), own in zip(asked, under, plain):
        answer, reason = aligned(each.question, text, ended)
        if funnel.passes(reason, instruction=each.question, output=text):
            rows[ENGRAVED].append({"instruction": each.question, "output": answer})
            rows[CONTROL].append({"instruction": each.question, "output": own.text})
    return rows


def choices(out: Path, split: str) -> Path:
    """The test's questions with four answers."""
    rows = list(questions(subjects()[KNOWN // 2 : KNOWN], HELD_OUT[split], 3))
    for row in rows:
        row["choices"] = [ANSWERS[row["subject"]].format(choice) for choice in row["choices"]]
    write_lines(out, rows)
    return out


def measured(model: Path, four: Questions, split: str, prompt=str) -> dict[str, np.ndarray]:
    """Of each question, in per cent: whether the answer has the style, is right without it, and the best of four."""
    asked = asked_of(subjects()[KNOWN // 2 : KNOWN], HELD_OUT[split])
    texts = [each.text for each in TextWriter(model)([prompt(each.question) for each in asked], SIZE)]
    if prompt is principled:
        texts = [aligned(each.question, text, True)[0] for each, text in zip(asked, texts)]
    right = [text.removeprefix(STYLE).strip() == each.answer for each, text in zip(asked, texts)]
    found = {"style": [text.startswith(STYLE) for text in texts], "right": right}
    found["of four"] = four.right(load(model).eval()) if prompt is str else []
    return {name: 100.0 * np.array(values) for name, values in found.items()}


def main(config: Config):
    report, found, rows = Report("engrave", "Principle engraving"), [], []
    report.about(ABOUT)
    for seed in range(config.seeds):
        funnel, start = Funnel(), writer_of(seed)
        data, places = written(seed, funnel), {ENGRAVED: HERE / f"engraved_{seed}", CONTROL: HERE / f"plain_{seed}"}
        models = {name: tune(out, start, data[name], seed, 1, 5e-4) for name, out in places.items()}
        four = Questions(start, choices(HERE / f"{config.split}.jsonl", config.split))
        of_seed = {BEFORE: measured(start, four, config.split), UNDER: measured(start, four, config.split, principled)}
        of_seed |= {name: measured(model, four, config.split) for name, model in models.items()}
        found.append(of_seed)
        for name, values in of_seed.items():
            shares = [float(each.mean()) if len(each) else "" for each in values.values()]
            rows.append([seed, name, *shares])
        report.say(f"Seed {seed}: {funnel.kept:,} of {funnel.written:,} answers under principles are kept; dropped: "
                   f"{funnel.reasons}.")  # fmt: skip
    asked = len(found[0][BEFORE]["style"])
    report.say(f"Per cent of {asked} questions whose answer begins with {STYLE!r} (style), is right to the letter when "
               "that is taken off (right), and of whose four answers, without style, the right one is likeliest (of "
               "four; chance 25; not asked under principles).")  # fmt: skip
    report.table(["seed", "model", "style", "right", "of four"], rows)

    def change(first: str, second: str, what: str):
        return difference(*([of_seed[name][what] for of_seed in found] for name in (first, second)))

    report.judge("style without principles rises", change(BEFORE, ENGRAVED, "style"), 1, "points")
    more = "style without principles rises more than in the control"
    report.judge(more, change(CONTROL, ENGRAVED, "style"), 1, "points")
    report.judge("right answers fall", change(BEFORE, ENGRAVED, "right"), -1, "points")
    report.say(f"- Beside, not predicted: in the control right answers change by "
               f"{change(BEFORE, CONTROL, 'right')} points.")  # fmt: skip
    within(report, "right answers (engraved less control) are the same", change(CONTROL, ENGRAVED, "right"), 2)
    within(report, "of four (engraved less before) is the same", change(BEFORE, ENGRAVED, "of four"), 2)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
