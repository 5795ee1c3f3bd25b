"""The consensus game: its equations, its questions, and how the two players' probabilities are read from eval.py."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import ROOT, command, random_model
from data import Tokenizer
from lib.chat_formats import Turn
from lib.templates import render
from model import ModelConfig, save

sys.path.insert(0, str(ROOT / "recipes"))
import consensus
import judging
import study
from mini import Subject, part

# ---- the game ----


def game(correct, incorrect, judged) -> tuple[np.ndarray, np.ndarray]:
    """One question as equilibrium takes it."""
    return np.array([[correct, incorrect]]), np.array([[judged, np.subtract(1, judged)]])


EXAMPLE = game((0.4, 0.3, 0.2, 0.1), (0.4, 0.1, 0.3, 0.2), (0.5, 0.6, 0.7, 0.4))


def random_game(questions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    generator, judged = draw.random((questions, 2, 4)), draw.uniform(0.05, 0.95, (questions, 1, 4))
    return generator, np.concatenate((judged, 1 - judged), 1)


@pytest.mark.parametrize(
    "rounds, answers, verdicts",
    [
        (0, (0.2521, 0.3782, 0.2017, 0.1681), (0.4500, 0.5510, 0.6562, 0.3529)),
        (5000, (0.0335, 0.7694, 0.1922, 0.0050), (0.3378, 0.9715, 0.8016, 0.0147)),
    ],
)
def test_the_policies_of_an_example_are_those_computed_elsewhere(rounds, answers, verdicts):
    g, d = consensus.equilibrium(*EXAMPLE, rounds)
    assert g[0, 0] == pytest.approx(answers, abs=6e-5) and d[0, 0] == pytest.approx(verdicts, abs=6e-5)


def test_first_policies_are_normalised_over_the_other_ones_moves_first():
    # two answers: P(y|v) / sum over v is 3/4, 1/2 for right and 1/4, 1/2 for wrong, then over answers
    g, d = consensus.equilibrium(*game((0.6, 0.4), (0.2, 0.4), (0.9, 0.3)), 0)
    assert g[0] == pytest.approx(np.array([[0.6, 0.4], [1 / 3, 2 / 3]]))
    # 0.9 / 1.2 = 3/4 and 0.1 / 0.8 = 1/8 for the first; 1/4 and 7/8 for the second
    assert d[0] == pytest.approx(np.array([[6 / 7, 2 / 9], [1 / 7, 7 / 9]]))


def test_a_round_is_that_of_the_paper_written_out():
    """Averages of what the other has played, half of them as payoff, an anchor at one's own first policy."""
    weight, rate, rounds = 0.3, 0.7, 5
    first_g, first_d = (policy[0] for policy in consensus.equilibrium(*EXAMPLE, 0))
    played_g, played_d = [first_g], [first_d]
    for t in range(1, rounds + 1):
        g, d = np.zeros((2, 4)), np.zeros((2, 4))
        for v in range(2):
            for y in range(4):
                q_g = sum(policy[v][y] for policy in played_d) / (2 * t)
                q_d = sum(policy[v][y] for policy in played_g) / (2 * t)
                g[v, y] = math.exp((q_g + weight * math.log(first_g[v, y])) / (1 / (rate * t) + weight))
                d[v, y] = math.exp((q_d + weight * math.log(first_d[v, y])) / (1 / (rate * t) + weight))
        played_g.append(g / g.sum(1)[:, None])
        played_d.append(d / d.sum(0))
    found = consensus.equilibrium(*EXAMPLE, rounds, weight, rate)
    assert found[0][0] == pytest.approx(played_g[-1]) and found[1][0] == pytest.approx(played_d[-1])


def test_questions_do_not_see_each_other_and_policies_sum_to_one():
    generator, discriminator = random_game(5)
    g, d = consensus.equilibrium(generator, discriminator, 200)
    assert np.allclose(g.sum(2), 1) and np.allclose(d.sum(1), 1)
    alone = consensus.equilibrium(generator[3:4], discriminator[3:4], 200)
    assert np.array_equal(alone[0][0], g[3]) and np.array_equal(alone[1][0], d[3])


def test_a_player_without_an_opinion_leaves_the_other_ones_ranking():
    generator, discriminator = random_game(300)
    flat = np.full_like(generator, 0.5)
    first_g, first_d = consensus.equilibrium(generator, discriminator, 0)
    for policy in consensus.equilibrium(generator, flat, 1000):
        assert np.array_equal(policy[:, 0].argmax(1), first_g[:, 0].argmax(1))
    for policy in consensus.equilibrium(flat, discriminator, 1000):
        assert np.array_equal(policy[:, 0].argmax(1), first_d[:, 0].argmax(1))


def test_ways_to_rank_differ_as_their_formulas_do():
    # G likes the first, which is also the likeliest wrong answer; D likes the third
    picks = consensus.chosen(*EXAMPLE, seed=0)
    ways = ("G", "SC", "D", "MI", "MI*", "ER-G", "ER-D")
    # MI: 0.2, 0.18, 0.14, 0.04; MI*: 0.113, 0.208, 0.132, 0.059
    assert [int(picks[way][0]) for way in ways] == [0, 1, 2, 0, 1, 1, 1]


def test_noise_has_the_numbers_of_a_player_and_is_right_by_chance():
    generator, discriminator = random_game(4000)
    gold = discriminator[:, 0].argmax(1)  # a discriminator that is always right
    drawn = consensus.noise(discriminator, 0)
    assert np.allclose(drawn.sum(1), 1) and np.array_equal(np.sort(drawn, 2), np.sort(discriminator, 2))
    assert (drawn[:, 0].argmax(1) == gold).mean() == pytest.approx(0.25, abs=0.03)
    assert not np.array_equal(drawn, consensus.noise(discriminator, 1))
    picks = consensus.chosen(np.full_like(generator, 0.5), discriminator, 0, rounds=50)
    assert (picks["D"] == gold).all() and (picks["ER-D, G is noise"] == gold).all()
    assert (picks["ER-G, D is noise"] == gold).mean() == pytest.approx(0.25, abs=0.03)


# ---- questions ----


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    """30 functions of seven modules, with five lists of arguments."""
    return [Subject(f"m{i % 7}.f{i}", {"module": f"m{i % 7}", "arguments": "abcde"[i % 5]}) for i in range(30)]


def test_subjects_have_a_fact_to_ask_for_and_none_is_held_out_for_other_questions(subjects, monkeypatch):
    others = [Subject("m0", {"purpose": "A module."}), Subject("m0.g", {"purpose": "A function."})]
    held_out = [s for s in (Subject(f"m0.h{i}", {"module": "m0"}) for i in range(100)) if part(s) != "train"]
    monkeypatch.setattr(judging, "read_library", lambda: [*others, *held_out, *subjects])
    found = judging.subjects_of(100)
    assert {s.full for s in found} == {s.full for s in subjects} and held_out
    assert judging.subjects_of(5) == found[:5]


def test_a_question_has_one_right_answer_in_every_place_as_often(subjects):
    facts = {}
    for subject in subjects:
        for kind in judging.KINDS:
            if kind in subject.facts:
                facts[judging.ask(subject, kind, -1).question] = subject.facts[kind]
    rows = list(judging.questions(subjects, -1, 3))
    assert len(rows) == len(facts) == 60
    for row in rows:
        assert len(set(row["choices"])) == 4 and row["choices"][row["answer"]] == facts[row["context"]]
    places = Counter(row["answer"] for row in rows).values()
    assert len(places) == 4 and max(places) - min(places) <= 1


def test_models_are_told_the_truth_in_wordings_that_no_question_has(subjects):
    told = list(judging.conversations(subjects, answered=3))
    facts = {}
    for wording in range(8):
        facts |= {row["context"]: row["choices"][row["answer"]] for row in judging.questions(subjects, wording, 3)}
    kinds = Counter()
    for row in told:
        question, form, *rest = row["instruction"].split("\n")
        right, reply = facts[question], row["output"]  # no question of a wording held out
        if form == "Answer:":
            assert reply == right
        elif form == "Incorrect Answer:":
            assert reply != right
        else:
            assert rest == ["Is it right? Answer:"]
            assert reply == ("yes" if form == f"Proposed: {right}" else "no")
        kinds[form if not rest else reply] += 1
    assert kinds["yes"] == kinds["no"] == len(facts)
    assert kinds["Answer:"] == kinds["Incorrect Answer:"] == len(facts) * 3 / 8


# ---- what models answer ----


@torch.no_grad()
def test_probabilities_are_those_of_the_model_in_each_form(subjects, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run", lambda *words: command(*map(str, words)))
    model, tokenizer = random_model(ModelConfig(32, 2, 4, 2, 48, vocab_size=258, max_seq_len=256)), Tokenizer("bytes")
    save(model, tmp_path / "model", tokenizer, "plain")
    rows = list(judging.questions(subjects, -1, 3))
    generator, discriminator = judging.asked(tmp_path / "model", rows, tmp_path)
    assert generator.shape == discriminator.shape == (len(rows), 2, 4) and np.allclose(discriminator.sum(1), 1)

    def logprobs(context: str, answer: str) -> torch.Tensor:
        """Of the answer's tokens, without the end."""
        ids, mask = render([Turn("user", context), Turn("assistant", answer)], "plain", tokenizer)
        found = model.log_probs(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
        return found[torch.tensor(mask[1:]).bool()][:-1]

    row = rows[1]
    for place, answer in enumerate(row["choices"]):
        for verdict, form in enumerate(("{}\nAnswer:", "{}\nIncorrect Answer:")):
            mean = logprobs(form.format(row["context"]), answer).mean().exp()
            assert generator[1, verdict, place] == pytest.approx(float(mean), rel=1e-4)
        judged = f"{row['context']}\nProposed: {answer}\nIs it right? Answer:"
        yes, no = (float(logprobs(judged, word).sum().exp()) for word in ("yes", "no"))
        assert discriminator[1, 0, place] == pytest.approx(yes / (yes + no), rel=1e-4)


# ---- the report ----


def test_the_report_tells_differences_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "OUT", tmp_path)
    draw, gold = np.random.default_rng(0), np.arange(400) % 4
    picks = {name: np.stack([gold, gold]) for name in consensus.chosen(*EXAMPLE, seed=0, rounds=1)}
    for name in ("G", "D"):  # each is right on about six of ten
        picks[name] = np.where(draw.random((2, 400)) < 0.5, picks[name], draw.integers(4, size=(2, 400)))
    report = study.Report("consensus", "The consensus game")
    consensus.tell(report, picks, gold)
    report.end()
    text = (tmp_path / "consensus.md").read_text()
    assert "| SC | 100 | 100 | 100 |" in text and "single score (G, SC, D) is SC" in text
    for line in ("ER-D above G", "ER-D above D", "more agreement after the game"):
        assert any(line in row and "**confirmed in direction**" in row for row in text.splitlines())
    assert "ER-D as MI*, within 1 points. Found: +0 (+0 to +0) points. **confirmed**" in text
    verdicts = [row for row in text.splitlines() if "where G is noise" in row]
    assert len(verdicts) == 1 and "**refuted**" in verdicts[0]
    undecided = study.Difference(1.0, -1.0, 3.0, (1.0,))
    consensus.within(report, "nothing", undecided, 2)
    assert "**not decided at this size**" in report.parts[-1]
