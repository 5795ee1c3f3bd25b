"""Evaluation: the protocol's prompts, scores that do not depend on the batch, perplexity."""

import csv
import json
import math

import pytest
import torch

from conftest import command, flags, random_model
from data import Tokenizer
from eval import CATEGORIES, Config, Question, continuation, mmlu, read_mmlu, rolling_windows, score_choices, summarize
from model import ModelConfig, Transformer, save

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=2048)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def llama(shared) -> Tokenizer:
    return Tokenizer(shared("llama2_tokenizer/tokenizer.model"))


def questions_of(tokenizer, folder, window=4096, **options) -> list[Question]:
    return list(mmlu(tokenizer, Config(model="", task="mmlu", data=str(folder), **options), window))


def test_the_categories_are_those_of_the_reference(shared):
    with open(shared("mmlu/subjects.tsv")) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    expected = {row["subject"]: row["category"].split(" (")[0] for row in rows}
    assert {subject: category for category, members in CATEGORIES.items() for subject in members} == expected


def test_the_prompt_is_that_of_the_reference(shared, llama):
    question = questions_of(llama, shared("mmlu/data"), subjects="abstract_algebra", shots=1, limit=1)[0]
    assert llama.decode(question.context) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
        "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert question.context[0] == 1 and question.context[-1] == 29901
    assert question.choices == [[319], [350], [315], [360]] and question.gold == 1
    assert questions_of(llama, shared("mmlu/data"), subjects="abstract_algebra", limit=1, bos=False)[0].context[0] != 1


def test_all_prompts_of_mmlu_have_their_known_lengths(shared, llama):
    questions = questions_of(llama, shared("mmlu/data"))
    assert len(questions) == 14_042
    kept = [sum(q.shots == shots for q in questions) for shots in (5, 4, 3, 2)]
    assert kept == [13_518, 196, 261, 67] and not any(q.cut for q in questions)
    golds = [sum(q.gold == i for q in questions) / 14_042 for i in range(4)]
    assert golds == pytest.approx([0.2295, 0.2465, 0.2551, 0.2689], abs=5e-5)


def test_cells_are_read_as_they_are(shared, tmp_path):
    rows = read_mmlu(shared("mmlu/data/test/college_biology_test.csv"))
    assert all(len(row) == 6 for row in rows)
    (tmp_path / "a.csv").write_text('"a, b\nc ",NA,None, x,,D\n\n')
    assert read_mmlu(tmp_path / "a.csv") == [["a, b\nc ", "NA", "None", " x", "", "D"]]


def test_a_continuation_is_what_it_adds_after_the_context(llama):
    assert continuation(llama, "Answer:", " A") == [319]
    assert continuation(Tokenizer("bytes"), "Answer:", " A") == [32, 65]


def one_by_one(model, question: Question) -> list[float]:
    """Plain scoring: the sum of the log-probabilities of each choice's tokens, one choice at a time."""
    scores = []
    for choice in question.choices:
        ids = question.context + choice
        with torch.no_grad():
            logprobs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        scores.append(sum(logprobs[len(question.context) - 1 + i, token].item() for i, token in enumerate(choice)))
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_are_those_of_plain_scoring_for_any_batch(batch_tokens, model):
    generator = torch.Generator().manual_seed(0)
    ids = lambda count: torch.randint(256, (count,), generator=generator).tolist()
    shapes = [(1, (1, 1, 1, 1)), (50, (2, 2, 2)), (7, (1, 4, 2, 3)), (90, (1, 1)), (33, (3, 1, 3))]
    questions = [
        Question("s", i, ids(length), [ids(n) for n in choices], 0) for i, (length, choices) in enumerate(shapes)
    ]
    shared_start = ids(2)
    questions.append(Question("s", 5, ids(20), [shared_start + ids(1) for _ in range(4)], 0))
    scored = dict(score_choices(model, questions, batch_tokens))
    assert sorted(scored) == list(range(6))
    for number, question in enumerate(questions):
        assert scored[number] == pytest.approx(one_by_one(model, question), abs=1e-4, rel=1e-5)


def test_a_question_too_long_for_the_context_loses_examples_and_then_its_left(shared, llama):
    questions = questions_of(llama, shared("mmlu/data"), window=700, subjects="professional_law", limit=200)
    assert all(len(q.context) <= 700 for q in questions)
    assert {q.shots for q in questions} >= {0, 1} and any(q.cut for q in questions)
    assert all(q.context[-1] == 29901 for q in questions) and not any(q.cut and q.shots for q in questions)


def test_both_averages_are_given():
    records = [{"subject": "anatomy", "pick": 0, "gold": 0, "shots": 5, "tie": False, "cut": 0}]
    records += [
        {"subject": "virology", "pick": 1, "gold": gold, "shots": 4, "tie": True, "cut": 3} for gold in (0, 0, 1)
    ]
    scores = summarize(records)
    assert (scores["micro"], scores["macro"]) == (0.5, pytest.approx(2 / 3))
    assert scores["categories"] == {"other": 0.5} and scores["shots_kept"] == {5: 1, 4: 3}
    assert (scores["ties"], scores["cut_from_the_left"]) == (3, 3)


def test_the_command_writes_scores_and_a_line_a_question(shared, tmp_path):
    options = {"model": shared("stories260K/stories260K.bin"), "tokenizer": shared("stories260K/tok512.rebuilt.model"),
               "task": "mmlu", "data": shared("mmlu/data"), "subjects": "anatomy,virology", "limit": 6}  # fmt: skip
    done = command("eval.py", *flags(options | {"out": tmp_path / "r" / "a.json"}))
    result = json.loads((tmp_path / "r" / "a.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "r" / "a.jsonl").read_text().splitlines()]
    assert [(line["subject"], line["index"]) for line in lines] == [
        (s, i) for s in ("anatomy", "virology") for i in range(6)
    ]
    assert lines[0].keys() >= {"task", "subject", "index", "shots", "num_tokens", "logprobs", "pick", "gold"}
    for line in lines:
        assert line["pick"] == line["logprobs"].index(max(line["logprobs"])) and all(p < 0 for p in line["logprobs"])
    assert result["scores"]["micro"] == sum(line["pick"] == line["gold"] for line in lines) / 12
    assert result.keys() >= {
        "protocol",
        "shots",
        "bos",
        "max_prompt",
        "dtype",
        "tokenizer_sha256",
        "git_commit",
        "versions",
        "seconds",
    }
    assert len(result["scores"]["prompts_sha256"]) == 64
    assert f"micro       {result['scores']['micro']:.1%}".split() == next(
        line.split() for line in done.stdout.splitlines() if line.startswith("micro")
    )
    again = command("eval.py", *flags(options | {"out": tmp_path / "r" / "a.json"}), check=False)
    assert again.returncode == 2 and "a.json exists; choose another name" in again.stderr
    other = command("eval.py", *flags(options | {"out": tmp_path / "b.json", "batch_tokens": 600}))
    assert other.returncode == 0
    for a, b in zip(lines, map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4) and a["pick"] == b["pick"]


# ---- perplexity ----


def test_rolling_windows_predict_every_token_once_with_as_much_context_as_fits():
    for length in range(2, 40):
        ids = list(range(length))
        windows = list(rolling_windows(ids, 7))
        assert sum((predicted for _, predicted in windows), []) == ids[1:]
        for context, predicted in windows:
            assert context == ids[max(0, predicted[-1] - 7) : predicted[-1]] and len(context) >= len(predicted)


def measured(model_path, data, tmp_path, *more) -> dict:
    command(
        "eval.py", *flags({"model": model_path, "task": "perplexity", "data": data, "out": tmp_path / "p.json"}), *more
    )
    result = json.loads((tmp_path / "p.json").read_text())["scores"]
    (tmp_path / "p.json").unlink()
    return result


def test_perplexity_of_text_files_is_that_of_plain_scoring(model, tmp_path):
    save(model, tmp_path / "m", Tokenizer("bytes"))
    (tmp_path / "texts").mkdir()
    for name, text in (("a.md", "Grüße " * 30), ("b.md", "short")):
        (tmp_path / "texts" / name).write_text(text)
    got = measured(tmp_path / "m", tmp_path / "texts", tmp_path, "--batch_tokens", "64")
    nats = 0.0
    for text in ("Grüße " * 30, "short"):
        ids = torch.tensor([Tokenizer("bytes").encode(text, bos=True)])
        with torch.no_grad():
            nats += model(ids[:, :-1], ids[:, 1:], num_targets=1).item()
    count = len(("Grüße " * 30 + "short").encode())
    assert (got["tokens"], got["bytes"], got["documents"]) == (count, count, 2)
    assert got["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert got["word_perplexity"] == pytest.approx(math.exp(nats / 32), rel=1e-4)  # 31 by "Grüße " * 30, and 1


def test_perplexity_of_a_dataset_is_the_validation_loss_of_training(tiny_run, tiny_data, tmp_path):
    run = tiny_run(steps=3, eval_tokens=10**9)
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]
    got = measured(run, tiny_data, tmp_path)
    assert got["nats_per_token"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)


# ---- bad input ----


def test_bad_input_is_one_sentence(model, tmp_path, monkeypatch, capsys, shared, tiny_data):
    import eval
    from data import run_command

    monkeypatch.chdir(tmp_path)
    save(model, tmp_path / "m", Tokenizer("bytes"))
    for split, rows in (("dev", "q,1,2,3,4,A\n"), ("test", "q,1,2,3,4,A\nq,1,2,3,A\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text(rows)
    stories = {
        "model": str(shared("stories260K/stories260K.bin")),
        "tokenizer": str(shared("stories260K/tok512.rebuilt.model")),
    }
    for subject, rows in (("virology", b"q,1,2,3,4,AB\n"), ("marketing", b""), ("sociology", b"q\xff,1,2,3,4,A\n")):
        (tmp_path / "dev" / f"{subject}_dev.csv").write_text("q,1,2,3,4,A\n")
        (tmp_path / "test" / f"{subject}_test.csv").write_bytes(rows)
    good = {"model": "m", "task": "mmlu", "data": ".", "subjects": "anatomy"}
    for change, message in (
        ({"data": "nowhere"}, "anatomy_dev.csv is missing; --data must hold dev/ and test/"),
        ({"shots": 0}, "anatomy_test.csv: row 2 must be a question, four choices and A, B, C or D, and has 5 columns"),
        ({"subjects": "alchemy"}, "--subjects alchemy is not one of MMLU's 57"),
        ({"shots": 7}, "anatomy_test.csv: row 2"),
        ({"shots": -1}, "--shots -1 must be at least 0"),
        ({"subjects": "virology", "shots": 0}, "virology_test.csv: row 1 must be"),
        ({"subjects": " marketing", "shots": 0}, "marketing_test.csv is empty"),
        ({"subjects": "sociology", "shots": 0}, "sociology_test.csv: not UTF-8 at byte 1"),
        ({"out": "r.jsonl"}, "--out r.jsonl must end in .json"),
        ({"out": "m/config.json/r.json"}, "m/config.json"),
        ({"model": "nowhere"}, "nowhere: no such file or folder"),
        ({"task": "perplexity", "data": "nowhere"}, "--data nowhere: no such file or folder"),
        ({"task": "perplexity", "data": "dev"}, "holds no files that end in"),
        ({"task": "perplexity", "data": str(tiny_data)} | stories, "was made with another tokenizer than the model's"),
    ):
        monkeypatch.setattr("sys.argv", ["eval.py", *flags(good | change)])
        with pytest.raises(SystemExit) as stopped:
            run_command(eval.main, eval.Config)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
