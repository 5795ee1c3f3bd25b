"""The recipes of papers: their methods on numbers worked by hand, and controls that must come out as they do here."""

import copy
import doctest
import json
import math
import shutil
import struct
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

from conftest import ROOT, command, flags, prepare, prepare_chats, random_model
from data import Tokenizer
from lib.sampling import Sampling
from lib.speculative import Speculation
from model import ModelConfig, load, save
from sample import Decoder, generate

sys.path.insert(0, str(ROOT / "recipes"))
import cloze
import compeft
import contrast
import contrast_writing
import guesses
import rejection
import scoring
import study
import tax
import ternary
import weights
import writing

TINY = ModelConfig(16, 4, 2, 2, 24, vocab_size=258, max_seq_len=256, tie_embeddings=True)
DOCUMENTS = [
    "One day a cat went to the big park and saw a small dog there. They ran and ran until it was late.",
    "Tom had a red ball that he liked so much. He gave it to his friend, and his friend was very happy.",
    "The sun was warm over the little house near the river where an old man lived with his three birds.",
]


@pytest.fixture(scope="module")
def tokenizer(shared) -> Tokenizer:
    return Tokenizer(shared("stories260K/tok512.rebuilt.model"))


@pytest.fixture(scope="module")
def documents(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of bytes, chats about nothing, and questions."""
    where = tmp_path_factory.mktemp("papers")
    for seed, name in enumerate(("first", "second")):
        save(random_model(TINY, 2 * seed), where / name, Tokenizer("bytes"), "llama2-chat")
    rows = [{"context": f"Say {n}?", "choices": ["cat", "one", "dog", "sun"], "answer": n % 4} for n in range(40)]
    (where / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "text.jsonl").write_text("".join(json.dumps({"text": f"{text} {n}" * 4}) + "\n" for n in range(20)
                                              for text in DOCUMENTS))  # fmt: skip
    prepare((str(where / "text.jsonl"),), where / "data", "bytes", 0.2)
    return where


@pytest.mark.parametrize("module", [contrast, guesses, rejection, study, ternary, weights, writing])
def test_the_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


# ---- differences and verdicts ----


def test_a_difference_is_of_questions_whose_values_are_averaged_over_seeds():
    first, second = [[0, 0, 1, 0], [0, 1, 1, 0]], [[1, 0, 1, 1], [1, 1, 1, 1]]
    found = study.difference(first, second)
    values = np.array([1.0, 0.0, 0.0, 1.0])  # of the questions
    half = 1.96 * values.std(ddof=1) / 2
    assert found.mean == 0.5 and found.seeds == (0.5, 0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert study.difference(second, first).mean == -0.5
    assert found.times(100).high == pytest.approx(100 * found.high)


@pytest.mark.parametrize(
    "low, high, seeds, says",
    [
        (0.1, 0.5, (0.2, 0.4), "confirmed in direction"),
        (-0.5, -0.1, (-0.2, -0.4), "refuted in direction"),
        (-0.1, 0.5, (0.2, 0.4), "not decided at this size"),
        (0.1, 0.5, (0.8, -0.1), "not decided at this size"),  # one seed says otherwise
    ],
)
def test_a_verdict_needs_the_interval_and_every_seed(low, high, seeds, says):
    found = study.Difference((low + high) / 2, low, high, seeds)
    assert study.verdict(found, 1) == says
    turned = {"confirmed in direction": "refuted in direction", "refuted in direction": "confirmed in direction"}
    assert study.verdict(found, -1) == turned.get(says, says)


def test_by_chance_alone_a_verdict_is_rare():
    """Two arms of coins: of 200 comparisons with two seeds at most a few seem real."""
    draw = np.random.default_rng(0)
    says = [study.verdict(study.difference(*draw.integers(2, size=(2, 2, 300))), 1) for _ in range(200)]
    assert 0 < says.count("not decided at this size") and says.count("confirmed in direction") <= 12


def test_a_run_that_is_finished_is_not_made_again(tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(study, "run", lambda *words: calls.append(words))
    for _ in range(2):
        assert study.train(tmp_path / "a", "--steps", 3) == tmp_path / "a"
    assert calls == [("train.py", "--out", tmp_path / "a", "--sample=", "--steps", 3)]
    monkeypatch.setattr(study, "OUT", tmp_path)
    page = study.Report("page", "A title")
    page.table(["a"], [[1 / 3]])
    page.judge("it rises", study.Difference(0.3, 0.1, 0.5, (0.2, 0.4)), 1, "points")
    page.judge("a loss of less than 2", study.Difference(-1.2, -1.9, -0.5, (-1.1, -1.3)), 1, "points", -2)
    page.end()
    text = (tmp_path / "page.md").read_text()
    assert "| 0.3333 |" in text and "+0.3 (+0.1 to +0.5) points; by seed +0.2, +0.4. **confirmed in direction**" in text
    assert "-1.2 (-1.9 to -0.5) points; by seed -1.1, -1.3. **confirmed in direction**" in text


# ---- questions, and writing ----


@pytest.mark.parametrize("kind", ["other", "same", "written"])
def test_questions_have_the_true_continuation_and_three_others_as_long(kind, documents, tokenizer):
    known = [tokenizer.decode(ids) for ids in documents]
    size, asked = 4, []

    def write(contexts, size):
        asked.extend(contexts)
        return [[tokenizer.encode(" wrong")[0]] * size for _ in contexts]

    rows = list(cloze.make_questions(documents, tokenizer, kind, 8, 8, size, write=write))
    assert len(rows) == 8 and len(asked) == (24 if kind == "written" else 0)
    assert [row["answer"] for row in rows] == [0, 1, 2, 3] * 2
    for row in rows:
        right = row["choices"][row["answer"]]
        (text,) = [text for text in known if f"{row['context']} {right}" in text]
        for place, choice in enumerate(row["choices"]):
            if place != row["answer"] and kind != "written":
                elsewhere = [other for other in known if f" {choice}" in other]
                assert (text in elsewhere) == (kind == "same") and choice != right
    other = list(cloze.make_questions(documents, tokenizer, "other", 8, 8, size))
    assert [row["context"] for row in other] == [row["context"] for row in rows]


def test_more_questions_than_places_are_refused(documents, tokenizer):
    with pytest.raises(ValueError, match="--count 9999 is more than the"):
        list(cloze.make_questions(documents, tokenizer, "other", 9999, 8, 4))


def test_the_command_makes_questions_that_eval_takes(folder, tmp_path, shared, tokenizer):
    prepare((str(folder / "text.jsonl"),), tmp_path / "data", str(shared("stories260K/tok512.rebuilt.model")), 0.2)
    assert all(bytes_ not in cloze.read_split(tmp_path / "data")[0] for bytes_ in (tokenizer.bos_id, tokenizer.eos_id))
    stories = tmp_path / "stories"
    save(load(shared("stories260K/stories260K.bin")), stories, tokenizer)
    words = dict(data=tmp_path / "data", count=12, context=10, size=4)
    command("recipes/cloze.py", *flags(words | dict(out=tmp_path / "q.jsonl", kind="written", writer=stories)))
    command("eval.py", *flags(dict(model=stories, task="choices", data=tmp_path / "q.jsonl", limit=4)))
    done = command("recipes/cloze.py", *flags(words | dict(out=tmp_path / "x", kind="written")), check=False)
    assert done.returncode == 2 and "--kind written needs --writer" in done.stderr


def test_what_is_measured_of_a_text():
    bytes_ = Tokenizer("bytes")
    blank = random_model(TINY)
    blank.embedding.weight.data.zero_()  # so that all 258 tokens are equally likely
    assert writing.bits(blank, bytes_, [1, 2], bytes_.encode("abcd")) == pytest.approx(math.log2(258))
    assert writing.copied([1, 2, 3, 4, 5], [9, 2, 3, 4, 5, 2, 3, 4, 5]) == pytest.approx(2 / 6)
    prompts = writing.beginnings([[7, 8, 9]] * 3, bytes_, 5, 3, seed=0)
    assert set(map(tuple, prompts)) == {(bytes_.bos_id, 7, 8), (bytes_.bos_id, 8, 9)}


# ---- weights ----


def test_alpha_1_is_the_tuned_model_and_0_the_first():
    first, second = random_model(TINY), random_model(TINY, 1)
    for alpha, expected in ((1.0, second), (0.0, first)):
        mixed = weights.mix(copy.deepcopy(first), second, (alpha,) * 3)
        assert all(map(torch.equal, mixed.parameters(), expected.parameters()))
        assert mixed.unembedding.weight is mixed.embedding.weight
    half = weights.mix(copy.deepcopy(first), second, (0.25,))
    expected = 0.75 * first.norm.weight + 0.25 * second.norm.weight
    torch.testing.assert_close(half.norm.weight, expected)


def test_each_part_has_its_own_alpha():
    first, second = random_model(TINY), random_model(TINY, 1)
    mixed = dict(weights.mix(copy.deepcopy(first), second, (0.0, 1.0, 0.0)).named_parameters())
    for name, weight in mixed.items():
        source = second if name.startswith("blocks.2.") else first
        assert torch.equal(weight, source.get_parameter(name)), name


def test_a_task_vector_added_to_the_first_model_is_the_second():
    first, second = random_model(TINY), random_model(TINY, 1)
    vector = weights.task_vector(first.parameters(), second.parameters())
    assert len(vector) == sum(p.numel() for p in first.parameters())
    weights.add_vector(first.parameters(), vector)
    for mine, theirs in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(mine, theirs)


def test_the_command_writes_a_model_between_two(folder, tmp_path):
    both = [str(folder / name) for name in ("first", "second")]
    command("recipes/weights.py", "--mix", *both, "--alpha", "0", "0.5", "1", "1", "--out", str(tmp_path / "mixed"))
    expected = weights.mix(load(both[0]), load(both[1]), (0.0, 0.5, 1.0, 1.0))
    assert all(map(torch.equal, load(tmp_path / "mixed").parameters(), expected.parameters()))
    for alphas, sentence in ((["2"], "must be numbers from 0 to 1"), (["1"] * 5, "5 parts are more than the 4 layers")):
        words = ("--mix", *both, "--alpha", *alphas, "--out", str(tmp_path / "x"))
        done = command("recipes/weights.py", *words, check=False)
        assert done.returncode == 2 and sentence in done.stderr


# ---- ComPEFT ----


def test_compression_on_numbers_worked_by_hand():
    """The standard deviation of (3, -1, 0, 1, -3) is sqrt(5); the two of largest magnitude stay."""
    tau = torch.tensor([3.0, -1.0, 0.0, 1.0, -3.0])
    found = ternary.compress(tau, 0.4, alpha=2.0)
    assert found.tolist() == pytest.approx([2 * 5**0.5, 0, 0, 0, -2 * 5**0.5])
    ties = ternary.compress(torch.ones(10) + 1e-3 * torch.eye(10)[0], 0.3, 1.0)
    assert (ties != 0).sum() == 3


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_a_file_holds_the_vector_and_is_as_long_as_the_formula_says(share):
    draw = np.random.default_rng(0)
    signs = draw.choice([-1, 0, 1], 100_000, p=[share / 2, 1 - share, share / 2])
    vector = torch.tensor(0.125 * signs, dtype=torch.float32)
    data = ternary.write_bits(vector)
    assert torch.equal(ternary.read_bits(data), vector)
    bits = 8 * (len(data) - struct.calcsize(ternary.HEADER)) + 16
    assert bits == pytest.approx(ternary.expected_bits(100_000, share), rel=0.01)
    entropy = -(share * math.log2(share / 2) + (1 - share) * math.log2(1 - share))
    assert bits > 100_000 * entropy * 0.99  # no code is shorter


def test_what_compeft_is_compared_with():
    tau = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = ternary.others(tau, 0.2, seed=0)
    kept = ternary.compress(tau, 0.2, 1.0) != 0
    assert torch.equal(found["pruned"], tau * kept)
    assert found["mean magnitude"][kept].abs().unique().item() == pytest.approx(float(tau[kept].abs().mean()))
    assert (found["random places"] != 0).sum() == 200


def test_a_fine_tuned_model_comes_back_from_its_task_vector(folder, monkeypatch):
    """All of it kept gives its answers, nothing kept those of the first."""
    questions = scoring.Questions(folder / "first", folder / "q.jsonl")
    first, second = load(folder / "first"), load(folder / "second")

    def before_and_after(kind, seed):
        model = copy.deepcopy(first)
        return model, list(model.parameters()), list(second.parameters())

    monkeypatch.setattr(compeft, "before_and_after", before_and_after)
    each = compeft.Tuned("all weights", 0)
    assert (each.right(questions, 0 * each.tau) == questions.right(first)).all()
    assert (each.right(questions, each.tau) == questions.right(second)).all()
    assert (questions.right(first) != questions.right(second)).any()
    found, rows = defaultdict(list), []
    monkeypatch.setattr(compeft, "ALPHAS", (1, 2))
    compeft.measure("k", 0, questions, questions, found, rows)
    assert len(rows) == 5 and all(row[4] == pytest.approx(row[5], rel=0.02) for row in rows)


def test_an_adapters_task_vector_begins_where_training_did(folder, tmp_path, monkeypatch):
    """A run of no learning at all changes nothing: A less its first values, and B, are 0."""
    said = (("user", "q"), ("assistant", "a"))
    rows = [{"messages": [{"role": role, "content": f"{text}{n}"} for role, text in said]} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_chats((str(tmp_path / "chats.jsonl"),), tmp_path / "data", "bytes", "llama2-chat")
    words = dict(data=tmp_path / "data", init_from=folder / "first", out=tmp_path / "run", lora_rank=compeft.RANK)
    words |= dict(steps=1, learning_rate=1e-12, seed=3, seq_len=64, eval_tokens=64, compile="off", sample="")
    command("train.py", *flags(words))
    monkeypatch.setattr(compeft, "base", lambda seed: folder / "first")
    monkeypatch.setattr(compeft, "tuned", lambda kind, seed: tmp_path / "run")
    _, parameters, after = compeft.before_and_after("LoRA", 3)
    assert len(parameters) == 2 * 7 * 4
    assert weights.task_vector(parameters, after).abs().max() < 1e-6
    _, parameters, after = compeft.before_and_after("LoRA", 4)
    assert weights.task_vector(parameters, after).abs().max() > 0.1


def test_questions_in_the_process_are_answered_as_by_eval(folder, tmp_path):
    out = tmp_path / "r.json"
    words = dict(model=folder / "first", task="choices", data=folder / "q.jsonl", out=out)
    command("eval.py", *flags(words), "--chat")
    expected = [json.loads(line)["scores"]["acc"] == 1 for line in out.with_suffix(".jsonl").read_text().splitlines()]
    found = scoring.Questions(folder / "first", folder / "q.jsonl").right(load(folder / "first"))
    assert found.tolist() == expected and 0 < found.sum() < 40


# ---- the alignment tax ----


def test_the_best_of_several_answers_is_kept(monkeypatch):
    bytes_ = Tokenizer("bytes")
    answers = [bytes_.encode(text) for text in ("x\n# y", "# a\n# b", "# c\n# d", "z")]
    monkeypatch.setattr(rejection, "write", lambda model, tokenizer, rows, seed: answers[: len(rows)])
    kept = rejection.best_answers(None, bytes_, [bytes_.encode("p:")], 4, 0)
    assert kept == ["p:# a\n# b"]  # the first of equals


def test_gain_over_the_path_at_the_same_tax():
    """Half way between taxes 0 and 2 the path has rewards (2, 5); what lies on it gains nothing."""
    points = [(0.0, np.array([0.0, 4.0])), (2.0, np.array([4.0, 6.0])), (3.0, np.array([6.0, 6.0]))]
    assert tax.gain(points, 1.0, np.array([3.0, 5.0])).tolist() == [1.0, 0.0]
    for tax_, rewards in points:
        assert tax.gain(points, tax_, rewards).tolist() == [0.0, 0.0]
    assert tax.gain(points, 9.0, np.array([6.0, 7.0])).tolist() == [0.0, 1.0]


def test_ratios_by_part_find_the_part_that_makes_the_answers_likely():
    first, second = random_model(TINY), random_model(TINY, 1)
    for name, weight in second.named_parameters():  # they differ in the last part alone
        if weights.part_of(name, 4, 3) < 2:
            weight.data.copy_(first.get_parameter(name))
    prompts = [[n] * 64 for n in range(3)]
    texts = [prompt + ids for prompt, ids in zip(prompts, generate(second, prompts, 64))]
    assert tax.best_ratios(first, second, 1 / 3 * 0.75, texts)[2] == 0.75


def test_a_model_that_is_not_changed_pays_no_tax(folder, monkeypatch):
    """Every average of a model with itself is on the path, whatever the alphas."""
    monkeypatch.setattr(tax, "align", lambda *_: [folder / "first", folder / "first"])
    monkeypatch.setattr(tax, "text", lambda: folder / "data")
    rows = []
    found = tax.measure(0, tax.Config(prompts=2, tests=3), rows)
    assert len(found) == 9 and all((gain == 0).all() for gain in found.values())
    assert len(rows) == 11 and all(row[2] == pytest.approx(0, abs=1e-6) for row in rows)


# ---- decoding ----


def test_acceptance_is_the_overlap_of_two_distributions():
    model, other = random_model(TINY), random_model(TINY, 1)
    texts = [list(range(80))]
    assert guesses.acceptance(model, model, texts, Sampling(1.0)) == pytest.approx(1.0, abs=1e-5)
    p, q = (each(torch.tensor(texts))[0, 63:].softmax(-1) for each in (model, other))
    expected = 1 - (p - q).abs().sum(-1).mean() / 2  # half the L1 distance
    found = guesses.acceptance(model, other, texts, Sampling(1.0))
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)


@torch.no_grad()
def test_tokens_a_round_follow_the_formula_where_guesses_are_accepted_independently():
    """A draft with a flat distribution over as many tokens as the model: each is accepted with chance 1."""
    assert guesses.expected_tokens(1.0, 4) == 5
    model = random_model(TINY)
    made = Speculation(Decoder, model, 4, Sampling(1.0))
    fast, texts = guesses.speed(model, [[1, 2, 3]], 25, Sampling(1.0), made)
    assert fast > 0 and len(texts[0]) == 25 and guesses.tokens_a_round(made) == 5
    assert all(time > 0 for time in guesses.times_of(made, model, [1] * 64))


def records(rights, kind="other") -> list[dict]:
    """Of questions whose first choice is right: log-probabilities that make it win or lose."""
    return [{"subject": kind, "gold": 0, "logprobs": [-1.0, -2.0 if right else -0.5]} for right in rights]


def test_contrast_asks_every_kind_and_amateur(monkeypatch, tmp_path, capsys):
    """An amateur that is the expert changes nothing; one that likes the wrong choice more helps."""
    kinds = [records([1, 0, 1, 0], kind) for kind in contrast.KINDS]
    expert = sum(kinds, [])
    wrong = [row | {"logprobs": [-9.0, -1.0]} for row in expert]
    monkeypatch.setattr(contrast, "models_of", lambda seed: dict.fromkeys(("expert", "step 150", "step 450")))
    monkeypatch.setattr(contrast, "questions_of", lambda seed, config: None)
    monkeypatch.setattr(contrast, "scores_of", lambda seed, name, *_: wrong if name == "step 150" else expert)
    contrast.choose(study.Report("contrast", "Contrast"), contrast.Config(seeds=2, questions=4))
    said = capsys.readouterr().out
    assert "| other | step 150 | 0 | 50 | 100 | 100 | 100 | +50" in said
    assert "| other | step 450 | 50 | 50 | 50 | 50 | 50 | +0 (+0 to +0) |" in said


def test_contrast_writes_three_ways(folder, monkeypatch, capsys):
    where = folder / "run"
    if not where.exists():
        shutil.copytree(folder / "first", where)
        shutil.copytree(folder / "second", where / "step_00000150")
    monkeypatch.setattr(contrast_writing, "base", lambda seed: where)
    monkeypatch.setattr(contrast_writing, "text", lambda: folder / "data")
    contrast_writing.write(study.Report("contrast", "Contrast"), contrast_writing.Config(seeds=2, prompts=3))
    said = capsys.readouterr().out
    assert all(f"| {way} |" in said for way in ("greedy", "contrast", "nucleus 0.95"))
