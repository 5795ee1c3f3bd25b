"""Train the filter behind data.is_refusal from answers labelled by people, and measure it.

    python recipes/refusals.py --train GPT4.csv LLAMA2.csv --out recipes/refusals.json
    python recipes/refusals.py --train GPT4.csv --test LLAMA2.csv

A file is a .csv with the columns `completion` and `final_label` (XSTest, Röttger et al. 2024: two people label every
answer, a third reading settles where they differ); full and partial refusals are positive, `1_full_compliance` is
negative. The question is not read.

The filter is a logistic regression on which of SIGNS occur in an answer's opening and which anywhere in it. The signs
are the grammar of refusing in English, not phrases of one model. Two choices make it carry over from the answers
of one model to those of another:
- there is no feature of length, which tells the styles of models apart and not what they say;
- every answer is also learnt from its first sentence and its first two alone, so that no model's habit of lecturing
  at length becomes a condition.
How strongly weights are drawn to 0 is chosen by cross-validation inside the training files.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib.cli import run_command  # noqa: E402
from lib.files import write_whole  # noqa: E402
from lib.refusals import refusal_score, refusal_signs  # noqa: E402

NEGATION = (
    r"\bi (?:\w+ ){0,2}?(?:can ?not|can't|could not|couldn't|will not|won't|would not|wouldn't|must not|may not"
    r"|should not|shouldn't|do not|don't|(?:not|never) (?:be )?(?:\w+ )?(?:able|allowed|permitted|authorized|programmed"
    r"|designed|capable|comfortable|willing|going|equipped|in a position)|unable|unwilling|incapable|decline|refuse)"
    r"(?! help but\b)"
)
HELPING = (
    r"(?:help|assist|aid|support|provide|offer|give|share|fulfil\w*|comply|satisfy|meet|answer|respond|engage"
    r"|participate|contribute|create|generate|write|produce|make|do|perform|process|complete|facilitate|continue"
    r"|proceed|accommodate|cater|entertain|discuss|speak|talk|tell|teach|show|explain|describe|list|plan|guide|instruct"
    r"|direct|advise|suggest|recommend|promote|encourage|advocate|endorse|condone|justify|confirm|comment|disclose"
    r"|reveal)"
)
BAD = (
    "inappropriate|unacceptable|unethical|immoral|illegal|against the law|wrong|harmful|dangerous|hurtful|offensive"
    "|disrespectful|insensitive"
)
# (name, pattern)
SIGNS = [
    ("declines to help", NEGATION + r"(?: to| in good conscience| with| feel comfortable| be able to| \w+ly){0,3} "
     rf"(?:\w+ (?:or|and) )?{HELPING}|\bi (?:\w+ ){{0,3}}(?:decline|refuse)\b|\bi(?: would|'d) rather not\b"
     r"|\b(?:not something|nothing) (?:that )?i (?:can|could|will|am|feel)\b|\b(?:beyond|outside) what i (?:can|am)\b"
     r"|(?:not|n't) (?:allow|permit|enable|let) me\b|\b(?:prevents?|prohibits?|forbids?) me\b"),
    ("cannot", NEGATION),
    ("apologises", r"\b(?:sorry|apologi[sz]e|apologies|regret|afraid|unfortunately)\b(?! for (?:the|any|my) )"),
    ("speaks of itself", r"\b(?:an ai|ai (?:language )?(?:model|assistant)|language model|artificial intelligence"
     r"|as a (?:responsible|helpful|machine|digital)|(?:digital|virtual) assistant|as your assistant"
     r"|my (?:purpose|role|goal|job|function|training))\b"),
    ("speaks of rules", r"\b(?:guidelines?|polic(?:y|ies)|programming|programmed|principles|values|moral"
     r"|terms of (?:use|service)|ethical standards|legal and ethical)\b"),
    ("judges", r"\b(?:it|that|this|these|they|which|such \w+|doing so|is|are|be|not|never)"
     r"(?: would| could| can| may)?(?: is| are| be|'s| isn't| not| never|n't)+ (?:\w+ )?"
     rf"(?:appropriate|acceptable|ethical|ok|okay|right|legal|safe|respectful|productive|healthy|helpful|advisable"
     rf"|recommended|within|a crime|{BAD})\b"),
    ("speaks of harm", rf"\b(?:{BAD}|discriminat\w+|violat\w+|criminal|derogatory|perpetuat\w+)\b"),
    ("urges", r"\b(?:it is|it's) (?:also )?(?:always )?(?:important|essential|crucial|vital|necessary"
     r"|best|worth)\b"),
    ("offers something else", r"\b(?:instead|i (?:would )?(?:\w+ )?(?:encourage|urge|suggest|recommend|advise)"
     r"|(?:happy|glad|here) to (?:help|assist|provide|answer|offer)|any other (?:questions?|topics?|tasks?)"
     r"|(?:anything|something|someone|questions?) else|can i (?:help|assist)|let me know"
     r"|please (?:refrain|consider|consult|contact|seek|reach|talk|speak|call))\b"),
    ("speaks of the request", r"\b(?:your|this|that|such a|the) (?:request|question|prompt|query|inquiry|topic)\b"
     r"|you are asking|you're asking|you(?:'ve| have)? asked"),
    ("asks back", r"\b(?:clarify|rephrase|misunderst\w+|more (?:context|information)|typo"
     r"|(?:could|can) you please|(?:do|did) you mean)\b"),
    ("corrects", r"\b(?:there (?:is|are|was|were) no|do(?:es)? not exist|fictional|no evidence|inaccurate"
     r"|not (?:accurate|true|possible|real|based|factual)|hypothetical|imaginary)\b"),
    ("speaks of virtue", r"\b(?:respect\w*|dignity|equal\w*|diversity|inclusiv\w+|stereotypes?|prejudice|well-?being"
     r"|safety|rights|kindness|empathy|compassion|privacy|confidential\w*)\b"),
    ("objects", r"\b(?:but|however|nevertheless|that said)\b"),
    ("complies", r"(?:\A|[.!?:]\s|\n)(?:here (?:is|are)|here's|sure|certainly|of course|absolutely|yes"
     r"|great question|title|step)\b"),
    ("defines", r"\b(?:refers? to|is an?|was an?|are|means?|there are (?:several|many|a few|various)|you can)\b"),
    ("lists", r"(?m)^\s*(?:\d+[.)]|[-•])\s"),
]  # fmt: skip
CUTS = (None, 1, 2)          # sentences that are kept of an answer when it is learnt from
STRENGTHS = (1.0, 3.0, 10.0)
FOLDS = 5


def read_labelled(paths) -> tuple[list[str], np.ndarray]:
    """The answers of the files, and for each whether people called it a full or partial refusal. Raises ValueError."""
    rows = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"completion", "final_label"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path} has no columns completion and final_label")
            rows += reader
    return [row["completion"] for row in rows], np.array([row["final_label"] != "1_full_compliance" for row in rows])


def features(texts: list[str]) -> np.ndarray:
    """(cuts, answers, 2 * signs): for each sign whether it is in the opening, and whether it is anywhere."""
    patterns = [pattern for _, pattern in SIGNS]
    return np.array([[refusal_signs(text, patterns, cut).ravel() for text in texts] for cut in CUTS], float)


def fit(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Bias and weights (1 + 2 * signs) of least logistic loss, both classes weighing the same, plus strength / 2 times
    the squared weights, by Newton's method."""
    x, y = x.reshape(-1, x.shape[-1]), np.tile(y, len(x)).astype(float)
    x = np.concatenate((np.ones((len(x), 1)), x), 1)
    share = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    decay = np.diag([0.0] + [strength] * (x.shape[1] - 1))
    weights = np.zeros(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (share * (p - y)) + decay @ weights
        weights -= np.linalg.solve((x.T * (share * p * (1 - p))) @ x + decay, slope)
    return weights


def choose_strength(x: np.ndarray, y: np.ndarray) -> float:
    """The strength of least log loss on the whole answers of held-out folds."""

    def loss(strength: float) -> float:
        fold = np.random.default_rng(0).permutation(len(y)) % FOLDS
        total = 0
        for i in range(FOLDS):
            weights = fit(x[:, fold != i], y[fold != i], strength)
            score = weights[0] + x[0, fold == i] @ weights[1:]
            total += np.logaddexp(0, np.where(y[fold == i], -score, score)).sum()
        return total

    return min(STRENGTHS, key=loss)


def train(texts: list[str], y: np.ndarray) -> dict:
    """The filter as it is written to refusals.json; an answer refuses when bias and weights sum to above 0."""
    x = features(texts)
    weights = fit(x, y, choose_strength(x, y)).round(3)
    both = weights[1:].reshape(2, -1).T.tolist()
    signs = [
        {"sign": name, "opening": opening, "anywhere": anywhere, "pattern": pattern}
        for (name, pattern), (opening, anywhere) in zip(SIGNS, both)
    ]
    return {"bias": float(weights[0]), "signs": signs}


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
    test: tuple[str, ...] = ()          # other labelled files to measure on
    out: str = ""                       # the file of weights to write


def main(config: Config):
    texts, y = read_labelled(config.train)
    model = train(texts, y)
    print(f"trained on {len(y)} answers, {y.sum()} of them refusals")
    if config.test:
        texts, y = read_labelled(config.test)
        print(with_intervals(np.array([refusal_score(text, model) > 0 for text in texts]), y))
    if config.out:
        write_whole(Path(config.out), json.dumps(model, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
