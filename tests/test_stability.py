"""recipes/stability.py and what it measures with: n-grams, subsets, dips, skills at checkpoints."""

import doctest
import json
import math
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, prepare, random_model
from data import Tokenizer
from model import ModelConfig, load, save

sys.path.insert(0, str(ROOT / "recipes"))
import ngrams
import skills
import stability
import study
import subsets

TINY = ModelConfig(16, 4, 2, 2, 24, vocab_size=258, max_seq_len=64, tie_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset of bytes."""
    where = tmp_path_factory.mktemp("stability")
    text = "A small text of a few common words, said again and again with the number {} in its middle, and so on. "
    rows = [json.dumps({"text": text.format(n) * 3}) + "\n" for n in range(40)]
    (where / "text.jsonl").write_text("".join(rows))
    prepare((str(where / "text.jsonl"),), where / "data", "bytes", 0.2)
    return where / "data"


def test_examples_in_docstrings():
    assert doctest.testmod(subsets) == (0, doctest.testmod(subsets).attempted)


# ---- n-grams ----


def test_chances_on_numbers_worked_by_hand():
    """Text (0, 1, 0), two tokens: the bigrams are (start, 0), (0, 1), (1, 0); 0 follows two tokens, 1 one."""
    judge = ngrams.Ngrams([[0, 1, 0]], 2, order=2, discount=0.75)
    zero = ((2 - 0.75) + 0.75 * 2 * 0.5) / 3
    assert judge.chance((9,), 0) == pytest.approx(zero)  # an unknown context leaves the shorter one
    assert judge.chance((0,), 1) == pytest.approx(0.25 + 0.75 * (1 - zero))
    assert judge.chance((1,), 0) == pytest.approx(0.25 + 0.75 * zero)
    logs = [math.log(0.25 + 0.75 * each) for each in (zero, 1 - zero, zero)]
    assert judge.perplexity([0, 1, 0]) == pytest.approx(math.exp(-sum(logs) / 3))


def test_chances_are_a_distribution_after_every_context():
    draw = np.random.default_rng(0)
    texts = draw.integers(0, 6, (5, 40)).tolist()
    judge = ngrams.Ngrams(texts, 7, order=4)
    for context in [(-1, -1, -1), (0, 1, 2), (6, 6, 6), *(tuple(texts[0][n : n + 3]) for n in range(10))]:
        assert sum(judge.chance(context, word) for word in range(7)) == pytest.approx(1)
    assert all(judge.chance((0, 1, 2), word) > 0 for word in range(7))  # 6 was never seen


# ---- subsets ----


def test_the_best_part_is_what_is_most_like_the_reference():
    """Texts of two kinds, of which the reference has one only."""
    draw = np.random.default_rng(0)
    texts = [(draw.integers(0, 4, 20) + 4 * (number % 10 % 2)).tolist() for number in range(100)]
    best = subsets.select("best", texts, 200, 8)
    assert len(best) == 10 and all(max(text) < 4 for text in best)
    random = subsets.select("random", texts, 200, 8)
    assert len(random) == 10 and any(max(text) >= 4 for text in random)
    new = subsets.select("new", texts, 200, 8)
    assert len(new) == 90 and all(text in new for text in best + random)
    assert not any(text in new for text in texts[::10])


def test_a_subset_becomes_a_dataset_of_its_own_texts(data, tmp_path, monkeypatch):
    monkeypatch.setattr(subsets, "text", lambda: data)
    monkeypatch.setattr(subsets, "domain", lambda where: data)
    monkeypatch.setattr(subsets, "PASSAGE", 50)
    monkeypatch.chdir(ROOT)
    made = subsets.subset("random", tmp_path, 3000)
    whole = "".join(Tokenizer(data).decode(ids) for ids in subsets.read_split(data, "train"))
    lines = [json.loads(line)["text"] for line in (tmp_path / "random.jsonl").read_text().splitlines()]
    assert 3000 <= sum(map(len, lines)) < 3050 and all(line in whole for line in lines)
    assert subsets.subset("random", tmp_path, 1) == made  # not made again
    assert subsets.subset("stdlib", tmp_path, 1) == data


# ---- dips ----


def test_a_dip_is_start_less_the_lowest_step():
    right = np.array([[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    assert stability.dip(right).tolist() == [1, 1, 0, 0]
    assert stability.dip(right[[0, 2]]).tolist() == [0, 0, 0, 0]  # what only rises has none


def test_answers_at_random_have_no_dip():
    """The control: without the two halves, the least of eight steps is far below the start."""
    draw = np.random.default_rng(0)
    found, naive = [], []
    for _ in range(200):
        right = draw.random((8, 100)) < 0.5
        found.append(stability.dip(right.astype(float)).mean())
        naive.append(right[0].mean() - right.mean(1).min())
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5
    assert np.mean(naive) > 10 * np.std(naive) / 200**0.5


def test_weights_that_move_are_seen_in_their_half():
    first, model = random_model(TINY), random_model(TINY)
    for name, weight in model.named_parameters():
        if name.startswith(("blocks.0.", "blocks.1.")) and weight.dim() == 2:
            weight.data.mul_(1.5)
    assert stability.moved(first, model) == pytest.approx([0.5, 0.0])


# ---- skills ----


def test_skills_are_those_of_full_passes(data, tmp_path):
    """Choices by the log-probabilities of their bytes behind a blank; bits of all windows as of the training's loss."""
    run = tmp_path / "model"
    save(random_model(TINY), run, Tokenizer("bytes"))
    rows = [{"context": f"Say {n}?", "choices": ["cat", "one", "dog", "sun"], "answer": n % 4} for n in range(20)]
    (tmp_path / "text_20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = skills.Skills(run, {"text": data}, tmp_path, 20)
    model, encode = load(run), Tokenizer("bytes").encode
    found = made.of(model, windows=10**6)
    for row, right in zip(rows, found["text right"]):
        texts = torch.tensor([encode(f"{row['context']} {choice}", bos=True) for choice in row["choices"]])
        likeliest = model.log_probs(texts[:, :-1], texts[:, 1:])[:, -4:].sum(1).argmax()
        assert right == (likeliest == row["answer"])
    assert 0 < sum(found["text right"]) < 20
    windows = made.windows["text"]
    batch = windows.batch(range(len(windows))).to(torch.device("cpu"))
    nats = float(model.loss(batch.tokens, batch.targets).detach()) / batch.targets.numel()
    assert np.mean(found["text bits"]) == pytest.approx(nats / math.log(2) / windows.bytes_per_target, rel=1e-4)
    likeliest = model(batch.tokens).argmax(-1) == batch.targets
    assert np.mean(found["text guessed"]) == pytest.approx(float(likeliest.float().mean()))


def test_a_curve_is_measured_once_and_its_checkpoints_go(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "curve.json"
    for step in (0, 10, 20):
        save(random_model(TINY, step), run / f"step_{step:08d}", Tokenizer("bytes"))
    found = skills.curve(kept, run, (0, 20), lambda model: {"first": model.norm.weight[:2].tolist()})
    assert list(found) == [0, 20] and found[20]["first"].shape == (2,)
    assert [path.name for path in run.iterdir()] == ["step_00000020"]
    again = skills.curve(kept, run, (0, 20), None)
    assert again[20]["first"].tolist() == found[20]["first"].tolist()


def test_a_report_finds_the_dip_that_was_planted(capsys):
    """Arm A loses every fifth answer at step 10 and has it back at the end; the control loses nothing."""

    def arm(name: str) -> dict[int, dict[str, np.ndarray]]:
        found = {}
        for step in stability.STEPS:
            right = np.ones(100)
            right[:20] = name[0] != "A" or step != 10
            bits = np.full(8, 2.0 - 0.01 * step) + 0.01 * np.arange(8)
            found[step] = {f"{kind} right": right[np.arange(100) * 7 % 100] for kind in ("torch", "stdlib")}
            found[step] |= {"torch bits": bits, "stdlib bits": bits, "moved": np.array([0.2, 0.1])}
        return found

    curves = {name: [arm(name)] * 2 for name in stability.ARMS}
    report = study.Report("stability", "Stability")
    stability.tabled(report, curves)
    stability.judged(report, curves)
    said = capsys.readouterr().out
    assert "A dips in torch. Found: +20 " in said and "A dips more than Z in torch. Found: +20 " in said
    assert "is negative (torch). Found: -20 " in said and "upper: A 2.00, " in said
    assert "bits of stdlib under Z rise in the first 10 steps. Found: -0.1 " in said and "**refuted" in said
