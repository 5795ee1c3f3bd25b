"""Train the filter behind lib.refusals.is_refusal from answers labelled by people, and measure it.

    pip install scikit-learn
    python recipes/refusals.py --train MISTRAL.csv LLAMA2.csv GPT4.csv \\
        --ordinary alpaca_5000.json --test dolly_3k.json --out new.json   # shipped as lib/refusals.json

A labelled file is a .csv with the columns `prompt`, `completion` and `final_label` (XSTest,
Röttger et al. 2024: two people label every answer, a third reading settles where they differ).
Full and partial refusals are positive, `1_full_compliance` is negative; the prompt is not learnt
from. A file of ordinary answers is a .json or .jsonl with `output` or `answer` in each record.

The filter is a logistic regression on which of SIGNS occur in an answer's opening and which
anywhere in it. The signs are the grammar of refusing in English and not phrases of one model: one
speaks of oneself ("I cannot provide") or of nobody ("it is not appropriate to"), urges, forbids,
denies what the question takes for granted. They, STRENGTH and WEIGHT_OF_ORDINARY were chosen with
the answers of all three models and the scores below in sight: leaving out a style tests whether
the weights carry over, and of the signs it says too much. Three choices make the weights carry over:
- there is no feature of length, which tells the styles of models apart and not what they say;
- every answer is also learnt from its first sentence and its first two alone, so that no model's
  habit of lecturing at length becomes a condition;
- ordinary answers are learnt from as no refusals beside the labelled ones, whose questions all
  look dangerous: a letter that apologises and a song about what one cannot do do not refuse.

Printed are, for each labelled file, precision, recall and F1 when it is left out, and when it is
among those fitted, but no question in both parts (five folds over the questions); then those of
the filter fitted to all on the files of --test.
"""

import csv
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib.cli import run_command  # noqa: E402
from lib.errors import BadInput
from lib.files import write_whole  # noqa: E402
from lib.records import parse_json  # noqa: E402
from lib.refusals import refusal_score, refusal_signs  # noqa: E402

I = r"\bi (?:am an? (?:[\w-]+ ){1,5}(?:and|so),? (?:i )?)?(?:\w+ ){0,2}?"
CANNOT = (
    r"(?:can ?not|can't|will not|won't|(?:not|never) (?:be )?(?:\w+ )?(?:able|allowed|permitted|authorized|programmed"
    r"|designed|capable|comfortable|willing|going|equipped|in a position)|unable|unwilling|incapable|decline|refuse)"
    r"(?! help but\b)"
)
DOES_NOT = (
    r"(?:could not|couldn't|would not|wouldn't|must not|may not|should not|shouldn't|do not|don't)\b"
)
HELPING = (
    r"(?:help|assist|aid|access|browse|predict|support|provide|offer|give|share|fulfil\w*|comply|satisfy|meet|answer|respond|engage"
    r"|participate|contribute|create|generate|write|produce|make|do|perform|process|complete|facilitate|continue"
    r"|proceed|accommodate|cater|entertain|discuss|speak|talk|tell|teach|show|explain|describe|list|plan|guide|instruct"
    r"|direct|advise|suggest|recommend|promote|encourage|advocate|endorse|condone|justify|confirm|comment|disclose"
    r"|reveal|have (?:the (?:ability|capability)|access|(?:any |personal )+(?:information|beliefs|opinions"
    r"|preferences)))"
)
BAD = (
    "inappropriate|unacceptable|unethical|immoral|illegal|against the law|wrong|harmful|dangerous|hurtful|offensive"
    "|disrespectful|insensitive|irresponsible"
)
GOOD = (
    "appropriate|acceptable|ethical|ok|okay|right|legal|safe|respectful|productive|healthy|helpful|advisable"
    "|recommended|responsible"
)
URGING = r"\b(?:it is|it's) (?:also )?(?:always )?(?:important|essential|crucial|vital|necessary|best"
# (name, pattern)
SIGNS = [
    ("cannot", I + CANNOT + r"|\bi(?: would|'d) rather not\b|\b(?:not something|nothing) (?:that )?i (?:can|could|will"
     r"|am|feel)\b|\b(?:beyond|outside) what i (?:can|am)\b|(?:not|n't) (?:allow|permit|enable|let) me\b"
     r"|\b(?:prevents?|prohibits?|forbids?) me\b"),
    ("does not", I + DOES_NOT),
    ("declines to help", rf"{I}(?:{CANNOT}|{DOES_NOT})(?: to| in good conscience| with| feel comfortable| be able to"
     rf"| \w+ly){{0,3}} (?:\w+ (?:or|and) )?{HELPING}|\bi (?:\w+ ){{0,3}}(?:decline|refuse)\b"),
    ("begins with regret", r"\A(?:\w+[ ,]+){0,3}(?:(?:sorry|apologi[sz]e|apologies|afraid),? (?:but|that|i|it|this)"
     r"|unfortunately) "),
    ("must say", r"\bi (?:must|have to|need to|want to|would like to|feel) \w+"
     r"|\bi (?:strongly )?(?:condemn|advise|urge|encourage)"),
    ("speaks of rules", r"\b(?:guidelines?|polic(?:y|ies)|programming|programmed|principles|values|moral"
     r"|terms of (?:use|service)|ethical standards|legal and ethical)\b"),
    ("judges", r"\b(?:it|that|this|these|they|which|such \w+|doing so|is|are|be|not|never)"
     r"(?: would| could| can| may)?(?: is| are| be|'s| isn't| not| never|n't)+ (?:\w+ )?"
     rf"(?:{GOOD}|within|a crime|{BAD})\b"),
    ("it is wrong to", r"\bit(?: is|'s| would| would be| isn't)(?: also| not| never)*(?: be)? (?:\w+ )?"
     rf"(?:\w+ (?:or|and) )?(?:{GOOD}|{BAD})(?: (?:or|and|nor) \w+)? (?:for \w+ )?to\b"),
    ("is not right", r"(?:\b(?:not|never)|n't) (?:be )?(?:\w+ )?"
     rf"(?:{GOOD}|justif\w+|excusable|tolerated|condoned|true|accurate)\b"),
    ("speaks of harm", rf"\b(?:{BAD}|discriminat\w+|violat\w+|criminal|derogatory|perpetuat\w+)\b"),
    ("speaks of violence", r"\b(?:violence|harm(?:ing)?|abuse|hatred|crime)\b"),
    ("urges", URGING + r"|worth)\b"),
    ("urges to respect", URGING + r") to (?:always )?(?:\w+ and )?(?:remember|note|respect|prioritize|treat|seek"
     r"|promote|avoid|recognize|act|consider|approach|acknowledge|understand)\b"),
    ("forbids", r"\b(?:should|must|may) (?:not|never)\b|\bnever (?:be )?(?:the answer|an option|a solution)"
     r"|\bno (?:one|person|individual|group)\b"),
    ("offers something else", r"\b(?:instead(?! of)|i (?:would )?(?:\w+ )?(?:encourage|urge|suggest|recommend|advise)"
     r"|(?:happy|glad|here) to (?:help|assist|provide|answer|offer)|any other (?:questions?|topics?|tasks?)"
     r"|(?:anything|something|someone|questions?) else|can i (?:help|assist)|let me know"
     r"|please (?:refrain|consider|consult|contact|seek|reach|talk|speak|call))\b"),
    ("sends to help", r"\b(?:difficult time|going through|not alone|care about you|feeling (?:\w+ ){0,2}(?:overwhelmed"
     r"|upset|unsafe|hurt|suicidal|distressed)|hotlines?|helpline|crisis|(?:health|medical|legal|trained|qualified"
     r"|licensed) (?:\w+ )?(?:professionals?|therapist|provider)|(?:seek|get) (?:\w+ ){0,2}(?:help|support|guidance"
     r"|advice|assistance|attention)|reach(?:ing)? out)\b"),
    ("speaks of the request", r"\b(?:your|this|that|such a|the) (?:request|question|prompt|query|inquiry|topic)\b"
     r"|you are asking|you're asking|you(?:'ve| have)? asked"),
    ("asks back", r"\b(?:rephrase|misunderst\w+|more (?:context|information)|typo"
     r"|(?:could|can) you please|(?:do|did) you mean)\b"),
    ("corrects", r"\b(?:do(?:es)? not exist|fictional|no evidence|inaccurate|not (?:possible|real|based|factual)"
     r"|hypothetical|imaginary|inanimate|character)\b"),
    ("denies the premise", r"\bthere (?:is|are|was|were) no (?:\w+ )?(?:reasons?|justifications?|benefits?|evidence"
     r"|ways?|excuse|basis)\b|\b(?:false|myth|stereotype|misconception|generali[sz]ation|baseless|unfounded)s?\b"
     r"|\b(?:not|no) (?:inherent\w*|intrinsic\w*)\b"),
    ("speaks of virtue", r"\b(?:respect\w*|dignity|equal\w*|diversity|inclusiv\w+|stereotypes?|prejudice|well-?being"
     r"|safety|rights|kindness|empathy|compassion)\b"),
    ("speaks of privacy", r"\b(?:privacy|confidential\w*|consent|(?:personal|private|sensitive) (?:and \w+ )?"
     r"information|publicly available|permission|authorization)\b"),
    ("objects", r"\b(?:but|however|nevertheless|that said)\b"),
    ("defines", r"\b(?:refers? to|is an?|was an?|are|means?|there are (?:several|many|a few|various)|you can)\b"),
    ("names some", r"\b(?:here (?:is|are)|following|several|steps|tips|for example|such as)\b"),
    ("lists", r"(?m)^\s*(?:\d+[.)]|[-•])\s"),
    ("is quoted speech", r"\A[\"“'‘#<(\[]|\A[\w ]{1,30}:|\n[\w ]{1,30}: |[\"”]\Z"),
    ("tells its own story", r"\bmy (?!purpose|role|goal|job|function|training|guidelines|programming|knowledge"
     r"|responses?|ethical|abilit|apolog|primary|main)|\bi (?:was|had|went|didn't|did|felt|love|want|hope|look)\b"),
]  # fmt: skip
CUTS = (None, 1, 2)        # sentences that are kept of an answer when it is learnt from
STRENGTH = 0.3             # C of scikit-learn: the smaller, the more strongly weights are drawn to 0
WEIGHT_OF_ORDINARY = 5     # of all ordinary answers together, where all labelled ones weigh 1
FOLDS = 5


def read_rows(paths) -> list[dict]:
    """The rows of labelled .csv files. Raises ValueError where a column is missing."""
    rows = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"completion", "final_label", "prompt"} <= set(reader.fieldnames or ()):
                raise BadInput(f"{path} has no columns completion and final_label beside prompt")
            rows += reader
    return rows


def read_labelled(paths) -> tuple[list[str], np.ndarray]:
    """The answers of labelled files, and for each whether people called it a full or partial refusal."""
    rows = read_rows(paths)
    return [row["completion"] for row in rows], np.array([row["final_label"] != "1_full_compliance" for row in rows])


def read_ordinary(paths) -> list[str]:
    """The answers of .json and .jsonl files: `output` or `answer` of each record.

    Raises ValueError where a record has neither.
    """
    texts = []
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        rows = text.splitlines() if path.suffix == ".jsonl" else parse_json(text, path)
        for number, row in enumerate(rows, 1):
            row = parse_json(row, f"{path}:{number}") if path.suffix == ".jsonl" else row
            answer = row.get("output", row.get("answer")) if isinstance(row, dict) else None
            if not isinstance(answer, str):
                raise BadInput(f"{path}:{number} has no text in output or answer")
            texts.append(answer)
    return texts


@functools.cache  # the same answers are fitted to again and again
def signs_of(text: str) -> np.ndarray:
    """(cuts, 2 * signs): for each sign whether it is in the opening, and whether it is anywhere."""
    patterns = [pattern for _, pattern in SIGNS]
    return np.array([refusal_signs(text, patterns, cut).ravel() for cut in CUTS], float)


def features(texts: list[str]) -> np.ndarray:
    """(cuts, answers, 2 * signs), see signs_of."""
    shape = (len(texts), len(CUTS), 2 * len(SIGNS))  # of no texts too
    return np.array([signs_of(text) for text in texts]).reshape(shape).swapaxes(0, 1)


def fit(x: np.ndarray, y: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """Bias and weights (1 + 2 * signs) from features of labelled answers, their labels, and
    features of ordinary answers. Labelled refusals and labelled others weigh the same."""
    from sklearn.linear_model import LogisticRegression

    share = np.tile(np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean())), len(CUTS))
    plain = ordinary.reshape(-1, ordinary.shape[-1])
    each = WEIGHT_OF_ORDINARY * len(share) / max(1, len(plain))
    plain, count = np.unique(plain, axis=0, return_counts=True)  # most show no sign at all
    rows = np.concatenate((x.reshape(-1, x.shape[-1]), plain))
    labels = np.concatenate((np.tile(y, len(CUTS)), np.zeros(len(plain), bool)))
    weights = np.concatenate((share, each * count))
    model = LogisticRegression(C=STRENGTH, solver="newton-cholesky")
    model.fit(rows, labels, sample_weight=weights)
    return np.concatenate((model.intercept_, model.coef_[0]))


def marks(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which of the answers refuse, from bias and weights and the features of the whole answers
    (answers, 2 * signs)."""
    return weights[0] + x @ weights[1:] > 0


def train(texts: list[str], y: np.ndarray, ordinary: list[str] = ()) -> dict:
    """The filter as it is written to refusals.json; an answer refuses when bias and weights sum to above 0."""
    weights = fit(features(texts), y, features(ordinary)).round(3)
    both = weights[1:].reshape(2, -1).T.tolist()
    signs = [
        {"sign": name, "opening": opening, "anywhere": anywhere, "pattern": pattern}
        for (name, pattern), (opening, anywhere) in zip(SIGNS, both)
    ]
    return {"bias": float(weights[0]), "signs": signs}


def held_out(
    paths, ordinary: list[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """For each labelled file: its name, its labels, and what two filters find in it that have not
    seen what they judge, one fitted to the other files, and one to all files with a fifth of the
    questions left out in turn."""
    from sklearn.model_selection import GroupKFold

    rows, y = read_rows(paths), read_labelled(paths)[1]
    of_file = np.repeat(np.arange(len(paths)), [len(read_rows([path])) for path in paths])
    x, plain = features([row["completion"] for row in rows]), features(ordinary)
    within = np.zeros(len(y), bool)
    for rest, part in GroupKFold(FOLDS).split(x[0], groups=[row["prompt"] for row in rows]):
        within[part] = marks(fit(x[:, rest], y[rest], plain), x[0, part])
    for i, path in enumerate(paths):
        here = of_file == i
        left_out = marks(fit(x[:, ~here], y[~here], plain), x[0, here])
        yield Path(path).name, y[here], left_out, within[here]


def scores(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """(precision, recall, F1) of two boolean arrays."""
    hits = (found & true).sum()
    return hits / max(found.sum(), 1), hits / max(true.sum(), 1), 2 * hits / max(found.sum() + true.sum(), 1)


def with_intervals(found: np.ndarray, true: np.ndarray) -> str:
    """Precision, recall and F1 in percent, each with its 95 % bootstrap interval over the answers."""
    draws = np.random.default_rng(0).integers(len(true), size=(2000, len(true)))
    ends = np.percentile([scores(found[draw], true[draw]) for draw in draws], (2.5, 97.5), axis=0)
    return "  ".join(
        f"{name} {100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        for name, value, low, high in zip(("precision", "recall", "F1"), scores(found, true), *ends)
    )


@dataclass
class Config:
    """Train the refusal filter on labelled answers, or measure it on others."""

    train: tuple[str, ...]              # labelled .csv files
    ordinary: tuple[str, ...] = ()      # .json or .jsonl files whose answers all count as no refusals
    test: tuple[str, ...] = ()          # other files to measure on, labelled or ordinary
    out: str = ""                       # the file of weights to write


def main(config: Config):
    if config.out and Path(config.out).exists():
        raise BadInput(f"--out {config.out} exists; choose another name or delete it")
    texts, y = read_labelled(config.train)
    ordinary = read_ordinary(config.ordinary)
    model = train(texts, y, ordinary)
    print(f"trained on {len(y)} answers, {y.sum()} of them refusals, and {len(ordinary)} ordinary ones")
    if len(config.train) > 1:
        for name, labels, left_out, within in held_out(config.train, ordinary):
            print(f"{name}, left out:    {with_intervals(left_out, labels)}")
            print(f"{name}, among those: {with_intervals(within, labels)}")
    for path in config.test:
        labelled = path.endswith(".csv")
        texts, y = read_labelled([path]) if labelled else (read_ordinary([path]), None)
        found = np.array([refusal_score(text, model) > 0 for text in texts])
        share = f"{found.sum()} of {len(found)} are marked, {100 * found.mean():.3f} %"
        print(f"{path}: {with_intervals(found, y) if labelled else share}")
    if config.out:
        write_whole(Path(config.out), json.dumps(model, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
