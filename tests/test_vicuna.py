"""Vicuna's cleaning of shared chats, rule by rule, and where this project differs from it on purpose.

The rules are those of lm-sys/FastChat, in the order of its fastchat/data/prepare_all.py:
1. clean_sharegpt.py: roles, blocked words and messages, HTML to markdown, empty answers, length, copies, plugins.
2. optional_clean.py: languages, and nine equal digits in a row.
3. split_long_conversation.py: pieces of whole exchanges, a turn counted as its tokens and 6 more.
4. filter_wrong_format.py: lists whose numbers do not go on.
5. split_train_test.py: 1 of 100 is held out.
6. hardcoded_questions.py: questions about who the model is are added.
What it takes out of the result after that, GPT-4's answers and first exchanges alone, cleans nothing.

Each case is a file of ShareGPT records, and the conversations that either trains on. Ours are read back from the
folder that data.py makes with its defaults. Vicuna's are what its code gives, with markdownify 0.11.6; what splitting
gives is for a tokenizer of bytes with a BOS. Only the case about holding out looks at its part of it.
"""

import json
from typing import NamedTuple

import numpy as np
import pytest

from conftest import prepare_chats
from lib.cleaning import Cleaning
from lib.datasets import TokenFiles
from lib.tokenizer import Tokenizer

ON_PURPOSE = (
    "two questions in a row",
    "a system's text",
    "blocked words",
    "a fraction at the beginning",
    "an empty block of code",
    "two blank lines",
    "signs of markup in plain text",
    "an empty answer",
    "an answer that begins unprintably",
    "fewer than 16 characters",
    "an id twice",
    "a first exchange twice",
    "nearly the same answer",
    "plugins",
    "a language left out",
    "nine equal digits",
    "six more tokens a turn",
    "a last exchange that does not fit",
    "a list that begins again",
    "one first question, two answers",
    "who the model is",
)
DROPPED = []
HELD_OUT = "held out:"  # goes before the texts of a conversation for validation
OTHERS = [("Name a tree.", "An oak, for one."), (HELD_OUT, "Tell a joke.", "No, you tell one.")]  # neither split empty
SAID = "A long enough answer."


class Case(NamedTuple):
    rule: str
    records: list[dict]
    vicuna: list[tuple[str, ...]]            # the texts of each conversation's turns
    ours: list[tuple[str, ...]] | None = None  # None: the same
    why: str = ""                            # it is not the same
    max_len: int = 2048


def record(*texts: str, roles: str = "human gpt", **fields) -> dict:
    names = roles.split()
    turns = [{"from": names[i % len(names)], "value": text} for i, text in enumerate(texts)]
    return {"id": "a", "conversations": turns} | fields


def body(html: str) -> str:
    return f'<div class="markdown prose"><p>{html}</p></div>'


def code(language: str, text: str) -> str:
    bar = f"<div><span>{language}</span><button>Copy code</button></div>"
    return f'<pre><div class="rounded-md">{bar}<div><code class="hljs">{text}</code></div></div></pre>'


LOOP = "for (int my_i = 0; my_i &lt; 2; my_i++)\n    <span class=\"k\">f</span>(my_i);\n"
MARKUP = ("Why <b>bold</b>?", "if my_a < 2 * b:\n    a = 2")
LIMIT = "Too many requests in 1 hour. Try again later."
STEPS = "Do this:\n1. Mix it.\n1. Bake it."
TEXT = " ".join(f"word{i}" for i in range(60))
WHO = ("Who are you?", "I am Vicuna, a language model trained by researchers from …")  # the first of 937, shortened
CASES = [
    # ---- clean_sharegpt.py ----
    Case("a question alone", [record("Is anyone there?")], DROPPED),
    Case("an answer first, a question last",
         [record("Hello!", "Q", SAID, "Thanks", roles="gpt human")], [("Q", SAID)]),
    Case("an unknown role", [record("Q", SAID, roles="human bing")], DROPPED),
    Case("two questions in a row",
         [record("First,", "then?", SAID, roles="human human gpt")], DROPPED, [("First,\n\nthen?", SAID)],
         "Turns of one side that follow each other are one turn, written in parts."),
    Case("a system's text",
         [record("Be brief.", "Q", SAID, roles="system human gpt")], [("Q", SAID)], [("Be brief.\n\nQ", SAID)],
         "The template has a place for it; here that is before the question."),
    Case("blocked words",
         [record("What is OpenAI?", "It made ChatGPT.")], DROPPED, [("What is OpenAI?", "It made ChatGPT.")],
         "What a chat may be about is the user's choice; --drop_refusals goes by the grammar of refusing."),
    Case("a blocked message", [record("Q", LIMIT)], DROPPED),
    Case("HTML becomes markdown",
         [record("Q", body("It is <strong>so</strong>, <span>a &lt; b</span>."))], [("Q", "It is **so**, a < b.")]),
    Case("the bar above code",
         [record("Q", code("c++", LOOP))],
         [("Q", "```c++\nfor (int my_i = 0; my_i < 2; my_i++)\n    f(my_i);\n```")]),
    Case("which of the answers it is", [record("Q", "<div>2 / 3</div>" + body(SAID))], [("Q", SAID)]),
    Case("a fraction at the beginning",
         [record("Q", "2 / 3 is what remains of it.")], [("Q", "is what remains of it.")],
         [("Q", "2 / 3 is what remains of it.")], "It is the page's number only before HTML."),
    Case("how long the answer is", [record("Q", body(SAID) + "Copy21 chars / 4 words")], [("Q", SAID)]),
    Case("an empty block of code",
         [record("Q", body(SAID) + code("", ""))], [("Q", f"{SAID}\n```\n```")], [("Q", SAID)],
         "FastChat means to remove it too, but its pattern does not allow for the line ends."),
    Case("two blank lines",
         [record("Q", "def f(): pass\n\n\ndef g(): pass")], [("Q", "def f(): pass\ndef g(): pass")],
         [("Q", "def f(): pass\n\n\ndef g(): pass")], "Python has them between functions."),
    Case("signs of markup in plain text",
         [record(*MARKUP)], [("Why **bold**?", "if my\\_a < 2 \\* b:\n a = 2")], [MARKUP],
         "Only an answer that is HTML as a whole is converted; all other text keeps its signs and its indentation."),
    Case("an empty answer",
         [record("Q", SAID, "Well?", "", "Then?", "Yes.")], [("Q", SAID)], [("Q", SAID, "Well?\n\nThen?", "Yes.")],
         "What is left out is the empty turn, not all after it."),
    Case("an answer that begins unprintably",
         [record("Q", SAID, "Well?", "\u200bYes.")], [("Q", SAID)], [("Q", SAID, "Well?", "Yes.")],
         "What is left out is the sign, not the answer."),
    Case("fewer than 16 characters",
         [record("2 + 2?", "4")], DROPPED, [("2 + 2?", "4")],
         "A short answer may be the best one; --min_answer_chars drops it."),
    Case("an id twice",
         [record("Q", SAID), record("Why?", "For no reason at all.")], [("Q", SAID)],
         [("Q", SAID), ("Why?", "For no reason at all.")], "A copy is known by its text."),
    Case("a first exchange twice",
         [record("Q", SAID), record("Q", SAID, id="b"), record("Q", SAID, "Why?", TEXT, id="c")], [("Q", SAID)],
         [("Q", SAID), ("Q", SAID, "Why?", TEXT)], "A chat that goes on in another way is no copy."),
    Case("nearly the same answer",
         [record("Q", TEXT), record("Q", f"{TEXT} end", id="b")], [("Q", TEXT), ("Q", f"{TEXT} end")], [("Q", TEXT)],
         "Near copies teach the same twice; --near_duplicates 0 keeps them."),
    Case("plugins",
         [record("Q", SAID, plugins=["browser"])], DROPPED, [("Q", SAID)],
         "Chats with tools are known by the roles of their turns; see --tools."),
    # ---- optional_clean.py, as prepare_all.py calls it, and with --reduce-rep ----
    Case("a language left out",
         [record("수도가 어디예요?", "대한민국의 수도는 서울입니다.")], DROPPED,
         [("수도가 어디예요?", "대한민국의 수도는 서울입니다.")],
         "All are kept unless --language names one to keep."),
    Case("nine equal digits",
         [record("Q", "The number is 1000000000.")], DROPPED, [("Q", "The number is 1000000000.")],
         "FastChat itself warns that this may remove good chats."),
    # ---- split_long_conversation.py ----
    Case("as many exchanges as fit",
         [record("Q", "a" * 30, "Q", "b" * 13, "Q", "c" * 4)],
         [("Q", "a" * 30), ("Q", "b" * 13, "Q", "c" * 4)], max_len=50),
    Case("six more tokens a turn",
         [record("Q", "a" * 18, "Q", "b" * 10, "Q", "c" * 10)],
         [("Q", "a" * 18), ("Q", "b" * 10, "Q", "c" * 10)], [("Q", "a" * 18, "Q", "b" * 10, "Q", "c" * 10)],
         "The tokens of the template itself are counted, not a guess at them.", max_len=50),
    Case("a last exchange that does not fit",
         [record("Q", "a" * 30, "Q", "b" * 30)], [("Q", "a" * 30)], [("Q", "a" * 30), ("Q", "b" * 30)],
         "FastChat loses it by a slip; here it is a piece of its own.", max_len=50),
    # ---- filter_wrong_format.py, split_train_test.py, hardcoded_questions.py ----
    Case("a list that begins again",
         [record("Q", STEPS)], DROPPED, [("Q", STEPS)], "Markdown shows it as 1 and 2."),
    Case("one first question, two answers",
         [record("Why is snow white?", "Light scatters."), record("Why is snow white?", "Crystals.", id="b")],
         [("Why is snow white?", "Crystals."), (HELD_OUT, "Why is snow white?", "Light scatters.")],
         [(HELD_OUT, "Why is snow white?", "Light scatters."), (HELD_OUT, "Why is snow white?", "Crystals.")],
         "A hash of the first question decides, so that no question is on both sides."),
    Case("who the model is",
         [record("Q", SAID)], [("Q", SAID), WHO], [("Q", SAID)],
         "A model's name is its maker's; a file of such chats is one more --source."),
]  # fmt: skip


def conversations(folder, split: str) -> list[tuple[str, ...]]:
    """The texts of the turns that a dataset holds, told apart by what the loss counts."""
    files, tokenizer = TokenFiles(folder, split, 2048), Tokenizer(folder)
    found = []
    bounds = files.bounds[0]
    for begin, end in zip(bounds, bounds[1:]):
        tokens, mask = (kept[0][begin:end] for kept in (files.files, files.masks))
        turns = np.split(tokens, np.flatnonzero(np.diff(mask)) + 1)
        texts = [tokenizer.decode(turn.tolist()).strip() for turn in turns]
        found.append((HELD_OUT, *texts) if split == "val" else tuple(texts))
    return found


@pytest.mark.parametrize("case", CASES, ids=[case.rule for case in CASES])
def test_a_chat_is_cleaned_as_vicunas_were_or_otherwise_on_purpose(case, tmp_path, monkeypatch):
    others = [record(*other[-2:], id=f"other{number}") for number, other in enumerate(OTHERS)]
    path, out = tmp_path / "chats.json", tmp_path / "set"
    path.write_text(json.dumps(others + case.records))
    # what workers do is done here, since to start them takes a second
    monkeypatch.setattr("data.map_in_order", lambda work, tasks, workers: map(work, tasks))
    sizes = {"max_len": case.max_len, "val_fraction": 0.1, "allow_bad": 1.0}
    prepare_chats((str(path),), out, "bytes", "plain", cleaning=Cleaning(), **sizes)
    found = conversations(out, "train") + conversations(out, "val")
    expected = case.vicuna if case.ours is None else case.ours
    assert sorted(found) == sorted(OTHERS + expected)


def test_the_differences_from_vicuna_are_those_that_are_listed_and_each_has_a_reason():
    assert len(CASES) == 30
    assert tuple(case.rule for case in CASES if case.ours is not None) == ON_PURPOSE
    for case in CASES:
        assert (case.ours is not None) == bool(case.why)
        assert case.ours != case.vicuna
