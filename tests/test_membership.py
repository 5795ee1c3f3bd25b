"""recipes/membership.py and attacks.py: formulas by hand, what may not leak, and controls at chance."""

import dataclasses
import doctest
import sys
from itertools import product

import numpy as np
import pytest
import torch

from conftest import ROOT, random_model
from data import Tokenizer
from lib.meta import read_meta
from model import SIZES

sys.path.insert(0, str(ROOT / "recipes"))
import attacks
import membership
from attacks import Answers, Split
from cloze import read_split

CONFIG = dataclasses.replace(SIZES["260K"], dim=32, num_layers=1, vocab_size=300)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(attacks, "TREES", 10)
    monkeypatch.setattr(attacks, "DRAWS", 200)


def made_up(documents: int, tokens: int, vocab_size: int = 20, seed: int = 0) -> Answers:
    """Answers of no model, with nothing in them to find."""
    draw = np.random.default_rng(seed)
    logprobs = -draw.exponential(2, (documents, tokens))
    return Answers(draw.integers(vocab_size, size=logprobs.shape), logprobs, logprobs * draw.random(logprobs.shape))


def half(count: int, seed: int = 0) -> np.ndarray:
    """Labels at random, as many members as others."""
    return np.random.default_rng(seed).permutation(np.arange(count) % 2 == 0)


# ---- formulas ----


def test_the_auc_is_the_share_of_pairs_in_which_the_member_is_above():
    labels = np.array([True, False, True, False, False])
    assert attacks.auc(np.array([3.0, 1, 2, 2, 0]), labels) == pytest.approx((3 + 2.5) / 6)
    assert attacks.auc(np.array([9, 1, 8, 7, 0]), labels) == 1 and attacks.auc(np.zeros(5), labels) == 0.5
    scores, labels = np.random.default_rng(0).integers(9, size=40), half(40)
    pairs = [(a > b) + (a == b) / 2 for a, b in product(scores[labels], scores[~labels])]
    assert attacks.auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert attacks.auc(scores, ~labels) == pytest.approx(1 - np.mean(pairs))
    assert doctest.testmod(attacks) == (0, 1)


def test_the_reference_and_maxnorm_are_those_of_the_paper():
    reference = attacks.frequencies(np.array([[0, 0, 1], [1, 2, 0]]), 5)
    assert reference == pytest.approx([3 / 6, 2 / 6, 1 / 6, 1 / 12, 1 / 12])  # unseen: half the smallest
    answers = Answers(np.array([[1, 4]]), np.log([[0.2, 0.6]]), np.log([[0.5, 0.6]]))
    expected = [[-np.log((1 - 0.3) / (2 / 6)), -np.log(1 / (1 / 12))]]
    assert attacks.max_norm(answers, reference) == pytest.approx(np.array(expected))


def test_aggregates_are_thirteen_numbers_and_do_not_tell_the_length():
    losses = np.arange(101.0)[None]
    found = attacks.aggregates(Answers(losses, -losses, losses))
    expected = [50, 0, 100, np.sqrt((101**2 - 1) / 12), 1, 5, 10, 25, 50, 75, 90, 95, 99]
    assert found[0] == pytest.approx(expected)
    twice = np.tile(np.full((1, 7), 3.0), 2)
    assert (attacks.aggregates(Answers(twice, -twice, twice))[0] == [3, 3, 3, 0] + 9 * [3]).all()


def test_attacks_by_probabilities_are_means_of_what_they_say():
    now = Answers(None, -np.array([[1.0, 9, 2, 3, 7, 1, 1, 2, 2, 2]]), None)
    early = Answers(None, -np.full((1, 10), 4.0), None)
    found = attacks.by_probabilities(now, early, np.array([6]))
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(
        {"loss": -3, "Min-20 %": -8, "loss / zlib": -5, "loss less early": 1}
    )


def test_counts_of_the_members_are_all_that_the_model_without_a_model_knows():
    ids, members = np.array([[1, 2, 2, 3], [2, 2, 2, 3], [1, 2, 4, 3]]), np.array([True, True, False])
    found = attacks.of_counts(ids, members, 9)
    expected = np.log([[5 / 8, 5 / 8, 2 / 8], [5 / 8, 5 / 8, 2 / 8], [5 / 8, 1 / 16, 2 / 8]])
    assert (found.tokens == ids[:, 1:]).all() and found.logprobs == pytest.approx(expected)


def test_a_histogram_has_equal_bins_between_the_ends_of_the_training_documents(monkeypatch):
    monkeypatch.setattr(attacks, "BINS", 4)
    values = np.array([[0.0, 1, 4, 4], [1.0, 1, 3, 2], [-9, 9, 1.9, 2.1]])
    monkeypatch.setattr(attacks, "max_norm", lambda answers, reference: values)
    found = attacks.histograms(made_up(3, 4), np.array([0, 1]), 20)
    assert found.tolist() == [[0.25, 0.25, 0, 0.5], [0, 0.5, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]


def test_each_token_but_the_first_is_asked_once_in_its_window(monkeypatch):
    monkeypatch.setattr(attacks, "WINDOW", 8)
    model, ids = random_model(CONFIG), np.random.default_rng(0).integers(300, size=(3, 3 * 7 + 1))
    found = attacks.ask(model, ids)
    assert found.logprobs.shape == (3, 21) and (found.tokens == ids[:, 1:]).all()
    with torch.no_grad():
        for document, place in ((0, 1), (0, 7), (1, 8), (2, 14), (2, 21)):
            begin = (place - 1) // 7 * 7
            logprobs = model(torch.tensor(ids[document : document + 1, begin:place]))[0, -1].log_softmax(-1)
            assert found.logprobs[document, place - 1] == pytest.approx(float(logprobs[ids[document, place]]), abs=1e-4)
            assert found.largest[document, place - 1] == pytest.approx(float(logprobs.max()), abs=1e-4)


# ---- what may not leak ----


def test_the_reference_and_the_bins_come_from_training_documents_alone():
    answers, train = made_up(12, 30), np.arange(8)
    before = attacks.histograms(answers, train, 40)
    for changed in (
        answers._replace(tokens=np.where(np.arange(12)[:, None] < 8, answers.tokens, 0)),
        answers._replace(tokens=np.where(np.arange(12)[:, None] < 8, answers.tokens, 33)),
        answers._replace(logprobs=np.where(np.arange(12)[:, None] < 8, answers.logprobs, answers.largest - 11)),
    ):
        after = attacks.histograms(changed, train, 40)
        assert (after[:8] == before[:8]).all() and (after[8:] != before[8:]).any()
        assert after.sum(1) == pytest.approx(np.ones(12))  # what lies outside the edges is counted too


def test_no_document_is_judged_by_a_forest_that_has_seen_it():
    labels, seen = half(50), []

    def features(train):
        """The label itself of training documents, nothing of the others."""
        seen.append(train)
        return np.where(np.isin(np.arange(50), train), labels, 0.5)[:, None]

    scores = attacks.crossed(features, labels, seed=0)
    assert len(np.unique(scores)) <= attacks.FOLDS and abs(attacks.auc(scores, labels) - 0.5) < 0.1
    assert sorted(np.concatenate([np.setdiff1d(np.arange(50), train) for train in seen])) == list(range(50))
    assert all(labels[train].sum() == 20 and len(train) == 40 for train in seen)
    assert attacks.auc(attacks.crossed(lambda train: labels[:, None] * 1.0, labels, 0), labels) == 1


# ---- controls ----


def test_with_shuffled_labels_every_attack_is_at_chance():
    answers, early, draws = made_up(100, 60), made_up(100, 60, seed=1), range(4)
    found = []
    for seed in draws:
        labels = half(100, seed)
        scores = attacks.attack(answers, early, np.full(100, 50), labels, 20, seed)
        scores["blind"] = attacks.blind(answers.tokens, labels, 20, seed)
        found.append([attacks.auc(values, labels) for values in scores.values()])
    error = 0.5 / np.sqrt(3 * 25 * len(draws))  # of an AUC of 50 against 50, about 0.058, over the draws
    assert np.shape(found) == (4, 7) and (np.abs(np.mean(found, 0) - 0.5) < 4 * error).all()


def test_another_kind_of_text_looks_like_membership_to_a_model_that_read_nothing(monkeypatch):
    monkeypatch.setattr(attacks, "BINS", 30)  # these documents are shorter
    draw, labels = np.random.default_rng(0), half(60)
    weights = draw.dirichlet(np.full(300, 0.1), 2)
    ids = np.array([draw.choice(300, 128, p=weights[int(label)]) for label in labels])
    answers = attacks.ask(random_model(CONFIG), ids)
    scores = attacks.attack(answers, answers, np.full(60, 50), labels, 300, 0)[attacks.PAPER]
    assert attacks.auc(scores, labels) > 0.9 and attacks.auc(attacks.blind(ids, labels, 300, 0), labels) > 0.9


def test_over_swapped_halves_what_makes_a_document_easy_cancels_out():
    labels = np.array([half(40), ~half(40)])
    easy = np.random.default_rng(1).normal(size=40) + labels[0]  # not of the model
    split = Split(labels, {(1, "easy"): [easy, easy], (1, "true"): [easy + 9 * labels[0], easy + 9 * labels[1]]})
    found = split.estimate(lambda draw: split.auc(draw, 1, "easy"))
    assert found.seeds[0] > 0.6 and found[:3] == pytest.approx((0.5, 0.5, 0.5))
    assert split.estimate(lambda draw: split.auc(draw, 1, "true"))[:3] == (1, 1, 1)
    one = Split(labels[:1], {(1, "easy"): [easy]})
    found = one.estimate(lambda draw: one.auc(draw, 1, "easy"))
    assert found.low < found.mean < found.high and 0.1 < found.high - found.low < 0.5


# ---- documents, and the whole with tiny models ----


def test_pieces_are_the_middle_of_long_files_without_tests_and_near_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "SIZE", 100)
    monkeypatch.syspath_prepend(tmp_path)
    draw, package = np.random.default_rng(0), tmp_path / "a_package_of_texts"
    texts = ["".join(draw.choice(list("abcdefghij"), 300)) for _ in range(4)]
    files = {"__init__": texts[0], "inside/b": texts[1], "inside/copy": texts[1][:290] + "#" * 10, "tests/c": texts[2]}
    for name, content in (files | {"short": "x" * 99, "least": texts[3][:100]}).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(content)
    ids, folders = membership.pieces("a_package_of_texts", Tokenizer("bytes"), 10)
    found = dict(zip((bytes(row).decode() for row in ids.tolist()), folders))
    assert len(ids) == 3
    assert found == {texts[0][100:200]: ".", texts[1][100:200]: "inside", texts[3][:100]: "."}
    assert len(membership.pieces("a_package_of_texts", Tokenizer("bytes"), 2)[0]) == 2


def test_half_of_each_folder_is_members_and_the_next_seed_swaps_them():
    folders = ["a"] * 8 + ["b"] * 6 + ["c"] * 5
    first, second, third = (membership.halves(folders, seed) for seed in range(3))
    assert first[:8].sum() == 4 and first[8:14].sum() == 3 and first[14:].sum() in (2, 3)
    assert (second == ~first).all() and (third != first).any() and (third != second).any()


def test_the_dataset_trains_on_the_members_and_on_nothing_else(tmp_path):
    ids = np.random.default_rng(0).integers(97, 123, size=(10, 50))
    membership.write_dataset(tmp_path / "data", Tokenizer("bytes"), ids[:6], ids[6:])
    assert read_split(tmp_path / "data", "train") == ids[:6].tolist()
    assert read_split(tmp_path / "data", "val") == ids[6:].tolist()
    assert read_meta(tmp_path / "data")["splits"]["train"]["bytes"] == 300


def test_all_is_measured_and_judged_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(membership, "trained", lambda seed, epochs: epochs)
    monkeypatch.setattr(membership, "load", lambda epochs: random_model(CONFIG, seed=int(4 * epochs)))
    monkeypatch.setattr(attacks, "TREES", 2)
    monkeypatch.setattr(attacks, "DRAWS", 10)
    count = 30
    ids = np.random.default_rng(0).integers(97, 123, size=(count, 128))
    labels = [half(count), ~half(count)]
    honest = membership.measured(ids, labels, (0, 1, 4, 16), Tokenizer("bytes"), read=True)
    shifted = membership.measured(ids, [labels[0]] * 2, (0, 16), Tokenizer("bytes"), read=False)
    assert len(honest.scores) == 4 * 9 and len(shifted.scores) == 2 * 7
    assert all(np.shape(values) == (2, count) for values in honest.scores.values())
    report = membership.Report("membership", "A title")
    membership.tabled(report, shifted)
    membership.judge(report, honest, shifted)
    report.end()
    written = (tmp_path / "out/papers/membership.md").read_text()
    assert written.count("Predicted:") == 8 and "| blind, no model |" in written
