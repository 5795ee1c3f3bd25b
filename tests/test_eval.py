"""Evaluation: MMLU's prompts, scores that depend neither on the batch nor on the processes, results and comparisons."""

import csv
import dataclasses
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

import eval
from conftest import (
    ROOT,
    additions,
    assert_same_but_for_rounding,
    command,
    flags,
    random_model,
    run_ranks,
)
from data import Tokenizer
from eval import CATEGORIES, PROTOCOLS, Config, Question, Reader, compare, read_mmlu, settled
from lib.batches import make_batches, rows_to_read
from lib.cli import run_command
from lib.prompts import Prompts, pair
from lib.statistics import estimate
from model import SIZES, ModelConfig, Transformer, load, save

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=2048)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def llama(shared) -> Tokenizer:
    return Tokenizer(shared("llama2_tokenizer/tokenizer.model"))


def questions_of(tokenizer, folder, window=4096, **options) -> list[Question]:
    config = settled(Config(model=("m",), task="mmlu", data=str(folder), **options), PROTOCOLS)
    return list(eval.mmlu(config, tokenizer, min(window, config.max_prompt or window)))


def score(model, questions, batch_tokens) -> list[list[float]]:
    """All log-probabilities, by question."""
    reader, found = Reader(model), [{} for _ in questions]
    for batch in make_batches(questions, list(rows_to_read(questions)), batch_tokens):
        for number, choice, logprob in reader.score(batch):
            found[number][choice] = logprob
    return [[choices[i] for i in range(len(choices))] for choices in found]


def apart(questions: list[Question]) -> list[Question]:
    """The same questions, each in a subject of its own, so that none shares a prefix."""
    return [dataclasses.replace(question, subject=str(i)) for i, question in enumerate(questions)]


# ---- MMLU's prompts ----


def test_the_categories_are_those_of_the_reference(shared):
    with open(shared("mmlu/subjects.tsv")) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    expected = {row["subject"]: row["category"].split(" (")[0] for row in rows}
    assert {subject: category for category, members in CATEGORIES.items() for subject in members} == expected


PROMPT = (
    "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
    "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
    "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
    "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
)


def test_the_prompt_is_that_of_the_reference(shared, llama):
    options = {"subjects": "abstract_algebra", "shots": 1, "limit": 1}
    question = questions_of(llama, shared("mmlu/data"), **options)[0]
    assert llama.decode(question.context) == PROMPT
    assert question.context[0] == 1 and question.context[-1] == 29901
    assert [choice for _, choice in question.choices] == [[319], [350], [315], [360]] and question.gold == [1]
    assert questions_of(llama, shared("mmlu/data"), bos=False, **options)[0].context == question.context[1:]


def test_the_other_protocols_differ_where_their_references_do(shared, llama):
    options = {"subjects": "abstract_algebra", "shots": 1, "limit": 1}
    harness = questions_of(llama, shared("mmlu/data"), protocol="harness", **options)[0]
    assert llama.decode(harness.context) == PROMPT.replace("about  ", "about ")
    written = questions_of(llama, shared("mmlu/data"), protocol="instructeval", **options)[0]
    assert llama.decode(written.context) == PROMPT and not written.choices and written.target == "B"
    chat = questions_of(llama, shared("mmlu/data"), chat=True, template="llama2-chat", **options)[0]
    assert llama.decode(chat.context) == f"[INST] {PROMPT} [/INST]" and chat.choices[0][1] == [319]


@pytest.mark.slow
def test_all_prompts_of_mmlu_have_their_known_lengths(shared, llama):
    questions = questions_of(llama, shared("mmlu/data"))
    assert len(questions) == 14_042
    kept = [sum(q.shots == shots for q in questions) for shots in (5, 4, 3, 2)]
    assert kept == [13_518, 196, 261, 67] and not any(q.cut for q in questions)
    golds = [sum(q.gold == [i] for q in questions) / 14_042 for i in range(4)]
    assert golds == pytest.approx([0.2295, 0.2465, 0.2551, 0.2689], abs=5e-5)
    sizes = [sum(q.subject in members for q in questions) for members in CATEGORIES.values()]
    assert sizes == [3018, 4705, 3077, 3242]
    long = {q.subject for q in questions if q.shots < 5}
    whole = [len(q.context) for q in questions if q.shots == 5]
    uncut = questions_of(llama, shared("mmlu/data"), max_prompt=4096, subjects=",".join(long))
    lengths = whole + [len(q.context) for q in uncut if len(q.context) > 2048]
    assert len(lengths) == 14_042 and sum(n > 2048 for n in lengths) == 524
    assert max(lengths) == 3480 and round(statistics.mean(lengths)) == 805


def test_as_many_examples_stay_as_fit_and_then_the_left_is_cut(shared, llama):
    options = {"subjects": "professional_law", "limit": 100}
    questions = questions_of(llama, shared("mmlu/data"), window=560, **options)
    assert {q.shots for q in questions} >= {0, 1} and any(q.cut for q in questions)
    by_shots = [questions_of(llama, shared("mmlu/data"), window=4096, shots=n, **options) for n in range(6)]
    for question, *versions in zip(questions, *by_shots):
        most = max([n for n in range(6) if len(versions[n].context) <= 560], default=0)
        assert question.shots == most and question.context == versions[most].context[-560:]
        assert question.cut == max(0, len(versions[most].context) - 560)
    harness = questions_of(llama, shared("mmlu/data"), window=560, protocol="harness", **options)
    assert all(q.shots == 5 and len(q.context) == 560 and q.cut for q in harness)


def test_an_example_that_just_fits_stays(llama):
    """Also where the parts, each of which sentencepiece begins with a blank, add up to more."""
    examples = [f"{i}. Is it so?\nYes.\n\n" for i in range(5)]
    for tokenizer in (llama, Tokenizer("bytes")):
        texts = ["Ask.\n\n" + "".join(examples[:n]) + "And now?" for n in range(6)]
        sizes = [len(tokenizer.encode(text, bos=True)) for text in texts]
        for room in range(sizes[0], sizes[5] + 2):
            fitted = Prompts(Config(), tokenizer, "Ask.\n\n", examples, room).ask("And now?")
            most = max(n for n in range(6) if sizes[n] <= room)
            assert (fitted["shots"], fitted["cut"]) == (most, 0)


def test_cells_are_read_as_they_are(shared, tmp_path):
    rows = read_mmlu(shared("mmlu/data/test/college_biology_test.csv"))
    assert all(len(row) == 6 for row in rows)
    (tmp_path / "a.csv").write_text('"a, b\nc ",NA,None, x,,D\n\n')
    assert read_mmlu(tmp_path / "a.csv") == [["a, b\nc ", "NA", "None", " x", "", "D"]]


def test_a_continuation_is_what_it_adds_after_the_context(llama):
    config = Config()
    assert pair(config, llama, "Answer:", " A") == ([1, 673, 29901], [319])
    assert pair(config, llama, "Answer: ", " A")[0] == [1, 673, 29901]  # its blank goes to the continuation
    assert pair(config, Tokenizer("bytes"), "Answer:", " A")[1] == [32, 65]
    assert pair(config, llama, "", "Yes") == pair(Config(bos=False), llama, "", "Yes") == ([1], [3869])


# ---- log-probabilities ----


def plain_logprobs(model: Transformer, pieces: SentencePieceProcessor, prompt: str, choices: list[str]) -> list[float]:
    """Scoring as plainly as can be: LLaMA in a few lines of torch, one choice at a time."""
    shape, weights = model.config, dict(model.named_parameters())
    scores = []
    for choice in choices:
        head, ids = ([1, *pieces.encode(text)] for text in (prompt, prompt + choice))
        x = weights["embedding.weight"][torch.tensor(ids[:-1])]
        count, half = len(x), shape.head_dim // 2
        angles = torch.outer(torch.arange(count), 10_000.0 ** -(torch.arange(half) / half))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turn = lambda t: torch.cat(
            (t[..., :half] * cos - t[..., half:] * sin, t[..., half:] * cos + t[..., :half] * sin), -1
        )
        norm = lambda x, name: x / (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weights[name + ".weight"]
        for i in range(shape.num_layers):
            part = lambda name: weights[f"blocks.{i}.{name}.weight"]
            y = norm(x, f"blocks.{i}.attention_norm")
            q = turn((y @ part("attention.query").T).view(count, shape.num_heads, -1))
            k, v = ((y @ part(f"attention.{n}").T).view(count, shape.num_kv_heads, -1) for n in ("key", "value"))
            k, v = (t.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for t in (turn(k), v))
            attention = torch.einsum("qhd,khd->hqk", q, k) / shape.head_dim**0.5
            attention = attention + torch.full((count, count), -torch.inf).triu(1)
            y = torch.einsum("hqk,khd->qhd", attention.softmax(-1), v).flatten(1)
            x = x + y @ part("attention.out").T
            y = norm(x, f"blocks.{i}.feed_forward_norm")
            gate = y @ part("feed_forward.gate").T
            x = x + (gate * gate.sigmoid() * (y @ part("feed_forward.up").T)) @ part("feed_forward.down").T
        logprobs = (norm(x, "norm") @ weights["embedding.weight"].T).log_softmax(-1)  # the matrices are tied
        scores.append(sum(logprobs[t - 1, ids[t]].item() for t in range(len(head), len(ids))))
    return scores


@pytest.fixture(scope="module")
def hundred(shared):
    """stories260K, 100 questions with one example each, and the plain scorer's answers to them."""
    model = load(shared("stories260K/stories260K.bin")).eval()
    file = shared("stories260K/tok512.rebuilt.model")
    options = {"shots": 1, "limit": 50, "subjects": "management,marketing"}
    questions = questions_of(Tokenizer(file), shared("mmlu/data"), 512, **options)
    pieces = SentencePieceProcessor(model_file=str(file))
    expected = []
    with torch.no_grad():
        for subject in ("management", "marketing"):
            dev, test = (read_mmlu(shared(f"mmlu/data/{s}/{subject}_{s}.csv")) for s in ("dev", "test"))
            for row in test[:50]:
                show = lambda row: f"{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\nAnswer:"
                head = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
                prompt = f"{head}{show(dev[0])} {dev[0][5]}\n\n{show(row)}"
                if len(pieces.encode(prompt)) + 2 > 512:  # " A" has two pieces, of which one is read
                    prompt = head + show(row)
                expected.append(plain_logprobs(model, pieces, prompt, [" A", " B", " C", " D"]))
    return model, questions, expected


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_hundred_questions_score_as_an_independent_scorer_says(rows, hundred, monkeypatch):
    model, questions, expected = hundred
    assert sum(q.shots for q in questions) > 60 and len(questions) == 100 and not any(q.cut for q in questions)
    longest = max(len(q.context) for q in questions)
    for sharing in (True, False):
        if not sharing:
            monkeypatch.setattr("os.path.commonprefix", lambda rows: [])
        batches = make_batches(questions, list(rows_to_read(questions)), rows * longest)
        assert max(len(batch.rows) for batch in batches) >= rows and any(batch.prefix for batch in batches) == sharing
        for found, plain in zip(score(model, questions, rows * longest), expected):
            assert_same_but_for_rounding(found, plain, additions(model.config, 512))


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_choices_of_any_length_score_as_one_by_one(batch_tokens, model):
    generator = torch.Generator().manual_seed(0)
    ids = lambda count: torch.randint(256, (count,), generator=generator).tolist()
    shapes = [(1, (1, 1, 1, 1)), (50, (2, 2, 2)), (7, (1, 4, 2, 3)), (90, (1, 1)), (33, (3, 1, 3))]
    questions = []
    for i, (length, choices) in enumerate(shapes):
        questions.append(Question(f"s{i}", 0, context := ids(length), [(context, ids(n)) for n in choices]))
    start, context = ids(2), ids(20)
    questions.append(Question("s", 0, context, [(context, start + ids(1)) for _ in range(4)]))
    first = ids(80)  # of three questions that share it
    for i in range(3):
        questions.append(Question("t", i, context := first + ids(5 + i), [(context, ids(2)), (context, ids(3))]))
    for found, question in zip(score(model, questions, batch_tokens), questions):
        for logprob, (context, choice) in zip(found, question.choices):
            whole = torch.tensor([context + choice])
            with torch.no_grad():
                steps = model(whole[:, :-1])[0].log_softmax(-1)
            plain = sum(steps[len(context) - 1 + i, token].item() for i, token in enumerate(choice))
            assert logprob == pytest.approx(plain, abs=1e-4, rel=1e-5)


def test_what_questions_begin_with_is_read_once(model):
    first = list(range(100))
    questions = [Question("s", i, context := [*first, i, 7], [(context, [1]), (context, [2])]) for i in range(10)]
    (batch,) = make_batches(questions, list(rows_to_read(questions)), 10_000)
    assert batch.prefix == first and len(batch.rows) == 10  # one row for both choices
    read = []
    reader = Reader(model)
    handle = model.embedding.register_forward_hook(lambda module, tokens, out: read.append(tokens[0].numel()))
    projected = []
    weight = reader.unembedding
    reader.unembedding = type("Seen", (), {"T": property(lambda self: projected.append(1) or weight.T)})()
    reader.score(batch)
    handle.remove()
    assert read == [100, 20] and len(projected) == 1


def test_letters_are_compared_in_fp32(model):
    half = Transformer(dataclasses.replace(TINY)).to(torch.bfloat16)
    half.load_state_dict({name: p.bfloat16() for name, p in model.state_dict().items()})
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(256, (60, 30), generator=generator).tolist()
    questions = [Question("s", i, ids, [(ids, [65 + n]) for n in range(40)]) for i, ids in enumerate(contexts)]
    found = score(half.eval(), questions, 4000)
    assert not any(len(set(logprobs)) < 40 for logprobs in found)


# ---- the command ----


STORIES = additions(SIZES["260K"], 512)  # behind a log-probability of stories260K


def story_flags(shared, **options) -> dict:
    return {"model": str(shared("stories260K/stories260K.bin")), "task": "mmlu", "data": str(shared("mmlu/data")),
            "tokenizer": str(shared("stories260K/tok512.rebuilt.model"))} | options  # fmt: skip


def run(**options) -> dict:
    options["model"] = (options["model"],) if isinstance(options["model"], str) else options["model"]
    eval.main(Config(**options))
    return json.loads(Path(options["out"]).read_text())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def test_the_command_writes_scores_a_line_a_question_and_a_table(shared, tmp_path):
    options = story_flags(shared, subjects="anatomy,virology", limit=6, out=tmp_path / "r" / "a.json")
    done = command("eval.py", *flags(options))
    result, lines = json.loads((tmp_path / "r" / "a.json").read_text()), lines_of(tmp_path / "r" / "a.json")
    assert [(line["subject"], line["index"]) for line in lines] == [
        (s, i) for s in ("anatomy", "virology") for i in range(6)
    ]
    assert lines[0].keys() >= {"task", "subject", "index", "shots", "num_tokens", "logprobs", "pick", "gold"}
    for line in lines:
        assert line["pick"] == line["logprobs"].index(max(line["logprobs"])) and all(p < 0 for p in line["logprobs"])
    micro = result["scores"]["scores"]["acc"]["micro"]
    assert micro[0] == sum(line["pick"] == line["gold"] for line in lines) / 12 and micro[1] < micro[0] < micro[2]
    assert result.keys() >= {
        "protocol", "shots", "bos", "max_prompt", "dtype", "tokenizer_sha256", "prompts_sha256", "git_commit", "time",
        "versions", "seconds", "first_prompt",
    }  # fmt: skip
    table = (tmp_path / "r" / "a.md").read_text()
    assert f"| micro | {micro[0]:.1%} (" in table and table.strip() in done.stdout
    assert "| LLaMA-2 7B / 13B / 70B (paper) | 45.3% / 54.8% / 68.9% |" in table and "raw prompts, BOS on" in table
    again = command("eval.py", *flags(options), check=False)
    assert again.returncode == 2 and "a.json exists; choose another name" in again.stderr


def test_scores_are_equal_for_any_batch_and_any_number_of_processes(shared, tmp_path, one_thread):
    options = story_flags(shared, subjects="anatomy,virology", limit=12)
    first = run(**options, out=str(tmp_path / "a.json"))
    others = [run(**options, out=str(tmp_path / "b.json"), batch_tokens=300)]
    config = Config(**options | {"model": (options["model"],)}, out=str(tmp_path / "c.json"))
    run_ranks(2, eval.main, config)
    others.append(json.loads((tmp_path / "c.json").read_text()))
    for name, other in zip("bc", others):
        assert other["scores"] == first["scores"] and other["prompts_sha256"] == first["prompts_sha256"]
        for a, b in zip(lines_of(tmp_path / "a.json"), lines_of(tmp_path / f"{name}.json"), strict=True):
            assert_same_but_for_rounding(a["logprobs"], b["logprobs"], STORIES)
            assert a["pick"] == b["pick"]
    run_ranks(2, eval.main, dataclasses.replace(config, subjects="anatomy", limit=1, out=str(tmp_path / "d.json")))
    assert lines_of(tmp_path / "d.json")[0]["pick"] == lines_of(tmp_path / "a.json")[0]["pick"]  # one had nothing to do
    a, c = (lines_of(tmp_path / f"{name}.json") for name in "ac")
    assert a == c  # the batches are the same ones, whoever reads them


KILLED = """
import os, signal, eval
from lib.cli import run_command

def share(self, batches, work, all_of_them=eval.World.share):
    for number, results in enumerate(all_of_them(self, batches, work)):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield results

eval.World.share = share
run_command(eval.main, eval.Config)
"""  # after 40 batches


def test_a_killed_evaluation_continues_from_its_lines(shared, tmp_path):
    options = story_flags(shared, subjects="anatomy,virology,marketing", limit=60, batch_tokens=600)
    whole = run(**options, out=str(tmp_path / "whole.json"))
    words, lines = flags(options | {"out": tmp_path / "k.json"}), tmp_path / "k.jsonl"
    words = [sys.executable, "-c", KILLED, *words]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    kept = lines.read_bytes()[: lines.read_bytes().rfind(b"\n") + 1]
    assert 20 <= kept.count(b"\n") < 180 and not (tmp_path / "k.json").exists()
    lines.write_bytes(kept + b'{"task": "mm')  # as a kill in the middle of a line leaves it
    first = json.loads(kept.splitlines()[0])
    first["logprobs"] = [-1.0, -2.0, -3.0, -4.0]  # a mark, by which it is seen that this is not asked again
    lines.write_bytes(json.dumps(first).encode() + b"\n" + kept.split(b"\n", 1)[1])
    resumed = run(**options, out=str(tmp_path / "k.json"))
    for a, b in zip(lines_of(tmp_path / "whole.json"), lines_of(tmp_path / "k.json"), strict=True):
        if (a["subject"], a["index"]) == (first["subject"], first["index"]):
            assert b["logprobs"] == first["logprobs"]
        else:
            assert_same_but_for_rounding(a["logprobs"], b["logprobs"], STORIES)
    assert resumed["scores"]["scores"] == whole["scores"]["scores"]
    (tmp_path / "k.json").unlink()
    with pytest.raises(ValueError, match=r"k.jsonl:1 is of another evaluation; choose another name"):
        run(**options | {"shots": 0}, out=str(tmp_path / "k.json"))


def test_half_a_line_at_the_end_is_no_line(shared, tmp_path):
    options = story_flags(shared, subjects="anatomy", limit=4)
    run(**options, out=str(tmp_path / "a.json"))
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.jsonl").write_bytes(whole[:-20])
    run(**options, out=str(tmp_path / "a.json"))
    assert len(lines_of(tmp_path / "a.json")) == 4


def test_scores_have_both_averages_and_wilsons_intervals():
    record = lambda subject, hit: {"subject": subject, "scores": {"acc": hit}, "shots": 5, "tie": hit > 0, "cut": 0}
    records = [record("anatomy", 1.0), record("virology", 0.0), record("virology", 0.0), record("virology", 1.0)]
    found = eval.summarize(records, "mmlu", CATEGORIES)
    acc = found["scores"]["acc"]
    assert (acc["micro"][0], acc["macro"][0]) == (0.5, pytest.approx(2 / 3)) and found["ties"] == 2
    half = 1.96 * math.sqrt(0 / 1 + (2 / 9) / 3) / 2  # each subject's variance by its questions
    assert acc["macro"][1:] == pytest.approx([2 / 3 - half, 2 / 3 + half])
    assert acc["categories"] == {"other": acc["micro"]}
    assert estimate([1.0] * 8 + [0.0] * 2) == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)  # Wilson 1927
    assert estimate([0.25, 0.75]) == pytest.approx([0.5, 0.5 - 1.96 * 0.25 / 2**0.5, 0.5 + 1.96 * 0.25 / 2**0.5])


def write_result(path: Path, hits: list[float], **changes):
    flags = {"shots": 5, "max_prompt": 2048, "bos": True, "chat": False, "questions": len(hits)}
    path.write_text(json.dumps({"task": "mmlu", "protocol": "hendrycks"} | flags | changes))
    same = {"subject": "s", "shots": 5, "num_tokens": 9, "cut": 0}
    lines = [same | {"index": i, "question_sha256": str(i), "scores": {"acc": hit}} for i, hit in enumerate(hits)]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_comparison_tells_a_difference_from_chance(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_result(a, [1.0] * 40 + [0.0] * 60)
    write_result(b, [1.0] * 39 + [0.0] + [1.0] * 9 + [0.0] * 51)
    eval.main(Config(compare=(str(a), str(b)), out=str(tmp_path / "c.json")))
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["first"], found["second"], found["difference"][0]) == pytest.approx((0.40, 0.48, 0.08))
    assert (found["only_first"], found["only_second"], found["p"]) == (1, 9, pytest.approx(0.021484375))
    spread = 1.96 * math.sqrt(0.10 - 0.08**2) / 10
    assert found["difference"][1:] == pytest.approx([0.08 - spread, 0.08 + spread], abs=0.012)
    assert "McNemar: p = 0.021, more than chance" in capsys.readouterr().out
    write_result(a, [0.5, 0.25] * 50)
    write_result(b, [0.5, 0.25] * 49 + [0.25, 0.5])
    found = compare((str(a), str(b)))
    assert found["test"] == "bootstrap" and found["difference"][0] == pytest.approx(0) and found["p"] > 0.5
    for change, message in (
        ({"protocol": "harness"}, "needs the same questions"),
        ({"task": "bbh"}, "needs the same questions"),
    ):
        write_result(b, [0.0] * 100, **change)
        with pytest.raises(ValueError, match=message):
            compare((str(a), str(b)))
    b.with_suffix(".jsonl").unlink()
    with pytest.raises(ValueError, match="b.jsonl is missing"):
        compare((str(a), str(b)))
    with pytest.raises(ValueError, match="--compare takes two results, not 1"):
        compare((str(a),))


def test_curves_show_every_checkpoint_of_several_runs(tiny_run, tiny_data, tmp_path, capsys):
    runs = [tiny_run(out=f"r{seed}", seed=seed, steps=4, save_every=2, keep=9) for seed in (1, 2)]
    options = {"model": tuple(map(str, runs)), "task": "perplexity", "data": str(tiny_data), "checkpoints": "all"}
    result = run(**options, out=str(tmp_path / "curve.json"))
    assert [(p["run"], p["step"]) for p in result["points"]] == [(r, s) for r in ("r1", "r2") for s in (0, 2, 4)]
    assert [p["tokens"] for p in result["points"]] == [0, 2 * 4 * 32, 4 * 4 * 32] * 2
    logged = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text().splitlines()]
    assert all(p["score"][1] < p["score"][0] < p["score"][2] for p in result["points"]) and logged
    table = (tmp_path / "curve.md").read_text()
    assert table.count("\n") == 8 and "| r2 | 4 | 512 |" in table
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    run(**options, out=str(tmp_path / "curve.json"))  # what is measured is not measured again
    assert "protocol windows" not in capsys.readouterr().out
    for change, message in (
        ({"model": options["model"] * 2}, "--model names two runs called r1"),
        ({"task": "passkey", "data": ""}, "r1_step_00000000.json is of another evaluation; choose another name"),
        ({"checkpoints": "last"}, "--model takes one model, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options | change, out=str(tmp_path / "curve.json"))


# ---- bad input ----


def test_bad_input_is_one_sentence(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(model, tmp_path / "m", Tokenizer("bytes"))
    short = random_model(dataclasses.replace(TINY, max_seq_len=32))
    save(short, tmp_path / "short", Tokenizer("bytes"))
    for split, rows in (("dev", "q,1,2,3,4,A\n"), ("test", "q,1,2,3,4,A\nq,1,2,3,A\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text(rows)
    for subject, rows in (("virology", b"q,1,2,3,4,AB\n"), ("marketing", b""), ("sociology", b"q\xff,1,2,3,4,A\n")):
        (tmp_path / "dev" / f"{subject}_dev.csv").write_text("q,1,2,3,4,A\n")
        (tmp_path / "test" / f"{subject}_test.csv").write_bytes(rows)
    good = {"model": "m", "task": "mmlu", "data": ".", "subjects": "anatomy"}
    for change, message in (
        ({"data": "nowhere"}, "anatomy_dev.csv is missing; --data must hold dev/ and test/"),
        ({"shots": 0}, "anatomy_test.csv: row 2 must be a question, four choices and A, B, C or D, and has 5 columns"),
        ({"subjects": "alchemy"}, "--subjects alchemy is not one of mmlu's 57"),
        ({"shots": 7}, "anatomy_test.csv: row 2"),
        ({"shots": -2}, "--shots -2 must be at least -1"),
        ({"subjects": "virology", "shots": 0}, "virology_test.csv: row 1 must be"),
        ({"subjects": " marketing", "shots": 0}, "marketing_test.csv is empty"),
        ({"subjects": "sociology", "shots": 0}, "sociology_test.csv: not UTF-8 at byte 1"),
        ({"protocol": "cot"}, "--protocol cot is not one of mmlu's: hendrycks, instructeval, harness"),
        ({"task": "gsm8k"}, "--subjects is for mmlu and bbh, not for gsm8k"),
        ({"task": "gsm8k", "subjects": "", "data": ""}, "--data is needed for gsm8k"),
        ({"task": "gsm8k", "subjects": "", "model": "short"}, "answers of 256 tokens leave no room in a window of 32"),
        ({"lengths": "9"}, "--lengths is for passkey, not for mmlu"),
        ({"out": "r.jsonl"}, "--out r.jsonl must end in .json"),
        ({"out": "m/config.json/r.json"}, "m/config.json"),
        ({"model": "nowhere"}, "nowhere: no such file or folder"),
        ({"task": ""}, "--model and --task are needed, or --compare with two results"),
        ({"checkpoints": "all"}, "--checkpoints all needs --out X.json"),
        ({"checkpoints": "all", "out": "c.json"}, "m/run.json is missing"),
        ({"compare": "m"}, "--compare takes two results, not 1"),
    ):
        monkeypatch.setattr("sys.argv", ["eval.py", *flags(good | change)])
        with pytest.raises(SystemExit) as stopped:
            run_command(eval.main, eval.Config)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and message in error, error


# ---- speed ----


@pytest.mark.slow
def test_the_shared_prefix_makes_it_three_times_and_all_of_it_faster_than_transformers(shared, llama, tmp_path):
    """Prints the medians of three rounds over every twelfth subject; pytest --slow -s -k shared_prefix."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SIZES["15M"], max_seq_len=2048))
    model.init_weights(0)
    model.eval()
    save(model, tmp_path / "m")
    peer = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    subjects = ",".join(sorted(sum(CATEGORIES.values(), []))[::12])
    questions = questions_of(llama, shared("mmlu/data"), 2048, subjects=subjects, limit=60)
    tokens = sum(len(q.context) for q in questions)

    @torch.no_grad()
    def transformers() -> list[list[float]]:
        """Left padded, so that its logits_to_keep can leave out all positions but the last."""
        found = [[] for _ in questions]
        for batch in make_batches(apart(questions), list(rows_to_read(apart(questions))), 2048):
            rows, longest = batch.rows, len(batch.rows[0].ids)
            ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in rows])
            mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows])
            logits = peer(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            for row, line in zip(rows, logits):
                found[row.question] = line[list(row.last.values())].tolist()
        return found

    ways = {
        "shared": lambda: score(model, questions, 2048),
        "apart": lambda: score(model, apart(questions), 2048),
        "transformers": transformers,
    }
    seconds, answers = {name: [] for name in ways}, {}
    for _ in range(3):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - started)
    for name in ("apart", "transformers"):
        for mine, theirs in zip(answers["shared"], answers[name]):
            assert_same_but_for_rounding(mine, theirs, additions(model.config, 2048))
    ratio = {n: statistics.median(b / a for a, b in zip(seconds["shared"], seconds[n])) for n in seconds}
    for name, values in seconds.items():
        print(f"{name}: {tokens / statistics.median(values):,.0f} tokens/s, {ratio[name]:.2f} times as long as shared")
    assert ratio["apart"] >= 3 and ratio["transformers"] >= 1.5
