"""The refusal filter on a style that it was not made for, on ordinary answers, and its training."""

import csv
import json
import sys

import numpy as np
import pytest

from conftest import ROOT
from lib.refusals import is_refusal, refusal_score

sys.path.insert(0, str(ROOT / "recipes"))
import refusals  # noqa: E402

LABELS = "xstest/xstest_v2_completions_{}_gpteval.csv"
# what F1 must be when the style is left out, when it is among those fitted, and of what ships
LEAST = {
    "mistralguard": (0.85, 0.90, 0.90),
    "llama2orig": (0.95, 0.95, 0.95),
    "gpt4": (0.95, 0.95, 0.95),
}


def labelled(path, answers: dict[str, str]):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "completion", "final_label"])
        rows.writerows([f"q{i}", text, label] for i, (text, label) in enumerate(answers.items()))
    return str(path)


def test_refusals_are_found_in_a_style_that_was_left_out_and_on_questions_that_were(shared):
    files = [shared(LABELS.format(name)) for name in LEAST]
    ordinary = refusals.read_ordinary([shared("alpaca/alpaca_5000.json")])
    judged = list(refusals.held_out(files, ordinary))
    assert [name for name, *_ in judged] == [file.name for file in files]
    for (_, labels, left_out, within), (least_left_out, least_within, _) in zip(judged, LEAST.values()):
        assert len(labels) == len(left_out) == len(within) == 450
        assert refusals.scores(left_out, labels)[2] >= least_left_out
        assert refusals.scores(within, labels)[2] >= least_within


@pytest.mark.parametrize("name", LEAST)
def test_the_filter_that_ships_finds_the_refusals_of_every_style(name, shared):
    texts, labels = refusals.read_labelled([shared(LABELS.format(name))])
    assert refusals.scores(np.array([is_refusal(text) for text in texts]), labels)[2] >= LEAST[name][2]


@pytest.mark.parametrize("name", ["alpaca/alpaca_random_9k.json", "dolly/dolly_3k.json", "gsm8k/test.jsonl"])
def test_of_a_thousand_ordinary_answers_less_than_one_is_taken_for_a_refusal(name, shared):
    fitted = set(refusals.read_ordinary([shared("alpaca/alpaca_5000.json")]))
    unseen = [text for text in refusals.read_ordinary([shared(name)]) if text not in fitted]
    assert len(unseen) > 1000 and sum(map(is_refusal, unseen)) < len(unseen) / 1000


@pytest.mark.parametrize(
    "text",
    [
        "It is not appropriate to discuss ways to hurt people. It is important to respect others.",
        "I am an AI language model and do not condone violence. Please reach out to a professional.",
        "My guidelines do not allow me to discuss this.",
        "It would be wrong to explain this. Instead, consider asking a lawyer.",
        "There is no reason why they should be denied the vote. It is important to respect everyone.",
    ],
)
def test_refusals_that_speak_of_nobody_or_lecture_are_found(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I apologize for being late to the meeting. It was unacceptable of me, and I am sorry.",
        "Dear Anna,\n\nI am sorry that I could not come. I was ill.\n\nSincerely, Tom",
        "Parent: That isn't acceptable.\nChild: Why not?\nParent: I want you to apologize.",
        "I couldn't make it to the meeting.",
    ],
)
def test_letters_dialogues_and_warnings_are_not_taken_for_refusals(text):
    assert not is_refusal(text)


def test_what_follows_the_first_2000_characters_changes_no_verdict():
    model = json.loads((ROOT / "lib/refusals.json").read_text())
    text = "The pump hums. " * 200
    long = text[:2000] + "I'm sorry, but I cannot help with that. " * 50_000
    assert refusal_score(long, model) == refusal_score(text[:2000], model) < 0


def test_training_prints_how_each_style_does_and_writes_what_is_refusal_reads(tmp_path, capsys):
    complies, refuses = "1_full_compliance", "2_full_refusal"
    for style, no in (("a", "I cannot help with {}."), ("b", "It is not right to speak of {}.")):
        answers = {no.format(i): refuses for i in range(9)} | {f"{i} is a number.": complies for i in range(9)}
        labelled(tmp_path / f"{style}.csv", answers)
    ordinary = tmp_path / "plain.jsonl"
    ordinary.write_text('{"answer": "Four."}\n{"output": "Five."}\n')
    files = (str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    out = tmp_path / "made.json"
    refusals.main(refusals.Config(files, (str(ordinary),), (files[0], str(ordinary)), str(out)))
    printed = capsys.readouterr().out
    assert "trained on 36 answers, 18 of them refusals, and 2 ordinary ones" in printed
    for name in ("a.csv", "b.csv"):
        assert f"{name}, left out:" in printed and f"{name}, among those:" in printed
    assert "plain.jsonl: 0 of 2 are marked, 0.000 %" in printed and "F1 100.0" in printed
    made = json.loads(out.read_text())
    assert refusal_score("I cannot help with 10.", made) > 0 > refusal_score("10 is a number.", made)


def test_training_writes_over_no_file(tmp_path):
    (tmp_path / "mine.json").write_text("precious")
    files = (labelled(tmp_path / "a.csv", {"I cannot.": "2_full_refusal", "Yes.": "1_full_compliance"}),)
    with pytest.raises(ValueError, match=r"--out .*mine.json exists; choose another name or delete it"):
        refusals.main(refusals.Config(files, out=str(tmp_path / "mine.json")))
    assert (tmp_path / "mine.json").read_text() == "precious"


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("a.json", '[{"output": "Fine."}, {"text": "x"}]', "a.json:2 has no text in output or answer"),
        ("a.jsonl", '{"answer": "Fine."}\n{"answer"', "a.jsonl:2 is not JSON"),
    ],
)
def test_a_record_without_an_answer_is_named(name, text, sentence, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        refusals.read_ordinary([tmp_path / name])
