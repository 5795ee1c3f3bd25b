"""OpenBezoar's order: the sets and pairs, which stages follow each other, and what is measured of pairs."""

import doctest
import sys

import numpy as np

from conftest import ROOT, random_model
from data import Tokenizer
from model import ModelConfig, save

sys.path.insert(0, str(ROOT / "recipes"))
import bezoar
import study
from mini import Subject

TINY = ModelConfig(16, 2, 2, 2, 24, vocab_size=258, max_seq_len=128, tie_embeddings=True)
SUBJECTS = [
    Subject(f"library.module{n}.function{n}", {"module": f"module{n}", "arguments": f"x and y{n}"}) for n in range(12)
]


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(bezoar)
    assert found.attempted > 0 and found.failed == 0


def test_a_pair_is_a_right_answer_and_one_that_is_right_for_another():
    rows = bezoar.pairs(SUBJECTS, 2)
    assert len(rows) == 2 * 2 * len(SUBJECTS) and len({row["prompt"] for row in rows}) == len(rows)
    rights = {subject.facts[kind] for subject in SUBJECTS for kind in subject.facts}
    for row in rows:
        n = row["prompt"].partition("function")[2].partition("?")[0].partition(" ")[0]
        assert row["chosen"] in (f"module{n}", f"x and y{n}") and row["rejected"] in rights - {row["chosen"]}
        assert row["rejected"].startswith(row["chosen"][:3])  # of the same kind


def test_a_set_is_about_one_kind_and_what_is_tested_is_in_none(tmp_path, monkeypatch):
    texts = [row["instruction"] + row["output"] for row in bezoar.chats(SUBJECTS, "module")]
    assert len(texts) == 2 * len(SUBJECTS) and all("module" in text for text in texts)
    assert not bezoar.chats(SUBJECTS, "purpose")
    made = {}
    monkeypatch.setattr(bezoar, "HERE", tmp_path)
    monkeypatch.setattr(bezoar, "base", lambda seed: tmp_path)
    monkeypatch.setattr(bezoar, "subjects_of", lambda count: SUBJECTS[:count])
    monkeypatch.setattr(bezoar, "once", lambda folder, *words: folder)
    monkeypatch.setattr(bezoar, "write_lines", lambda path, rows: made.update({path.stem: list(rows)}))
    bezoar.prepare(bezoar.Config(functions=8))
    asked = {row["context"] for row in made["test"]}
    trained = {row.get("prompt", row.get("instruction")) for name in made if name != "test" for row in made[name]}
    assert len(asked) == 16 and not asked & trained
    assert [row["output"] for row in made["chosen"]] == [row["chosen"] for row in made["pairs"]]
    about = {subject.name for subject in SUBJECTS[:8]}
    assert all(not any(f"{name}?" in row["instruction"] or f"{name} " in row["instruction"] for name in about)
               for kind in bezoar.SETS for row in made[kind])  # fmt: skip


def test_stages_follow_each_other_and_are_made_once(tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(bezoar, "HERE", tmp_path)
    monkeypatch.setattr(bezoar, "train", lambda out, *words: calls.setdefault(out, words) and out)
    data = {name: tmp_path / name for name in (*bezoar.SETS, "chosen", "pairs")}
    runs = {name: bezoar.tuned(1, tmp_path / "base", names, data) for name, names in bezoar.ORDERS.items()}
    assert runs["base"] == tmp_path / "base" and len(calls) == 7  # 3 sets, chosen, and DPO thrice

    def before(run):
        words = calls[run]
        return words[words.index("--init_from") + 1]

    assert before(runs["sets, chosen, DPO"]) == runs["sets, chosen"]
    assert before(runs["sets, chosen"]) == before(runs["sets, DPO"]) == runs["sets"]
    assert before(runs["DPO alone"]) == tmp_path / "base"
    assert all((words[words.index("--epochs") + 1] == 1) == (data["pairs"] in words) for words in calls.values())


def test_models_that_are_one_differ_in_nothing(tmp_path, monkeypatch, capsys):
    """A control: six times the same model, so every difference is 0 and nothing is decided."""
    save(random_model(TINY), tmp_path / "run", Tokenizer("bytes"), "plain")
    rows = [{"subject": "x", "context": f"Say {n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(20)]
    bezoar.write_lines(tmp_path / "test.jsonl", rows)
    monkeypatch.setattr(bezoar, "base", lambda seed: tmp_path / "run")
    monkeypatch.setattr(bezoar, "tuned", lambda *_: tmp_path / "run")
    monkeypatch.setattr(bezoar, "prepare", lambda config: {"test": tmp_path / "test.jsonl"})
    monkeypatch.setattr(study, "OUT", tmp_path)
    bezoar.main(bezoar.Config(seeds=2))
    said = capsys.readouterr().out
    assert said.count("Found: +0 (+0 to +0)") == 4 and said.count("**not decided at this size**") == 4
    assert said.count("| 0 |\n") == 3  # correct, after each DPO
    nats, margin = bezoar.orders_of(np.log([[0.1, 0.4], [0.2, 0.3]]), np.array([1, 0]))
    np.testing.assert_allclose(np.exp(nats), [0.4, 0.2])
    np.testing.assert_allclose(np.exp(margin), [4, 2 / 3])
