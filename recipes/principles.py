"""SELF-ALIGN's steps (Sun et al. 2023, arXiv:2305.03047): answers under principles, with thoughts that are cut off.

Filters as in the authors' code for Dromedary-2: an answer is kept only up to the first clause that it repeats, and
dropped where it has no thoughts or nothing behind them, says the question again, or holds words of the examples.
"""

import re

PRINCIPLES = """1 (brief). Say "In short:" first.
2 (true). Say only what the source says."""
STYLE = "In short:"
THOUGHTS, ANSWER = "Thoughts:", "\nAnswer:"
LONG = 16  # characters of a question from which on an answer must not hold it


def principled(question: str) -> str:
    """The prompt: principles before a question."""
    return f"{PRINCIPLES}\n\n{question}"


def with_thoughts(kind: str, answer: str) -> str:
    """What a model is to write under principles."""
    return f"{THOUGHTS} they ask for the {kind}, rule 1.{ANSWER} {answer}"


def up_to_repeat(text: str) -> str:
    """A text up to its first clause that was there before; single marks may repeat.

    >>> up_to_repeat("It is a list. It is long, it is a list. It is long, it is")
    'It is a list. It is long, it is a list.'
    """
    seen = []
    for clause in re.split(r"(?<=[\n.?!;:,`])", text):
        if clause in seen and clause and clause not in "\n.?!;:,`":
            break
        seen.append(clause)
    return "".join(seen).strip()


def aligned(question: str, text: str, ended: bool, words: tuple[str, ...] = ()) -> tuple[str, str]:
    """Of what was written under principles the answer to train on, and why it is dropped, empty where it is kept.

    A text that was cut by its length loses its last word. words are those of the examples in the prompt.
    """
    if not text.startswith(THOUGHTS):
        return "", "no thoughts"
    if ANSWER not in text:
        return "", "no answer after the thoughts"
    answer = up_to_repeat(text.split(ANSWER, 1)[1].strip())
    if not ended:
        answer = answer.rpartition(" ")[0]
    if len(question) > LONG and question in answer:
        return "", "says the question again"
    if any(word in answer for word in words):
        return "", "words of the examples"
    return answer, "" if answer else "empty answer"
