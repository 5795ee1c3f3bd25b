"""Results of evaluations: nothing is written over or taken for something else, nothing dead scores."""

import json
import math
import os
import resource
import shutil
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import bench
import eval
from conftest import flags, random_model
from data import Dataset, Tokenizer
from eval import PROTOCOLS, Config, World, compare, settled
from lib.cli import run_command
from lib.results import read_result, write_all
from model import ModelConfig, save
from sample import Chat, Sampling, generate

TINY = ModelConfig(
    dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=512
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "m"
    save(random_model(TINY), folder, Tokenizer("bytes"))
    return str(folder)


@pytest.fixture
def ask(saved, tmp_path, monkeypatch):
    """A function that evaluates in this process, in an empty folder that holds the questions ours.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_lines("ours.jsonl", questions(8))

    def run(out: str = "", **options):
        options = {"model": saved, "task": "choices", "data": "ours.jsonl", "out": out} | options
        options["model"] = (
            (options["model"],) if isinstance(options["model"], str) else options["model"]
        )
        eval.main(Config(**options))
        return read(out) if out else None

    return run


def questions(count: int, name: str = "Is it", answer: int = 0) -> list[dict]:
    return [
        {"context": f"{name} {i}?", "choices": ["yes", "no", "it may be"], "answer": answer}
        for i in range(count)
    ]


def write_lines(path: str | Path, rows: list, end: str = "\n"):
    Path(path).write_text("\n".join(map(json.dumps, rows)) + end)


def read(path: str | Path):
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def read_lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def said(monkeypatch, capsys, script, **options) -> str:
    """The one sentence of a command that was refused."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *flags(options)])
    with pytest.raises(SystemExit) as stopped:
        run_command(script.main, script.Config)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- what is there stays ----


@pytest.mark.parametrize("options, files", [
    ({"task": "perplexity", "data": "book.md", "out": "book.json"}, {"book.md": "# A book\n" * 9}),
    ({"out": "README.json"}, {"README.md": "# Mine\n"}),
    ({"data": "mine.jsonl", "out": "mine.json"}, {"mine.jsonl": json.dumps(questions(1)[0])}),
    ({"out": "x.json"}, {"x.jsonl": "\x00\x7fno line of text"}),
    ({"out": "x.json"}, {"x.jsonl": '{"task": "choi'}),
    ({"out": "x.json"}, {"x.json": "{}"}),
    ({"out": "x.json"}, {"x.jsonl": '{"task": "mmlu", "subject": "anatomy"}\n'}),
    ({"out": "c.json", "checkpoints": "all"}, {"c.json": '{"my": "file"}'}),
    ({"out": "c.json", "checkpoints": "all"}, {"c.json": '{"points": [], "task": "mmlu", "protocol": "harness"}'}),
    ({"out": "c.json", "checkpoints": "all"}, {"c.json": '{"task": "choices", "protocol": "harness"}'}),
    ({"out": "c.json", "checkpoints": "all"}, {"c.md": "Notes"}),
    ({"out": "c.json", "checkpoints": "all"}, {"c.png": "a picture"}),
])  # fmt: skip
def test_no_result_is_written_over_a_file_of_something_else(
    options, files, ask, tmp_path, monkeypatch
):
    for name, text in files.items():
        Path(name).write_text(text)
    before = contents(tmp_path)
    monkeypatch.setattr(eval, "load_model", None)  # it is refused before any work
    with pytest.raises(ValueError, match=next(iter(files))):
        ask(**options)
    assert contents(tmp_path) == before


def test_a_link_to_nowhere_is_no_free_name(ask, saved):
    for name in ("x.json", "y.md"):
        os.symlink("nowhere", name)
        with pytest.raises(ValueError, match=name):
            ask(out=name[0] + ".json")
        assert os.readlink(name) == "nowhere"


def test_an_evaluation_leaves_files_of_like_names_alone(ask):
    for name in ("x.json.tmp", "x.txt", "x.png"):
        Path(name).write_text("mine")
    ask(out="x.json")
    assert [Path(name).read_text() for name in ("x.json.tmp", "x.txt", "x.png")] == ["mine"] * 3


def test_a_comparison_is_written_to_a_new_file_alone(ask):
    for name in ("a", "b"):
        ask(out=f"{name}.json")
    Path("thesis.tex").write_text("mine")
    before = contents(Path())
    for out, sentence in (
        ("a.json", "a.json exists"),
        ("./b.json", "b.json exists"),
        ("thesis.tex", "must end in"),
    ):
        with pytest.raises(ValueError, match=sentence):
            eval.main(Config(compare=("a.json", "b.json"), out=out))
    assert contents(Path()) == before
    eval.main(Config(compare=("a.json", "b.json"), out="c.json"))
    assert read("c.json")["difference"] == [0, 0, 0]


@pytest.mark.parametrize("name", ["mine.json", "mine.png"])
def test_a_benchmark_is_written_to_new_files_alone(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(bench, "run", None)  # it is refused before anything is measured
    with pytest.raises(ValueError, match=f"{name} exists; choose another name"):
        bench.main(bench.Config(out=str(tmp_path / "mine.json")))
    assert (tmp_path / name).read_text() == "mine"


def test_half_of_the_first_line_alone_is_continued(ask):
    ask(out="whole.json")
    Path("x.jsonl").write_bytes(Path("whole.jsonl").read_bytes()[:60])
    ask(out="x.json")
    assert read_lines("x.jsonl") == read_lines("whole.jsonl")


def test_a_disk_without_room_is_named_with_the_file_and_nothing_looks_finished(
    ask, saved, monkeypatch, capsys
):
    write_lines("ours.jsonl", questions(60))
    options = {
        "model": saved,
        "task": "choices",
        "data": "ours.jsonl",
        "out": "x.json",
        "batch_tokens": 200,
    }
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, most)
    )  # as a full disk: writing gives an error without a name
    try:
        sentence = said(monkeypatch, capsys, eval, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert sentence == "eval.py: x.jsonl: File too large"
    assert (
        sorted(path.name for path in Path().glob("x.*")) == ["x.jsonl"]
        and Path("x.jsonl").stat().st_size == 5000
    )
    ask(**options)  # with room again it goes on
    assert len(read_lines("x.jsonl")) == 60


def test_of_a_result_that_cannot_be_finished_no_new_file_stays(tmp_path):
    (tmp_path / "a.jsonl").write_text("old")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match="a.json"):
        write_all(
            {tmp_path / "a.jsonl": "new", tmp_path / "a.md": "table", tmp_path / "a.json": "{}"}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl"]


def together(act) -> list[str]:
    """What act(world) raises in each of two processes; here they are threads with a store in common."""
    store, raised = dist.HashStore(), ["", ""]

    def process(rank: int):
        world = object.__new__(World)
        world.store, world.rank, world.size, world.calls = store, rank, 2, 0
        try:
            act(world)
        except ValueError as error:
            raised[rank] = str(error)

    store.set_timeout(timedelta(seconds=60))
    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_what_the_first_process_refuses_ends_all(ask, saved):
    ask(out="a.json")
    os.remove("a.json")
    write_lines("a.jsonl", [record | {"key": "other"} for record in read_lines("a.jsonl")])
    Path("b.md").write_text("mine")
    for out, sentence in (
        ("a.json", "--out: a.jsonl:1 is of another evaluation; choose another name"),
        (
            "b.json",
            "--out: b.md exists and is no unfinished result of this kind; choose another name",
        ),
        ("b.md/x.json", "b.md: File exists"),
    ):
        config = settled(Config(model=(saved,), task="choices", data="ours.jsonl", out=out), PROTOCOLS)
        assert together(lambda world: eval.evaluate(config, saved, world)) == [sentence, sentence]


def test_what_another_process_refuses_ends_the_first():
    def work(batch: int) -> list:
        if batch == 3:
            raise ValueError("question 3 is bad")
        return [batch]

    found = []
    raised = together(lambda world: found.extend(world.share([0, 1, 2, 3, 4], work)))
    assert raised == ["question 3 is bad"] * 2 and found == [[0], [1], [2]]


# ---- what a result is of ----


def test_an_evaluation_is_not_continued_with_other_right_answers(ask):
    problems = [{"question": "1 + 1?", "answer": "#### 2"}] * 3
    for task, rows, right, options in (
        ("choices", questions(8), 2, {}),
        ("gsm8k", problems, "#### 3", {"shots": 0}),
    ):
        options = {"out": f"{task}.json", "task": task, "data": "mine.jsonl"} | options
        write_lines("mine.jsonl", rows)
        ask(**options)
        os.remove(f"{task}.json")
        write_lines("mine.jsonl", [*rows[:-1], rows[-1] | {"answer": right}])
        with pytest.raises(
            ValueError, match=f"{task}.jsonl:{len(rows)} is of another evaluation; choose another"
        ):
            ask(**options)


@pytest.fixture
def curve(tiny_run, tiny_data):
    run = tiny_run(steps=2, save_every=1, keep=9)

    def measure(**options):
        options = {
            "task": "perplexity",
            "data": str(tiny_data),
            "checkpoints": "all",
            "out": "c.json",
        } | options
        eval.main(Config(model=(str(run),), **options))

    return measure


def test_curves_reuse_a_result_of_the_same_evaluation_alone(
    curve, tiny_run, tiny_data, tmp_path, monkeypatch
):
    curve()
    before, score = contents(Path("c")), eval.Reader.score
    monkeypatch.setattr(eval.Reader, "score", None)
    curve()  # nothing is measured again
    Path("other.md").write_text("Another text.\n\n" * 40)
    sentence = "run_step_00000000.json is of another evaluation; choose another name"
    for change, what in (
        (("data", "other.md"), "prompts"),
        (("limit", 2), "limit"),
        (("max_prompt", 16), "max_prompt"),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=f"{sentence} .other .*{what}"),
        ):
            if change[0] != "data":
                patch.setattr(eval, "load_model", None)  # other flags are seen before any work
            curve(**dict([change]))
    shutil.rmtree("run")
    tiny_run(steps=2, save_every=1, keep=9, seed=5)
    with pytest.raises(ValueError, match=f"{sentence} .other weights_sha256"):
        curve()
    assert contents(Path("c")) == before
    monkeypatch.setattr(eval.Reader, "score", score)
    curve(out="d.json")
    assert read("d.json")["points"][-1]["score"] != read("c.json")["points"][-1]["score"]


def test_a_question_has_the_same_hash_for_every_tokenizer_and_prompt(ask, shared):
    words = (Tokenizer("bytes"), Tokenizer(shared("stories260K/tok512.rebuilt.model")))
    Path("a.md").write_text("One text.")
    write_lines("gsm8k.jsonl", [{"question": f"{i}?", "answer": "#### 2"} for i in (1, 2)])
    for task, data, changes in (
        ("choices", "ours.jsonl", {"chat": True, "template": "llama2-chat"}),
        ("gsm8k", "gsm8k.jsonl", {"shots": 1}), ("perplexity", "a.md", {}),
        ("passkey", "", {"lengths": "300"}), ("bbh", shared("bbh"), {"subjects": "snarks", "limit": 3}),
        ("mmlu", shared("mmlu/data"), {"subjects": "virology", "limit": 3}),
    ):  # fmt: skip
        found = []
        for tokenizer, more in ((words[0], {}), (words[1], {}), (words[0], changes)):
            more = more | {
                name: changes[name] for name in ("subjects", "limit", "lengths") if name in changes
            }
            config = settled(Config(model=("m",), task=task, data=str(data), **more), PROTOCOLS)
            made = list(eval.PROTOCOLS[task][config.protocol].questions(config, tokenizer, 2000))
            found.append([question.sha256 for question in made])
        assert (
            found[0] == found[1] == found[2]
            and len(set(found[0])) == len(found[0])
            and all(found[0])
        ), task


# ---- comparisons ----


def test_a_comparison_pairs_questions_by_their_text(ask):
    ask(out="a.json")
    write_lines("others.jsonl", questions(8, "Was it"))
    ask(out="b.json", data="others.jsonl")
    with pytest.raises(
        ValueError, match="the same questions: a.json has 8, b.json has 8, and 0 of them are in"
    ):
        compare(("a.json", "b.json"))
    write_lines("ours.jsonl", questions(8)[::-1])  # in another order they are the same
    ask(out="c.json")
    assert compare(("a.json", "c.json"))["difference"] == [0, 0, 0]


def test_a_comparison_refuses_results_that_were_asked_in_another_way(ask):
    ask(out="a.json")
    for name, change in (
        ("chat", {"chat": True, "template": "llama2-chat"}),
        ("bos", {"bos": False}),
        ("max_prompt", {"max_prompt": 99}),
    ):
        ask(out=f"{name}.json", **change)
        with pytest.raises(
            ValueError, match=f"asked in the same way; of {name}, a.json has .*, {name}.json has "
        ):
            compare(("a.json", f"{name}.json"))


def test_a_comparison_of_perplexity_refuses_a_text_that_has_changed(ask):
    Path("t").mkdir()
    for text in ("A text that was long. " * 9, "A text."):
        Path("t/a.md").write_text(text)
        Path("t/b.md").write_text("Another text.")
        ask(out=f"{len(text)}.json", task="perplexity", data="t")
    with pytest.raises(ValueError, match="198.json has 2, 7.json has 2, and 1 of them are in both"):
        compare(("198.json", "7.json"))


def test_lines_that_a_comparison_cannot_trust_are_refused(ask):
    ask(out="a.json")
    ask(out="b.json")
    rows = read_lines("b.jsonl")
    deep = "[" * 100_000
    for change, sentence in (
        (rows + rows[:1], "b.jsonl:9: choices 0 is there twice"),
        (rows[:-1], "b.jsonl has 7 lines, b.json speaks of 8 questions"),
        ([rows[0] | {"scores": {"acc": math.nan}}, *rows[1:]], "b.jsonl:1: field scores"),
        ([rows[0] | {"scores": {"acc": 7.0}}, *rows[1:]], "b.jsonl:1: field scores"),
        (
            [rows[0] | {"scores": {"f1": 1.0}}, *rows[1:]],
            "choices 0 has other bytes or other scores in b.json",
        ),
        (
            [{k: v for k, v in rows[0].items() if k != "question_sha256"}, *rows[1:]],
            "b.jsonl:1 .*: evaluate again",
        ),
        ([rows[0], 5], "b.jsonl:2: Expected object"),
        ([rows[0], deep], "b.jsonl:2 is not JSON that can be read .nested too deeply"),
        (
            [rows[0], "9" * 5000],
            "b.jsonl:2 is not JSON that can be read .a number has too many digits",
        ),
        ([rows[0], "", rows[1]], "b.jsonl:2 is not JSON"),
    ):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in change)
        Path("b.jsonl").write_text(text + "\n")
        with pytest.raises(ValueError, match=sentence):
            compare(("a.json", "b.json"))


WRONG = [None, True, -1, 1.5, 10**30, "x", "", [], [1], {}, {"a": 1}, math.nan]


def test_every_wrong_field_of_a_result_is_one_sentence(ask):
    """Those that a comparison and a curve do not read may be anything."""
    ask(out="a.json")
    ask(out="b.json")
    result, rows = read("b.json"), read_lines("b.jsonl")
    refusals = 0
    for field in result:
        for value in (*WRONG, "absent"):
            changed = {name: v for name, v in (result | {field: value}).items() if v != "absent"}
            Path("b.json").write_text(json.dumps(changed))
            readers = (
                partial(compare, ("a.json", "b.json"), draws=2),
                partial(read_result, Path("b.json"), result),
            )
            for reader in readers:
                try:
                    reader()
                except ValueError as error:
                    refusals += str(error).startswith(
                        ("b.json", "--compare", "--out: b.json", "b.jsonl")
                    )
    assert refusals > 13 * 10
    Path("b.json").write_text(json.dumps(result))
    for field in ("subject", "index", "question_sha256", "scores", "shots", "cut", "num_tokens"):
        for value in WRONG:
            write_lines("b.jsonl", [rows[0] | {field: value}, *rows[1:]])
            if type(value) is not type(rows[0][field]) or field == "scores":
                with pytest.raises(ValueError, match=r"b.jsonl:1|b.json"):
                    compare(("a.json", "b.json"))


def test_a_comparison_says_what_it_tests(ask, capsys):
    rows = questions(40)
    for name, right in (("a", 10), ("b", 30)):
        write_result(name, [{"scores": {"acc": float(i < right)}} for i in range(len(rows))])
    eval.main(Config(compare=("a.json", "b.json")))
    out = capsys.readouterr().out
    assert (
        "more than chance: they differ on such questions\nThis is about these two models; whether"
        in out
    )
    assert out.endswith("whether their settings differ, only more seeds of each can tell\n")


def write_result(name: str, answers: list[dict], task: str = "choices"):
    """A result as eval.py writes it, with these answers."""
    protocol = next(iter(eval.PROTOCOLS[task]))
    same = {
        "task": task,
        "protocol": protocol,
        "shots": 0,
        "max_prompt": 0,
        "bos": True,
        "chat": False,
    }
    Path(f"{name}.json").write_text(json.dumps(same | {"questions": len(answers)}))
    known = {"subject": "s", "shots": 0, "num_tokens": 9, "cut": 0}
    write_lines(
        f"{name}.jsonl",
        [known | {"index": i, "question_sha256": f"{i}"} | a for i, a in enumerate(answers)],
    )


def test_a_comparison_of_perplexity_draws_documents(ask):
    """Two hundred windows of two documents are two draws, however alike the windows of each are."""
    generator = np.random.default_rng(0)
    for documents, p in ((2, (0.5, 1)), (200, (0, 0.001))):
        noise = generator.normal(0, 0.1, 200)
        for name, gain in (("a", 0.0), ("b", 1.0)):
            each = enumerate(50 - gain + noise)
            answers = [
                {"nats": nats, "bytes": 40, "document": f"{i % documents}"} for i, nats in each
            ]
            write_result(name, answers, "perplexity")
        found = compare(("a.json", "b.json"))
        assert found["documents"] == documents and p[0] <= found["p"] <= p[1]
        assert found["difference"][0] == pytest.approx(-1 / math.log(2) / 40)
    write_result("b", [answer | {"document": "1"} for answer in answers], "perplexity")
    write_result("a", [answer | {"document": "1"} for answer in answers], "perplexity")
    with pytest.raises(ValueError, match="of a single one nothing can be drawn"):
        compare(("a.json", "b.json"))


def test_windows_of_a_dataset_know_the_document_in_which_they_start(tiny_run, tiny_data):
    run = tiny_run(steps=1)
    eval.main(Config(model=(str(run),), task="perplexity", data=str(tiny_data), out="p.json"))
    lines, val = read_lines("p.jsonl"), Dataset(tiny_data, "val", 32)
    expected = [val.document(0, 32 * line["index"]) for line in lines]
    assert [line["document"] for line in lines] == [
        f"file 0 document {number}" for number in expected
    ]
    assert 1 < len(set(expected)) < len(lines)
    eval.main(Config(compare=("p.json", "p.json"), out="c.json"))
    assert read("c.json")["documents"] == len(set(expected))


# ---- a model that is dead, a text without blanks ----


@pytest.mark.parametrize(
    "place, value", [("norm", math.nan), ("norm", math.inf), ("embedding", math.nan)]
)
def test_a_dead_model_gets_no_score_and_no_text(place, value, ask, monkeypatch):
    model = random_model(TINY)
    getattr(model, place).weight.data[-2 if place == "norm" else 256] = value
    monkeypatch.setattr(eval, "load_model", lambda *_: (model, Tokenizer("bytes")))
    Path("a.md").write_text("A text.")
    for options in (
        {},
        {"task": "perplexity", "data": "a.md"},
        {"task": "passkey", "data": "", "limit": 1},
    ):
        with pytest.raises(ValueError, match="not finite"):
            ask(out="x.json", **options)
        assert not Path("x.json").exists() and not Path("x.md").exists()
        os.remove("x.jsonl")
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9)):
        with pytest.raises(ValueError, match="logits are not finite"):
            generate(model, [[256, 65], [256, 66]], 4, sampling)
    chat = Chat(model, Tokenizer("bytes"), "plain")
    for _ in range(2):  # and the question is not taken for asked
        with pytest.raises(ValueError, match="logits are not finite"):
            chat.answer("Hi", 4, Sampling(), print)
        assert not chat.turns


def test_a_text_without_blanks_has_a_perplexity(ask, capsys):
    Path("zh.txt").write_text("文" * 400)
    scores = ask(task="perplexity", data="zh.txt", out="zh.json")["scores"]
    assert (
        scores["word_perplexity"] is None
        and scores["perplexity"] > 1
        and scores["bits_per_byte"][0] > 0
    )
    assert "| word_perplexity | more than a number can hold |" in capsys.readouterr().out


# ---- bad input ----


def test_flags_that_do_nothing_are_refused(ask):
    Path("a.md").write_text("A text.")
    for change, sentence in (
        (
            {"task": "perplexity", "data": "a.md", "bos": False},
            "--no_bos does nothing for perplexity",
        ),
        (
            {"task": "perplexity", "data": "a.md", "chat": True},
            "--chat does nothing for perplexity",
        ),
        ({"task": "passkey"}, "--data ours.jsonl is not read for passkey"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask(out="x.json", **change)


ONE = questions(1)[0]
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
SWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "0"}
TRUE = {
    "question": "q",
    "mc1_targets": {"a": 1, "b": 0},
    "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
}


@pytest.mark.parametrize("task, text, sentence", [
    ("choices", ONE | {"choices": "ab"}, "t.jsonl:1: choices must be a list of texts"),
    ("choices", ONE | {"choices": {"a": 1, "b": 2}}, "t.jsonl:1: choices must be a list of texts"),
    ("choices", ONE | {"choices": ["yes", ""]}, "t.jsonl:1: a choice is empty"),
    ("choices", ONE | {"choices": ["yes", 5]}, "t.jsonl:1: choices must be a list of texts"),
    ("choices", ONE | {"context": None}, "t.jsonl:1: context must be a text and is a NoneType"),
    ("choices", "[" * 100_000, "t.jsonl:1: nested too deeply, or a number of too many digits"),
    ("choices", "9" * 5000, "t.jsonl:1: nested too deeply, or a number of too many digits"),
    ("arc", ARC | {"choices": {"text": "ab", "label": ["A", "B"]}}, "t.jsonl:1: text must be a list of texts"),
    ("arc", ARC | {"choices": {"text": ["a", "b"], "label": "AB"}}, "t.jsonl:1: label must be a list of texts"),
    ("hellaswag", SWAG | {"endings": "de"}, "t.jsonl:1: endings must be a list of texts"),
    ("truthfulqa", TRUE | {"mc2_targets": {"choices": "ab", "labels": [1, 0]}}, "choices must be a list of texts"),
    ("truthfulqa", TRUE | {"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}, "1: choices and labels"),
    ("gsm8k", {"question": None, "answer": "#### 2"}, "t.jsonl:1: question must be a text"),
    ("gsm8k", {"question": "q", "answer": 2}, "t.jsonl:1: answer must be a text and is a int"),
    ("bbh", {"examples": None}, "snarks.json: examples must be a list and is a NoneType"),
    ("bbh", {"examples": {"a": 1}}, "snarks.json: examples must be a list and is a dict"),
    ("bbh", {"examples": [1, 2]}, "snarks.json: example 0 must have the texts input and target"),
    ("bbh", '{"examples": ' + "[" * 100_000, "snarks.json is not JSON that can be read"),
])  # fmt: skip
def test_questions_of_a_wrong_form_are_one_sentence(task, text, sentence, ask, tmp_path):
    Path("bbh").mkdir()
    path = Path("bbh/snarks.json" if task == "bbh" else "t.jsonl")
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    more = {"subjects": "snarks"} if task == "bbh" else {}
    data = "." if task == "bbh" else "t.jsonl"
    config = settled(Config(model=("m",), task=task, data=data, **more), PROTOCOLS)
    with pytest.raises(ValueError, match=sentence):
        list(eval.PROTOCOLS[task][config.protocol].questions(config, Tokenizer("bytes"), 2000))


def test_prompts_that_are_no_utf8_are_one_sentence(ask):
    Path("bbh").mkdir()
    Path("cot-prompts").mkdir()
    Path("bbh/snarks.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    Path("cot-prompts/snarks.txt").write_bytes(b"a\xff")
    config = settled(Config(model=("m",), task="bbh", data=".", subjects="snarks", protocol="cot"), PROTOCOLS)
    with pytest.raises(ValueError, match="snarks.txt: not UTF-8 at byte 1"):
        list(eval.PROTOCOLS["bbh"]["cot"].questions(config, Tokenizer("bytes"), 2000))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "9" * 5000, "[1]", "null", '{"task": "choices"}', '{"task": []}']
)
def test_lines_that_cannot_be_read_are_of_another_evaluation(line, ask):
    ask(out="x.json")
    os.remove("x.json")
    Path("x.jsonl").write_text(Path("x.jsonl").read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match="x.jsonl:2 is of another evaluation; choose another name"):
        ask(out="x.json")
