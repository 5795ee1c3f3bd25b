"""Choosing few examples: maximum entropy on numbers worked by hand, LIMA's rules, where records come from."""

import doctest
import itertools
import json
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest

from conftest import ROOT, prepare, random_model
from data import Tokenizer
from model import ModelConfig, save

sys.path.insert(0, str(ROOT / "recipes"))
import answering
import choosing
import curating
import entropy
from curating import Record
from entropy import Category, gme

# ---- greedy maximum entropy ----


@pytest.mark.parametrize("module", [curating, entropy])
def test_the_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def test_entropies_with_an_item_more_are_those_of_the_authors_tests():
    """Counts 1, 2 of the entities 2, 3; then 1, 2, 3, 4 or 1, 2 are added: shares 1, 2, 3, 1 of 7, and 1, 2, 2 of 5."""
    category = Category([[2, 3, 3], [1, 2, 3, 4], [1, 2]])
    category.add(0)
    assert category.entropies()[1:].tolist() == [1.27703, 1.05492]
    for shares, expected in (((1, 2, 3, 1), 1.27703), ((1, 2, 2), 1.05492)):
        assert -sum(n / sum(shares) * math.log(n / sum(shares)) for n in shares) == pytest.approx(expected, abs=5e-6)
    assert category.highest == math.log(4)


def written_out(columns: list[list[list[str]]]) -> list[int]:
    """The order, from the definition: entropies of whole sets, and the nearest to the highest of all."""
    left, chosen = list(range(len(columns[0]))), []
    while left:
        far = []
        for item in left:
            heights = []
            for column in columns:
                counts = Counter(entity for place in (*chosen, item) for entity in column[place])
                shares = [n / counts.total() for n in counts.values()]
                most = math.log(len(set(itertools.chain(*column))))
                heights.append(round(-sum(p * math.log(p) for p in shares), 5) - most)
            far.append(math.hypot(*heights))
        chosen.append(left.pop(far.index(min(far))))
    return chosen


def test_the_order_is_that_of_the_definition_written_out():
    draw = random.Random(0)
    for _ in range(5):
        letters = [draw.choices("abcdefgh", k=draw.randint(1, 5)) for _ in range(25)]
        digits = [draw.choices("0123", k=draw.randint(1, 3)) for _ in range(25)]
        found = list(gme(Category(letters), Category(digits)))
        assert [item for item, _ in found] == written_out([letters, digits])
        assert sorted(item for item, _ in found) == list(range(25))
        for count in (1, 7, 25):  # the entropies beside an item are those of the set up to it
            some = [item for item, _ in found[:count]]
            here = Category(letters).entropy_of(some), Category(digits).entropy_of(some)
            assert found[count - 1][1] == pytest.approx(here, abs=6e-6)


def test_of_equals_the_first_is_chosen_and_repetition_comes_last():
    """Six different letters, then copies: ln 6 is reached with six items and never exceeded."""
    items = ["a", "a", "b", "c", "c", "d", "e", "f", "f"]
    found = list(gme(Category(items)))
    assert [item for item, _ in found[:6]] == [0, 2, 3, 5, 6, 7]
    assert found[5][1] == (round(math.log(6), 5),)
    assert max(height for _, (height,) in found) == found[5][1][0]


def test_items_without_an_entity_change_nothing():
    category = Category([[], ["a", "b"], []])
    assert category.entropies().tolist() == [0, 0.69315, 0]
    category.add(1)
    assert category.entropies().tolist()[0] == 0.69315 and category.entropy_of([0, 2]) == 0


# ---- LIMA's rules and draws ----


def test_an_answer_is_judged_as_lima_did():
    text = "Sort the list first. " * 60
    assert curating.good(text) and not curating.good(text[:1199]) and not curating.good(text * 4)
    for wrong in ("I ", "My list. ", "on my list ", "As mentioned above, ", "see Stack Exchange. "):
        assert not curating.good(wrong + text), wrong
    assert curating.good("Imagine an IO myth. " + text)


def test_the_temperature_makes_small_groups_likelier():
    """Groups of 64 and 8 are first with 4 to 2 at temperature 3, with 8 to 1 at temperature 1."""
    groups = ["large"] * 64 + ["small"] * 8
    for temperature, expected in ((3, 2 / 6), (1, 1 / 9)):
        firsts = [next(curating.by_temperature(groups, random.Random(seed), temperature)) for seed in range(2000)]
        share = sum(groups[place] == "small" for place in firsts) / 2000
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))
    assert sorted(curating.by_temperature(groups, random.Random(0))) == list(range(72))


def test_groups_stay_together_where_few_sources_are_wanted():
    groups = list("abcabcabca")
    for seed in range(5):
        order = [groups[place] for place in curating.whole_groups(groups, random.Random(seed))]
        assert len(list(itertools.groupby(order))) == 3 and Counter(order) == Counter(groups)


# ---- records, and the arms ----


@pytest.fixture(scope="module")
def pool() -> list[Record]:
    """Answers of every length, a quarter of them in the first person, of many small groups and one large."""
    draw, found = random.Random(0), []
    for number in range(400):
        words = draw.choices(["sort", "list", "file", "line", "name", "path", "text", "byte"], k=draw.randint(2, 120))
        answer = ("I " if number % 4 == 0 else "") + " ".join(words)
        found.append(Record(f"What of {words[0]}?", answer, "large" if number % 2 else f"small {number % 40}"))
    return found


@pytest.mark.parametrize("arm", choosing.ARMS)
def test_an_arm_chooses_different_places_up_to_its_bytes(arm, pool):
    size = 4000 * (4 if "4 times" in arm else 1)
    chosen = choosing.choose(arm, pool, 1, 4000)
    lengths = [len(pool[place].answer) for place in chosen]
    assert len(set(chosen)) == len(chosen) and sum(lengths) >= size > sum(lengths[:-1])
    if "rules" in arm or "sources" in arm:
        assert all(curating.good(pool[place].answer, *choosing.LENGTHS) for place in chosen)
    again = choosing.choose(arm, pool, 2, 4000)
    assert (again == chosen) == ("GME" in arm)


def test_more_bytes_than_there_are_is_said(pool):
    with pytest.raises(ValueError, match="--size 90,000 is more than the answers that can be chosen have .few sources"):
        choosing.choose("few sources", pool, 0, 90_000)


def test_greatest_entropy_is_above_every_random_draw_and_few_sources_are_few(pool):
    kinds = curating.categories(pool)
    best = choosing.choose("GME", pool, 0, 4000)
    draws = [choosing.choose("random", pool, seed, 4000) for seed in range(20)]
    assert all(kinds[0].entropy_of(best) > kinds[0].entropy_of(draw) for draw in draws)
    sources = {arm: {pool[place].group for place in choosing.choose(arm, pool, 0, 4000)} for arm in choosing.ARMS}
    assert len(sources["few sources"]) < len(sources["rules"]) <= len(sources["many sources"])


def test_docstrings_are_answers_of_the_documents_that_have_them(tmp_path):
    code = 'def f{0}(a, *, b={0}):\n    """Add {0}."""\n\n\nclass C{0}:\n    """Two\n    lines."""\n'
    lines = "".join(json.dumps({"text": code.format(n)}) + "\n" for n in range(9))
    (tmp_path / "code.jsonl").write_text(lines)
    prepare((str(tmp_path / "code.jsonl"),), tmp_path / "data", "bytes", 0.3)
    parts = [curating.library(tmp_path / "data", split, Tokenizer("bytes")) for split in ("train", "val")]
    assert len(parts[0]) + len(parts[1]) == 18 and not set(parts[0]) & set(parts[1])
    question = "Write the docstring of this function.\nf3(a, *, b=3)"
    assert (question, "Add 3.") in [record[:2] for part in parts for record in part]
    assert {record.answer for record in parts[0] if " class." in record.question} == {"Two\nlines."}


def test_records_are_read_from_files_of_conversations(tmp_path, shared):
    rows = [{"instruction": "Name a colour.", "input": "of a leaf", "output": "Green"}] * 2
    rows.append({"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]})
    (tmp_path / "a.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    first, second = curating.read(str(tmp_path / "a.jsonl"), tmp_path)
    assert first == ("Name a colour.\n\n### Input:\nof a leaf", "Green", "Name")
    assert second == ("Hello?", "Yes.", "Hello?")
    with pytest.raises(ValueError, match="holds no questions with answers"):
        (tmp_path / "b.jsonl").write_text("{}\n")
        curating.read(str(tmp_path / "b.jsonl"), tmp_path)


def test_alpacas_records_are_all_read(tmp_path, shared):
    path = shared("alpaca/alpaca_helpfulness_t45.json")
    kept = [row for row in json.loads(path.read_text()) if row["output"].strip()]
    found = curating.read(str(path), tmp_path)
    assert len(found) == len(kept) > 2000 and all(record.group for record in found)


def test_what_is_measured_of_answers(tmp_path, monkeypatch):
    """With all tokens equally likely, an answer takes log2 of the vocabulary a token, its end too."""
    monkeypatch.setattr(answering, "ROOM", 4)
    blank = random_model(ModelConfig(16, 2, 2, 2, 24, vocab_size=258, max_seq_len=256, tie_embeddings=True))
    blank.embedding.weight.data.zero_()
    save(blank, tmp_path / "blank", Tokenizer("bytes"), "plain")
    tests = [Record("Which?", "abc", ""), Record("And this?", "a" * 20, "")]
    found = answering.measure(tmp_path / "blank", tests, 2, (1, 500), 0)
    ends = sum(answering.rendered(tests[0], Tokenizer("bytes"))[1]) - 3
    assert found["bits"] == pytest.approx(np.array([3 + ends, 20 + ends]) * math.log2(258), rel=1e-5) and ends >= 1
    assert set(found["good"].tolist()) <= {0.0, 1.0} and len(found["good"]) == 2
    assert answering.fitting([tests[0], Record("Long", "a" * 300, "")], Tokenizer("bytes")) == [tests[0]]
