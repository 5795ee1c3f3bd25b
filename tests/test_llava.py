"""recipes/llava.py: pictures drawn by hand, questions whose words tell nothing, and a model that reads a picture."""

import doctest
import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, prepare, random_model
from data import Tokenizer
from lib.errors import BadInput
from model import IGNORE, ModelConfig, save

sys.path.insert(0, str(ROOT / "recipes"))
import llava
import scenes
import seeing
import study

SHAPE = ModelConfig(16, 2, 2, 2, 24, vocab_size=512, max_seq_len=256, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(shared) -> Tokenizer:
    return Tokenizer(shared("stories260K/tok512.rebuilt.model"))


@pytest.fixture
def seeing_model() -> seeing.Seeing:
    torch.manual_seed(0)
    return seeing.Seeing(seeing.Tower(16), random_model(SHAPE), torch.rand(8, 16, 48))


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(scenes)
    assert found.attempted > 0 and found.failed == 0


# ---- pictures and questions ----


def test_shapes_are_painted_as_by_hand():
    """In four pixels by four whose middles are 0.5 and 1.5 radii from the shape's, only the inner four can be in it."""
    inner = {"square": "1111", "triangle": "0011", "circle": "1111", "ring": "1111", "line": "0000"}
    for shape, name in enumerate(scenes.SHAPES):
        picture = scenes.paint([(3, shape, 0.5, 0.5)], 4, radius=0.25)
        assert "".join(str(int(p[0])) for p in picture[1:3, 1:3].reshape(4, 3)) == inner[name]
        assert picture.sum() == 2 * inner[name].count("1")  # yellow is red and green
    ring, line = (scenes.paint([(4, shape, 0.5, 0.5)], 9, radius=0.4)[..., 0] for shape in (3, 4))
    assert ring[4].tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0] and ring[:, 4].tolist() == ring[4].tolist()
    assert line.sum(1).tolist() == [0, 0, 0, 7, 7, 7, 0, 0, 0]


def test_whatever_a_questions_words_each_answer_is_as_frequent():
    draw, asked = np.random.default_rng(0), defaultdict(Counter)
    for kind, count in {"color": 3000, "shape": 3000, "count": 1500, "left": 6000}.items():
        for _ in range(count):
            _, words, answer = scenes.question(draw, kind)
            asked[kind, words][answer] += 1
    assert len(asked) == 5 + 5 + 1 + 20
    for (kind, words), answers in asked.items():
        chance, total = scenes.CHANCE[kind], sum(answers.values())
        assert len(answers) == round(1 / chance), words
        for count in answers.values():
            assert abs(count / total - chance) < 4 * (chance * (1 - chance) / total) ** 0.5


def test_answers_are_right_by_the_scene():
    draw = np.random.default_rng(1)
    for kind in scenes.ANSWERS:
        for _ in range(100):
            objects, asked, answer = scenes.question(draw, kind)
            words = {scenes.SHAPES[s]: (list(scenes.COLORS)[c], x) for c, s, x, _ in objects}
            assert len(words) == len(objects) == len({color for color, _ in words.values()})
            named = [word.strip("?") for word in asked.split() if word.strip("?") in words]
            if kind == "color":
                assert answer == words[named[0]][0]
            elif kind == "shape":
                assert asked == f"Which shape is {words[answer][0]}?"
            elif kind == "count":
                assert answer == {1: "one", 2: "two", 3: "three"}[len(words)]
            else:
                assert answer == ("yes" if words[named[0]][1] < words[named[1]][1] else "no")


def test_five_pairs_are_held_out_from_all_but_the_last_tests_which_differ_from_their_twins_in_one_object():
    tests, draw = scenes.tests(), np.random.default_rng(2)
    known, held = tests[: 4 * scenes.TESTS], tests[4 * scenes.TESTS :]
    assert len(held) == 2 * scenes.TESTS
    for objects in [test.objects for test in known] + [scenes.lesson(draw, 16).objects for _ in range(300)]:
        assert all(color != shape for color, shape, _, _ in objects)
    for one, other in zip(known, held):
        assert (one.kind, one.asked, one.objects[1:]) == (other.kind, other.asked, other.objects[1:])
        color, shape, x, y = other.objects[0]
        changed = 0 if one.kind == "color" else 1
        assert color == shape == one.objects[0][1 - changed] and (x, y) == one.objects[0][2:]
        assert other.answer == scenes.ANSWERS[one.kind][color] != one.answer


def test_no_picture_of_a_test_is_a_lesson(monkeypatch):
    for size in (16, 24):
        assert scenes.paint(scenes.tests()[7].objects, size).tobytes() in scenes.taken(size)
    first, second = (scenes.lesson(draw, 16) for draw in [np.random.default_rng(3)] * 2)
    monkeypatch.setattr(scenes, "taken", lambda size: {first.picture.tobytes()})
    assert scenes.lesson(np.random.default_rng(3), 16).objects == second.objects != first.objects


# ---- models ----


def test_a_picture_is_cut_into_patches_row_by_row():
    picture = np.arange(8 * 12 * 3, dtype=np.float32).reshape(8, 12, 3)
    (patches,) = scenes.patches_of([picture])
    assert patches.shape == (6, 48)
    for number, (top, left) in enumerate([(0, 0), (0, 4), (0, 8), (4, 0), (4, 4), (4, 8)]):
        assert np.array_equal(patches[number], picture[top : top + 4, left : left + 4].ravel())


@torch.no_grad()
def test_what_is_seen_stands_in_place_of_embeddings_and_without_a_picture_nothing_changes(seeing_model):
    language, ids = seeing_model.language, torch.randint(3, 512, (2, 24))
    plain = random_model(SHAPE)(ids)
    assert torch.equal(language(ids), plain)
    seeing_model.seen = language.embedding(ids[:, 1:17])
    hidden = ids.clone()
    hidden[:, 1:17] = 0
    assert torch.equal(language(hidden), plain)
    seeing_model.look(torch.rand(2, 16, 48))
    assert not torch.allclose(language(hidden), plain)
    seeing_model.look(None)
    assert torch.equal(language(ids), plain)


@torch.no_grad()
def test_the_blind_see_the_same_whatever_there_is(seeing_model):
    ids = torch.randint(3, 512, (2, 20))
    for blind in (False, True):
        seeing_model.blind, found = blind, []
        for _ in range(2):
            seeing_model.look(torch.rand(2, 16, 48))
            found.append(seeing_model.language(ids))
        assert torch.equal(*found) == blind


@torch.no_grad()
def test_features_are_those_of_the_last_layer_but_one_and_begin_as_wide_as_embeddings(seeing_model):
    tower, patches = seeing_model.tower, torch.rand(8, 16, 48)
    x = tower.patch(patches) + tower.place
    for layer in tower.layers[:2]:
        x = layer(x)
    assert len(tower.layers) == 3 and torch.equal(tower.features(patches), x)
    seeing_model.look(patches)
    assert 0.7 < seeing_model.seen.square().mean().sqrt() / seeing_model.language.embedding.weight.std() < 1.3


def test_targets_are_answers_alone(tokenizer):
    bytes_only = Tokenizer("bytes")
    tokens, targets, last = seeing.rows_of(bytes_only, [("A?", "no"), ("Up?", "yes")], 4)
    assert tokens.shape == targets.shape == (2, 1 + 4 + len("Up? Answer: yes"))
    for row, (before, answer) in enumerate([("A? Answer:", " no"), ("Up? Answer:", " yes")]):
        before, answer = bytes_only.encode(before), bytes_only.encode(answer)
        whole = [bytes_only.bos_id, 0, 0, 0, 0, *before, *answer]
        assert tokens[row].tolist() == whole + [0] * (tokens.size(1) - len(whole))
        assert last[row] == 4 + len(before) and tokens[row, last[row]] == before[-1]
        wanted = [IGNORE] * (4 + len(before)) + answer + [bytes_only.eos_id]
        assert targets[row].tolist() == wanted + [IGNORE] * (tokens.size(1) - len(wanted))
    tokens, targets, last = seeing.rows_of(tokenizer, [("Which shape is red?", "ring")], 4)
    kept = targets[0][targets[0] != IGNORE].tolist()
    assert kept[-1] == tokenizer.eos_id and tokenizer.decode(tokens[0, 5:].tolist()).endswith("Answer: ring")


@pytest.mark.parametrize("ahead, share", [(1, 1.0), (0, 0.0)])
def test_who_knows_the_next_token_is_right_and_who_does_not_is_not(ahead, share, tokenizer):
    """Each place's logits are for the token that many places later: the next one there is the answer's first."""

    def hidden(tokens):
        return torch.nn.functional.one_hot(tokens.roll(-ahead, 1), 512).float() * (1 if ahead else -1)

    language = SimpleNamespace(hidden=hidden, unembedding=lambda x: x)
    model = SimpleNamespace(look=lambda patches: None, language=language)
    tests = [test for test in scenes.tests()[::40] if ahead or test.answer != scenes.ANSWERS[test.kind][0]]
    assert np.mean(seeing.right(model, tokenizer, 16, tests)) == share


def test_answers_that_begin_alike_are_an_error():
    with pytest.raises(BadInput, match="begin with the same token"):
        seeing.right(None, Tokenizer("bytes"), 16, [])


# ---- training and the report ----


@pytest.fixture
def small_run(tmp_path, monkeypatch, shared):
    """The recipe with tiny models on a tiny dataset, and few tests."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"The dog ran {n}. " * 40}) + "\n"
                                                 for n in range(20)))  # fmt: skip
    data = tmp_path / "data"
    prepare((str(tmp_path / "text.jsonl"),), data, str(shared("stories260K/tok512.rebuilt.model")), 0.2)
    for name, shape in (("base", SHAPE), ("small", replace(SHAPE, num_layers=1))):
        save(random_model(shape), tmp_path / name, Tokenizer(data))
        monkeypatch.setattr(llava, name, lambda seed, name=name: tmp_path / name)
    few = scenes.tests()[::100]
    monkeypatch.setattr(llava, "text", lambda: data)
    monkeypatch.setattr(llava, "tests", lambda: few)
    monkeypatch.setattr(llava, "HERE", tmp_path)
    return llava.Config(seeds=1, steps=2, batch=4)


def test_each_stage_trains_what_it_should(small_run, tmp_path, monkeypatch):
    trained, fit = {}, llava.fit

    def watched(model, config, losses):
        before = {name: p.clone() for name, p in model.named_parameters()}
        fit(model, config, losses)
        trained.setdefault(arm, []).append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})

    monkeypatch.setattr(llava, "fit", watched)
    for arm in llava.ARMS:
        found = llava.measure(small_run, 0, arm)
        assert len(found["right"]) == len(llava.tests()) and found["bits"]
        assert llava.measure(small_run, 0, arm) == found
    projection = {"project.weight", "project.bias"}
    assert [len(sets) for sets in trained.values()] == [2, 1, 1, 1, 1, 2, 3, 2]
    blind, (stage1,), (full,), (lora,) = (trained[arm] for arm in list(llava.ARMS)[:4])
    assert all(name.startswith(("patch", "place", "layers", "out")) for name in blind[0])
    assert stage1 == projection < full
    assert all(name in projection or name.startswith("language.") for name in full | blind[1])
    assert "language.blocks.1.feed_forward.down.weight" in full and not projection & blind[1]
    assert lora - projection and all("lora_" in name for name in lora - projection)


@pytest.mark.parametrize("good", [True, False])
def test_predictions_are_judged_by_their_sides(good, tmp_path, monkeypatch):
    """Where every prediction is true, and where each is false; on each kind of question so many are right."""
    rates = {"blind": 0.3, "stage 1 alone": 0.5, llava.FULL: 0.7, "LoRA": 0.75, "text mixed in": 0.75,
             "smaller model": 0.6, "finer pictures": 0.9, "random tower": 0.4}  # fmt: skip
    if not good:
        rates = {"blind": 0.8, "stage 1 alone": 0.6, llava.FULL: 0.4, "LoRA": 0.3, "text mixed in": 0.3,
                 "smaller model": 0.6, "finer pictures": 0.05, "random tower": 0.6}  # fmt: skip
    assert rates.keys() == llava.ARMS.keys()
    draws = np.random.default_rng(0).random(scenes.TESTS)
    for name, rate in rates.items():
        by_kind = [rate] * 4 + [0.5] * 2 if good or name != llava.FULL else [0.1, 0.1, 0.7, 0.7, 0.15, 0.15]
        bits = 1.5 if (name == "text mixed in") == good else 2.0
        found = {"right": [bool(x) for share in by_kind for x in draws < share], "bits": [bits, bits + 0.1, bits]}
        for seed in range(2):
            (tmp_path / f"{name.replace(' ', '_')}_{seed}.json").write_text(json.dumps(found))
    monkeypatch.setattr(llava, "HERE", tmp_path)
    monkeypatch.setattr(llava, "text", lambda: "bytes")
    report = study.Report("x", "X")
    llava.results(report, llava.Config(seeds=2))
    page = "\n".join(report.parts)
    assert page.count("**confirmed in direction**" if good else "**refuted in direction**") == 11, page
