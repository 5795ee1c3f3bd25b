"""The cleaning of chats, and the refusal filter measured on answers that people labelled."""

import importlib
import json
import random
import re
import sys

import numpy as np
import pytest

from conftest import ROOT, command
from lib.chat_formats import Turn
from lib.cleaning import Cleaner, Cleaning
from lib.cleaning_steps import html_to_markdown, mend_roles, tidy_characters
from lib.refusals import is_refusal, refusal_score, refusal_signs

sys.path.insert(0, str(ROOT / "recipes"))
import refusals  # noqa: E402

CODE = "So:\n\n```python\ndef f(x):\n    if x < 1 and x & 2:\n\n\n        return '&amp; <b>'\n```\n\nThat is **all**."
CLEAN = [
    Turn("system", "Be brief."),
    Turn("user", "How do I write <b> in C & what is a < b?\n\n    indented"),
    Turn("assistant", CODE),
    Turn("user", "Ça va, 你好 👩‍👧?"),
    Turn("assistant", "    x = 1\n    y = 2"),
]


def chat(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def test_a_clean_conversation_passes_through_unchanged_to_the_byte():
    cleaner = Cleaner(Cleaning(drop_refusals=True, min_answer_chars=2, max_chars=1000))
    assert cleaner(list(CLEAN)) == CLEAN
    assert all(not counts for name, counts in cleaner.counts.items() if name not in ("read", "kept"))


HTML = (
    '<div class="markdown prose"><p>Use <code>a &lt; b</code> &amp; <strong>so</strong> 2 * 3_4:</p>'
    '<pre><div class="bar"><span>python</span><button>Copy code</button></div><div>'
    '<code class="hljs language-python"><span class="k">def</span> f(x):\n    if x &lt; 1:\n        return 2\n'
    "</code></div></pre><ul><li>One</li><li>Two</li></ul></div>"
)


def test_an_answer_in_html_becomes_markdown_and_its_code_a_fenced_block():
    (_, answer) = html_to_markdown(chat("Q", HTML))
    code = "```python\ndef f(x):\n    if x < 1:\n        return 2\n```"
    assert answer.text == f"Use `a < b` & **so** 2 * 3_4:\n\n{code}\n\n- One\n- Two"


@pytest.mark.parametrize("html", ["<div>2 / 3 of it</div>", "<div>2 / 3</div>", "<div><p>2 / 3</p><p>of it</p></div>"])
def test_a_fraction_that_begins_an_answer_in_html_is_not_taken_for_a_page_number(html):
    (_, answer) = html_to_markdown(chat("Q", html))
    assert answer.text.startswith("2 / 3")


@pytest.mark.parametrize(
    "question, answer",
    [
        ("Write an HTML paragraph", "<p>Hello</p>"),
        ("Which tags make a list?", "<ul>\n  <li>One</li>\n</ul>"),
        ("Compare", "if a < b && c > d: &lt;p&gt; <T>"),
        ("Compare", "Use `<p>` and </p> there"),
        ("Compare", "```\n<p>a</p>\n```"),
        ("<p>Mine?</p>", "Yes"),
    ],
)
def test_html_that_is_the_answer_and_text_with_tags_in_it_stay(question, answer):
    assert html_to_markdown(chat(question, answer)) == chat(question, answer)


@pytest.mark.parametrize(
    "before, after",
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("\x00a\x07\u200bb\ufeff\x1b[0m\udc80", "ab[0m"),
        ("a\u00a0b", "a b"),
        (" \n\t\n  a  \n\n", "  a"),
        (" An answer", "An answer"),
        ("a\n\n\n\n\nb", "a\n\n\nb"),
        ("x:\n\tif y:  \n\t\tz", "x:\n\tif y:  \n\t\tz"),
    ],
)
def test_control_characters_and_odd_blanks_go_and_indentation_stays(before, after):
    assert tidy_characters(chat(before)) == chat(after)


@pytest.mark.parametrize("texts", [("", "a"), ("q", " \n"), ("q",)])
def test_a_conversation_in_which_one_side_says_nothing_is_dropped(texts):
    cleaner = Cleaner(Cleaning())
    assert cleaner(chat(*texts)) is None
    assert cleaner.counts["empty"]["dropped"] == 1


@pytest.mark.parametrize(
    "roles, after",
    [
        ("ua", "u0 a1"),
        ("sua", "s0 u1 a2"),
        ("uuaaua", "u0+1 a2+3 u4 a5"),
        ("auau", "u1 a2"),
        ("saua", "s0 u2 a3"),
        ("uauu", "u0 a1"),
        ("au", None),
        ("uasua", None),
        ("utua", None),
    ],
)
def test_turns_out_of_order_are_joined_or_left_out_or_the_conversation_dropped(roles, after):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    turns = [Turn(names[role], str(i)) for i, role in enumerate(roles)]
    mended = mend_roles(turns)
    assert " ".join(turn.role[0] + turn.text.replace("\n\n", "+") for turn in mended) == (after or "")
    assert not mended or mend_roles(mended) == mended


def test_conversations_in_another_language_are_dropped_and_code_tells_none():
    pytest.importorskip("py3langid")
    cleaner = Cleaner(Cleaning(language="en"))
    french = "La Révolution française commence en 1789 et change profondément la société du pays."
    assert cleaner(chat("Raconte-moi une histoire de France, s'il te plaît", french)) is None
    assert cleaner.counts["language"]["dropped"] == 1
    told = ("Tell me a story", "Once upon a time there was a king.")
    for texts in (told, ("x = 3?", "```\nlet größe = où;\n```"), ("Wie geht es dir heute?", "Gut!")):
        assert cleaner(chat(*texts))
    with pytest.raises(ValueError, match="--language klingon is none of"):
        Cleaner(Cleaning(language="klingon"))


def test_answers_too_short_and_conversations_too_long_are_dropped():
    cleaner = Cleaner(Cleaning(min_answer_chars=3, max_chars=12))
    assert cleaner(chat("q", "abc")) and cleaner(chat("x", "a" * 11))
    assert cleaner(chat("q", "abc", "q", "ab")) is None
    assert cleaner(chat("xy", "a" * 11)) is None
    assert cleaner.counts["short"]["dropped"] == cleaner.counts["long"]["dropped"] == 1


WORDS = " ".join(f"word{i}" for i in range(100))


def test_conversations_that_share_only_a_system_text_or_a_passage_are_no_near_copies():
    words = [f"w{i}" for i in range(3000)]
    draw = random.Random(0)
    some = lambda count: " ".join(draw.choices(words, k=count))
    passage, cleaner = some(250), Cleaner(Cleaning())
    for _ in range(20):
        assert cleaner([Turn("system", passage), Turn("user", some(12)), Turn("assistant", some(15))])
        assert cleaner([Turn("user", f"{passage} {some(12)}"), Turn("assistant", some(15))])


def test_what_goes_at_the_beginning_of_a_conversation_is_kept_for_inspection_too(tmp_path):
    turns = [Turn("assistant", "opening"), Turn("user", "q"), Turn("assistant", "a"), Turn("user", "unanswered")]
    assert Cleaner(Cleaning(), tmp_path / "removed.jsonl")(turns) == turns[1:3]
    (row,) = map(json.loads, open(tmp_path / "removed.jsonl"))
    assert [turn["text"] for turn in row["turns"]] == ["opening", "unanswered"]


def test_the_first_of_several_copies_is_kept_and_of_near_copies_too():
    cleaner = Cleaner(Cleaning())
    assert cleaner(chat("q", WORDS))
    assert cleaner(chat("q ", WORDS + "\n")) is None
    assert cleaner(chat("q", WORDS + " and one more")) is None
    assert [cleaner.counts[name]["dropped"] for name in ("copies", "near copies")] == [1, 1]
    half = WORDS.replace("word50", "other").replace("word20", "other").replace("word80", "other")
    assert cleaner(chat("q", half.replace("word65", "other").replace("word35", "other")))
    assert cleaner(chat("What is 2 + 2?", "4")) and cleaner(chat("What is 2 + 3?", "5"))
    alike = Cleaner(Cleaning(near_duplicates=0))
    assert alike(chat("q", WORDS)) and alike(chat("q", WORDS + " and one more"))
    with pytest.raises(ValueError, match="--near_duplicates 1.5 must be from 0 to 1"):
        Cleaner(Cleaning(near_duplicates=1.5))


def test_who_said_what_counts_in_a_copy():
    cleaner = Cleaner(Cleaning(near_duplicates=0))
    assert cleaner(chat("a", "bc")) and cleaner(chat("ab", "c"))


NO = "I'm sorry, but I cannot help with that."


def test_a_conversation_is_cut_before_the_first_question_whose_answer_refuses(tmp_path):
    cleaner = Cleaner(Cleaning(drop_refusals=True), tmp_path / "removed.jsonl")
    system = Turn("system", "Be kind.")
    fine, refused = chat("q1", "An answer."), chat("q2", NO, "Why not?", "It is a secret.")
    assert cleaner([system, *fine, *refused], "a.json:1") == [system, *fine]
    assert cleaner([system, *refused], "a.json:2") is None
    assert cleaner(chat("q3", "Another answer."), "a.json:3")
    rows = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert [(row["step"], row["where"]) for row in rows] == [("refusals", "a.json:1"), ("refusals", "a.json:2")]
    assert [Turn(**turn) for turn in rows[0]["turns"]] == refused
    assert [Turn(**turn) for turn in rows[1]["turns"]] == [system, *refused]


def test_the_report_counts_what_was_kept_changed_and_dropped_and_shows_examples(tmp_path):
    cleaner = Cleaner(Cleaning(drop_refusals=True))
    for i, texts in enumerate([("q1", "An answer.\r\n"), ("q2", NO), ("q1", "An answer."), ("q", "b\x00c", "q", NO)]):
        cleaner(chat(*texts), f"chats.json:{i + 1}")
    table, examples = {}, []
    for line in cleaner.report().splitlines()[1:]:
        examples.append(line) if ": " in line else table.update({line[:12].strip(): line[12:].split()})
    characters = sum(map(len, ("q1q2q1qq", "An answer." * 2, "\r\nb\x00c", NO, NO)))
    assert table["read"] == ["4", "10", str(characters)]
    assert table["characters"] == ["2", "3"]
    assert table["refusals"] == ["1", "1", "4", str(3 + 2 * len(NO))]
    assert table["copies"] == ["1", "2", "12"]
    assert table["kept"] == ["2", "4", str(len("q1An answer.qbc"))]
    assert "characters: chats.json:1 'An answer.\\r\\n' became 'An answer.'" in examples
    assert f'refusals: chats.json:2 "{NO}"' in examples


def test_a_library_that_is_missing_is_named_with_its_flag(monkeypatch):
    def missing(name):
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="--language needs py3langid"):
        Cleaner(Cleaning(language="en"))


# ---- the refusal filter ----


LABELS = "xstest/xstest_v2_completions_{}_gpteval.csv"
MODELS = ("gpt4", "llama2orig")


def found_by(model: dict, texts: list[str]) -> np.ndarray:
    return np.array([refusal_score(text, model) > 0 for text in texts])


@pytest.mark.parametrize("learnt, tested", [MODELS, MODELS[::-1]])
def test_refusals_learnt_from_one_models_answers_are_found_in_anothers(learnt, tested, shared):
    model = refusals.train(*refusals.read_labelled([shared(LABELS.format(learnt))]))
    texts, labels = refusals.read_labelled([shared(LABELS.format(tested))])
    _, _, f1 = refusals.scores(found_by(model, texts), labels)
    phrases = shared("refusal_phrases/xstest_refusal_prefixes.txt").read_text().splitlines()
    listed = np.array([text.strip().lower().startswith(tuple(phrases)) for text in texts])
    assert f1 >= 0.95
    assert f1 > refusals.scores(listed, labels)[2] + 0.02


def test_the_weights_that_ship_are_those_of_the_training_command(shared):
    files = [shared(LABELS.format(name)) for name in ("mistralguard", "llama2orig", "gpt4")]
    ordinary = refusals.read_ordinary([shared("alpaca/alpaca_5000.json")])
    made = refusals.train(*refusals.read_labelled(files), ordinary)
    shipped = json.loads((ROOT / "lib/refusals.json").read_text())
    assert [sign["pattern"] for sign in made["signs"]] == [sign["pattern"] for sign in shipped["signs"]]
    weights = [[m["bias"], *(s[p] for s in m["signs"] for p in ("opening", "anywhere"))] for m in (made, shipped)]
    assert np.abs(np.subtract(*weights)).max() <= 0.002  # numerics of another machine
    assert (ROOT / "lib/refusals.json").stat().st_size < 10_000


@pytest.mark.parametrize(
    "text",
    [
        NO,
        "As an AI language model, I am not able to browse the internet.",
        "I apologize, but I must decline: it would not be appropriate to share such details.",
        "I can’t assist with that request. Perhaps we could talk about something else instead?",
    ],
)
def test_refusals_in_other_words_are_found(text):
    assert is_refusal(text)


def test_ordinary_answers_are_not_taken_for_refusals(shared):
    solutions = [json.loads(line)["answer"] for line in open(shared("gsm8k/test.jsonl"))]
    assert not any(map(is_refusal, solutions))
    answers = [row["output"] for row in json.loads(shared("alpaca/alpaca_5000.json").read_text())]
    assert sum(map(is_refusal, answers)) / len(answers) < 0.005
    assert not is_refusal("") and not is_refusal("The capital of France is Paris.") and not is_refusal(CODE)


def test_the_filter_reads_the_opening_as_sentences():
    late = "One. Two. Three. I'm sorry."
    opening, anywhere = refusal_signs(late, [r"\bsorry\b", "two", "absent"])
    assert opening.tolist() == [False, True, False] and anywhere.tolist() == [True, True, False]
    assert refusal_signs(late, ["two", "three"], 2)[1].tolist() == [True, False]


def test_a_file_without_labels_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    done = command("recipes/refusals.py", "--train", str(tmp_path / "bad.csv"), check=False)
    assert done.returncode == 2
    assert re.search(r"bad.csv has no columns completion and final_label", done.stderr)
