"""Evaluation: prompts and answers of BIG-Bench Hard, GSM8K, multiple choice, perplexity and passkey retrieval."""

import json
import math
from pathlib import Path

import pytest
import torch

import eval
from conftest import flags, random_model, run_ranks
from data import Tokenizer
from eval import PROTOCOLS, Config, Question, Reader, settled
from lib import grades
from lib.batches import make_batches, rows_to_read
from lib.cli import run_command
from lib.perplexity import rolling_windows
from lib.tasks import BBH_TASKS
from model import ModelConfig, Transformer, save

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=2048)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "m"
    save(model, folder, Tokenizer("bytes"))
    return str(folder)


@pytest.fixture(scope="module")
def llama(shared) -> Tokenizer:
    return Tokenizer(shared("llama2_tokenizer/tokenizer.model"))


def questions_of(tokenizer, task: str, data, room=4096, **options) -> list[Question]:
    config = settled(Config(model=("m",), task=task, data=str(data), **options), PROTOCOLS)
    task = eval.PROTOCOLS[task][config.protocol].questions
    return list(task(config, tokenizer, min(room, config.max_prompt or room)))


def run(**options) -> dict:
    eval.main(Config(**options | {"model": (options["model"],)}))
    return json.loads(Path(options["out"]).read_text())


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).with_suffix(".jsonl").read_text().splitlines()]


def graded(grade, target: str, text: str) -> dict:
    return grade(Question("s", 0, [1], target=target), text)["scores"]


# ---- BIG-Bench Hard ----


def test_direct_prompts_have_three_examples_that_are_not_asked(shared, llama):
    questions = questions_of(llama, "bbh", shared("bbh"))
    assert len(questions) == 6430 and list(dict.fromkeys(q.subject for q in questions)) == BBH_TASKS
    assert llama.decode(questions[0].context) == (
        "not ( True ) and ( True ) is\nAnswer: False\n\nTrue and not not ( not False ) is\nAnswer: True\n\n"
        "not True or False or ( False ) is\nAnswer: False\n\nFalse or not ( True ) and False is\nAnswer:"
    )
    assert questions[0].index == 3 and questions[0].target == "False" and {q.shots for q in questions} == {3}


def test_chains_of_thought_come_after_the_authors_prompt(shared, llama):
    questions = questions_of(llama, "bbh", shared("bbh"), protocol="cot", limit=1, subjects=BBH_TASKS[0])
    text = llama.decode(questions[0].context)
    assert text.startswith("Evaluate the result of a random Boolean expression.\n\nQ: not ( ( not not True ) ) is\n")
    assert text.endswith("\n\nQ: not ( True ) and ( True ) is\nA: Let's think step by step.")
    assert text.count("Let's think step by step.") == 4 and questions[0].index == 0
    assert sum(len(questions_of(llama, "bbh", shared("bbh"), protocol="cot", subjects=s)) for s in BBH_TASKS[:3]) == 687


@pytest.mark.parametrize("text, target, right", [
    ("So the answer is True.", "True", True),
    ("The answer is False. No: the answer is True.", "True", True),       # the last one counts
    ("the answer is True. Then the answer is False.", "True", False),
    ("So the answer is (B)", "(B)", True),
    ("So the answer is (B)..", "(B)", False),                             # one full stop goes, not two
    ("True", "True", True),                                               # the whole, where nothing is announced
    (" True.\n", "True", True),
    ("I think True", "True", False),
    ("so the answer is [ ] >.", "[ ] >", True),
    ("the answer is true.", "True", False),
    ("the answer is -3.", "-3", True),
    ("the answer is 1,000.", "1000", False),                              # an exact match
    ("", "True", False),
])  # fmt: skip
def test_the_answer_of_a_chain_is_what_follows_the_last_answer_is(text, target, right):
    assert graded(grades.grade_chain, target, text) == {"acc": float(right)}


@pytest.mark.parametrize("text, target, right", [
    (" True\n\nTrue and", "True", True), ("  (A) is it", "(A)", True), ("Falsehood", "False", True),
    ("\n\nTrue", "True", True), ("It is True", "True", False), ("", "True", False), ("true", "True", False),
])  # fmt: skip
def test_a_direct_answer_begins_with_the_target(text, target, right):
    assert graded(grades.grade_beginning, target, text) == {"acc": float(right)}


# ---- GSM8K ----


def test_gsm8k_asks_after_the_eight_solved_problems(shared, llama):
    questions = questions_of(llama, "gsm8k", shared("gsm8k/test.jsonl"))
    assert len(questions) == 1319 and {q.shots for q in questions} == {8}
    text = llama.decode(questions[0].context)
    assert text.startswith("Q: There are 15 trees in the grove.") and text.count("\n\nQ: ") == 8
    assert text.count("The answer is ") == 8 and " 23 - 15 is 8. The answer is 8.\n\nQ: Janet" in text
    assert text.endswith("every day at the farmers' market?\nA:") and questions[0].target == "18"
    assert sum(q.target.startswith("-") or "," in q.target for q in questions) > 0  # such targets exist


@pytest.mark.parametrize("text, target, strict, flexible", [
    ("5 + 4 = 9. The answer is 9.", "9", True, True),
    ("The answer is 8. No, wait. The answer is 9.", "9", False, True),     # strict takes the first, flexible the last
    ("The answer is 9.\n\nShe then bought 3", "9", True, False),
    ("The answer is 1,234.", "1234", True, True),
    ("The answer is 1234.", "1,234", True, True),
    ("The answer is -5.", "-5", True, True),
    ("The answer is -5.", "5", False, False),
    ("So the answer is 5.", "5", False, True),                             # nor another beginning
    ("answer is 5.", "5", False, True),
    ("The answer is $18.", "18", False, True),                             # strict knows no dollars
    ("The answer is 18", "18", False, True),       # the last character is the one that the expression leaves out
    ("The answer is 18\n", "18", False, True),
    ("The answer is 3.50.", "3.50", True, True),
    ("It costs $1,000.", "1000", False, True),
    ("The answer is nine.", "9", False, False),
    ("no number", "0", False, False),
    ("", "1", False, False),
    ("#### 42", "42", False, True),
    ("The answer is 7 apples.", "7", True, True),
    ("x = 12. So 3 of 4", "4", False, True),
])  # fmt: skip
def test_numbers_are_found_as_the_reference_finds_them(text, target, strict, flexible):
    assert graded(grades.grade_gsm8k, target, text) == {"strict": float(strict), "flexible": float(flexible)}


# ---- writing ----


def write(model, questions, batch_tokens, **changes) -> list[str]:
    protocol = eval.Protocol(None, None, max_new_tokens=12, **changes)
    reader, found = Reader(model), {}
    for batch in make_batches(questions, list(rows_to_read(questions)), batch_tokens, 12):
        found |= {number: text for number, _, text in reader.write(batch, Tokenizer("bytes"), protocol)}
    return [found[number] for number in range(len(questions))]


def test_written_answers_are_those_of_each_prompt_alone(model):
    generator = torch.Generator().manual_seed(0)
    ids = lambda count: torch.randint(32, 127, (count,), generator=generator).tolist()
    first = ids(60)
    questions = [Question("s", i, first + ids(3 + i % 5)) for i in range(9)] + [Question("t", 0, ids(30))]
    alone = [write(model, [question], 10_000)[0] for question in questions]
    for batch_tokens in (1, 40, 10_000):
        assert write(model, questions, batch_tokens) == alone
    batches = make_batches(questions, list(rows_to_read(questions)), 10_000, 12)
    assert sorted((len(batch.prefix), len(batch.rows)) for batch in batches) == [(0, 1), (60, 9)]
    stop = next(text[2] for text in alone if len(text) > 2 and text[2].isascii())
    expected = [text.split(stop)[0] for text in alone]
    assert write(model, questions, 10_000, stop=(stop,)) == expected


def test_rows_that_have_ended_leave_the_batch(model):
    from sample import generate

    sizes = []
    handle = model.embedding.register_forward_hook(lambda module, tokens, out: sizes.append(tokens[0].size(0)))
    prompts = [[i + 40, 3] for i in range(8)]
    whole = generate(model, prompts, 10)
    sizes.clear()
    counts = [0] * 8

    def stop(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] > row  # row r writes r + 1 tokens

    assert generate(model, prompts, 10, stop=stop) == [tokens[: row + 1] for row, tokens in enumerate(whole)]
    handle.remove()
    assert sizes == [8, 8, 6, 6, 4, 3, 2, 1]


@pytest.mark.parametrize("task, data, protocol", [
    ("bbh", "bbh", "instructeval"), ("gsm8k", "gsm8k/test.jsonl", "cot"), ("mmlu", "mmlu/data", "instructeval"),
])  # fmt: skip
def test_tasks_with_written_answers_run_on_any_number_of_processes(
    task, data, protocol, shared, saved, tmp_path, one_thread
):
    subjects = {"bbh": "navigate,snarks", "mmlu": "virology", "gsm8k": ""}[task]
    options = {"model": saved, "task": task, "data": str(shared(data)), "protocol": protocol, "subjects": subjects,
               "limit": 2}  # fmt: skip
    result = run(**options, out=str(tmp_path / "a.json"))
    assert result["scores"]["questions"] == (4 if task == "bbh" else 2) and result["max_new_tokens"] > 0
    assert "published" not in result and result["prompt_tokens"] > 0
    if task == "gsm8k":
        run_ranks(2, eval.main, Config(**options | {"model": (saved,)}, out=str(tmp_path / "b.json")))
        assert lines_of(tmp_path / "a.json") == lines_of(tmp_path / "b.json")
        assert set(result["scores"]["scores"]) == {"strict", "flexible"}


# ---- multiple choice ----


def plain_logprob(model, context: str, choice: str) -> float:
    head, ids = len(context.encode()), torch.tensor([[256, *(context + choice).encode()]])
    with torch.no_grad():
        steps = model(ids[:, :-1])[0].log_softmax(-1)
    return sum(steps[t - 1, ids[0, t]].item() for t in range(head + 1, ids.size(1)))


def test_your_own_task_is_a_file_of_contexts_choices_and_answers(model, saved, tmp_path):
    rows = [
        {"context": "Two and two make", "choices": ["four", "five apples", "x"], "answer": 0},
        {"context": "The sky is ", "choices": ["blue", "green"], "answer": 1, "subject": "sky"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(model=saved, task="choices", data=str(tmp_path / "t.jsonl"), out=str(tmp_path / "r.json"))
    lines = lines_of(tmp_path / "r.json")
    for row, line in zip(rows, lines):
        context = row["context"].rstrip()  # its blank goes before the one that divides it from the choice
        blanks = row["context"][len(context) :] + " "
        expected = [plain_logprob(model, context, blanks + choice) for choice in row["choices"]]
        assert line["logprobs"] == pytest.approx(expected, abs=1e-4)
        by_length = [p / len(choice) for p, choice in zip(expected, row["choices"])]
        assert line["scores"] == {
            "acc": float(expected.index(max(expected)) == row["answer"]),
            "acc_norm": float(by_length.index(max(by_length)) == row["answer"]),
        }
    assert set(result["scores"]["scores"]["acc"]["subjects"]) == {"choices", "sky"}


def test_choices_are_also_weighed_by_their_characters():
    question = Question("s", 0, [1], gold=[1], sizes=[1, 10, 4])
    assert grades.grade_choice(question, [-1.0, -5.0, -3.0])["scores"] == {"acc": 0.0, "acc_norm": 1.0}


def test_arc_hellaswag_and_truthfulqa_are_read_as_published(tmp_path):
    tokenizer = Tokenizer("bytes")

    def texts(task: str, *rows) -> list[tuple]:
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [
            (q.subject, tokenizer.decode(q.context), [tokenizer.decode(choice) for _, choice in q.choices], q.gold)
            for q in questions_of(tokenizer, task, tmp_path / "t.jsonl")
        ]

    labels = [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]
    columns = {"text": ["ice", "fire"], "label": ["A", "B"]}
    hugging_face = {"question": "What burns?", "choices": columns, "answerKey": "B"}
    ai2 = {"question": {"stem": "What burns?", "choices": labels}, "answerKey": "2"}
    expected = ("arc", "Question: What burns?\nAnswer:", [" ice", " fire"], [1])
    assert texts("arc", hugging_face, ai2) == [expected, expected]
    row = {"activity_label": "Cooking", "ctx_a": "A man [header] cooks.", "ctx_b": "he [title] then", "label": "1",
           "endings": ["eats  it. [substeps] Yes", "sleeps"]}  # fmt: skip
    context = "Cooking: A man cooks. He. then"
    assert texts("hellaswag", row) == [("hellaswag", context, [" eats it. Yes", " sleeps"], [1])]
    row = {"question": "Why?", "mc1_targets": {"choices": ["so", "no"], "labels": [1, 0]},
           "mc2_targets": {"choices": ["so", "a", "b"], "labels": [1, 1, 0]}}  # fmt: skip
    authors = {"question": "Why?", "mc1_targets": {"so": 1, "no": 0}, "mc2_targets": {"so": 1, "a": 1, "b": 0}}
    (first, second, *again) = texts("truthfulqa", row, authors)
    assert [first, second] == again and first[0] == "mc1" and second[0] == "mc2"
    assert first[1].startswith("Q: What is human life expectancy") and first[1].count("\n\nQ: ") == 6
    assert first[1].endswith("Barcelona, Spain.\n\nQ: Why?\nA:")
    assert first[2:] == ([" so", " no"], [0]) and second[2:] == ([" so", " a", " b"], [0, 1])


def test_truthfulqa_counts_the_probability_of_the_true_choices():
    logprobs = [math.log(p) for p in (0.1, 0.3, 0.2)]
    question = Question("mc2", 0, [1], gold=[0, 2])
    assert grades.grade_truthfulqa(question, logprobs)["scores"] == {"mc2": pytest.approx(0.5)}
    assert grades.grade_truthfulqa(Question("mc1", 0, [1], gold=[0]), logprobs)["scores"] == {"mc1": 0.0}


def test_ties_go_to_the_first_choice_and_are_counted(tmp_path):
    flat = random_model(TINY)
    flat.unembedding.weight.data.zero_()
    save(flat, tmp_path / "flat", Tokenizer("bytes"))
    rows = [{"context": "Say", "choices": list("abcd"), "answer": answer} for answer in (0, 1)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tmp_path / "flat"), "task": "choices", "data": str(tmp_path / "t.jsonl")}
    result = run(**options, out=str(tmp_path / "r.json"))
    assert result["scores"]["ties"] == 2 and [line["pick"] for line in lines_of(tmp_path / "r.json")] == [0, 0]


# ---- perplexity, passkey ----


def test_rolling_windows_predict_every_token_once_with_as_much_context_as_fits():
    for length in range(2, 40):
        ids = list(range(length))
        windows = list(rolling_windows(ids, 7))
        assert sum((new for _, new in windows), []) == ids[1:]
        for context, new in windows:
            assert context + new == ids[max(0, new[-1] - 7) : new[-1] + 1]
            assert len(context + new) <= 8 and len(new) <= 7


def test_perplexity_of_text_files_is_that_of_plain_scoring(model, saved, tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in (("a.md", "Grüße " * 30), ("b.md", "short")):
        (tmp_path / "texts" / name).write_text(text)
    options = {"model": saved, "task": "perplexity", "data": str(tmp_path / "texts")}
    got = run(**options, batch_tokens=64, out=str(tmp_path / "p.json"))["scores"]
    nats = 0.0
    for text in ("Grüße " * 30, "short"):
        ids = torch.tensor([Tokenizer("bytes").encode(text, bos=True)])
        with torch.no_grad():
            nats += model.loss(ids[:, :-1], ids[:, 1:]).item()
    count = len(("Grüße " * 30 + "short").encode())
    assert (got["tokens"], got["bytes"], got["documents"]) == (count, count, 2)
    assert got["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert got["bits_per_byte"][0] == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert got["bits_per_byte"][1] < got["bits_per_byte"][0] < got["bits_per_byte"][2]
    assert got["word_perplexity"] == pytest.approx(math.exp(nats / 32), rel=1e-4)  # 31 by "Grüße " * 30, and 1
    assert "| bits_per_byte | " in (tmp_path / "p.md").read_text()
    eval.main(Config(compare=(str(tmp_path / "p.json"),) * 2, out=str(tmp_path / "c.json")))
    assert json.loads((tmp_path / "c.json").read_text())["difference"] == [0, 0, 0]


def test_long_texts_are_read_in_windows_with_full_context(tmp_path, model):
    short = Transformer(ModelConfig(**vars(TINY) | {"max_seq_len": 16}))
    short.load_state_dict(model.state_dict())
    save(short, tmp_path / "m", Tokenizer("bytes"))
    (tmp_path / "a.md").write_text("The quick brown fox jumps over the lazy dog.")
    got = run(model=str(tmp_path / "m"), task="perplexity", data=str(tmp_path / "a.md"), out=str(tmp_path / "p.json"))
    ids, nats = Tokenizer("bytes").encode("The quick brown fox jumps over the lazy dog.", bos=True), 0.0
    for t in range(1, len(ids)):  # by hand: of a window's 16 tokens, those already scored are context
        window_end = min(-(-t // 16) * 16, len(ids) - 1)
        context = torch.tensor([ids[max(0, window_end - 16) : t]])
        with torch.no_grad():
            nats -= model(context)[0, -1].log_softmax(-1)[ids[t]].item()
    assert got["scores"]["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_perplexity_of_a_dataset_is_the_validation_loss_of_training(tiny_run, tiny_data, tmp_path):
    folder = tiny_run(steps=3, eval_tokens=10**9)
    last = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    got = run(model=str(folder), task="perplexity", data=str(tiny_data), out=str(tmp_path / "p.json"))["scores"]
    assert got["nats_per_token"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert got["bits_per_byte"][0] == pytest.approx(last["val_bits_per_byte"], rel=1e-4)


def test_a_passkey_is_hidden_in_prompts_of_the_length_asked_for(llama, saved, tmp_path):
    questions = questions_of(llama, "passkey", "", lengths="300,1000,4000", limit=20, room=4088)
    assert [q.subject for q in questions[::20]] == ["300", "1000", "4000"]
    places = []
    for q in questions:
        text = llama.decode(q.context)
        assert 0 <= int(q.subject) - len(q.context) < 40 + int(q.subject) / 100
        assert f"\nThe pass key is {q.target}. Remember it. {q.target} is the pass key.\n" in text
        assert text.endswith("\nWhat is the pass key? The pass key is")
        places.append(text.index(q.target) / len(text))
    assert min(places) < 0.2 and max(places) > 0.8 and len({q.target for q in questions}) > 50
    assert questions == questions_of(llama, "passkey", "", lengths="300,1000,4000", limit=20, room=4088)
    result = run(model=saved, task="passkey", limit=2, lengths="500,2000", out=str(tmp_path / "k.json"))
    assert set(result["scores"]["scores"]["acc"]["subjects"]) == {"500", "2000"}
    assert {q.subject for q in questions_of(llama, "passkey", "", room=4088)} == {"1022", "2044", "4088"}


@pytest.mark.parametrize("text, right", [(" 12345.", True), ("12345", True), (" 123456", False), ("is 1 12345", False)])
def test_a_passkey_is_the_first_number_written(text, right):
    assert graded(grades.grade_number, "12345", text) == {"acc": float(right)}


# ---- bad input ----


def test_bad_input_is_one_sentence(saved, tmp_path, monkeypatch, capsys, shared, tiny_data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "snarks.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    (tmp_path / "bbh" / "navigate.json").write_text('{"examples": [{"input": "a"}]}')
    good = {"context": "a", "choices": ["b", "c"], "answer": 1}
    files = {
        "no_key": [good, {"context": "a", "choices": ["b"]}], "text_key": [good | {"answer": "c"}],
        "outside": [good | {"answer": 2}], 
        "long": [good | {"choices": ["b", "c" * 3000]}], "none": [],
        "list": [[1]], "arc": [{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}],
        "gsm8k": [{"question": "q"}], "number": [5],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.jsonl").write_text('{"context": "a",\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xff"}\n')
    stories = {
        "model": str(shared("stories260K/stories260K.bin")),
        "tokenizer": str(shared("stories260K/tok512.rebuilt.model")),
    }
    choices = lambda name: {"task": "choices", "data": f"{name}.jsonl"}
    for change, message in (
        (choices("no_key"), "no_key.jsonl:2: no field 'answer'"),
        (choices("text_key"), "text_key.jsonl:1: answer 'c' must be the number of a choice, from 0"),
        (choices("outside"), "outside.jsonl:1: answer [2] is not one of its 2 choices"),
        (choices("long"), "long.jsonl:1: a choice of 3"),
        (choices("none"), "--data none.jsonl has no questions"),
        (choices("number"), "number.jsonl:1: not an object but 5"),
        (choices("broken"), "broken.jsonl:1: not JSON"),
        (choices("latin"), "latin.jsonl: not UTF-8 at byte 13"),
        (choices("nowhere"), "--data nowhere.jsonl is not a file of questions"),
        ({"task": "arc", "data": "arc.jsonl"}, "arc.jsonl:1:"),
        ({"task": "gsm8k", "data": "gsm8k.jsonl"}, "gsm8k.jsonl:1: no field 'answer'"),
        ({"task": "gsm8k", "data": "gsm8k.jsonl", "shots": 9}, "--shots 9 does not fit gsm8k cot, which has 8"),
        ({"task": "bbh", "data": "."}, "boolean_expressions.json is missing"),
        ({"task": "bbh", "data": ".", "subjects": "navigate"}, "navigate.json: example 0 must have the texts"),
        ({"task": "bbh", "data": ".", "subjects": "snarks", "protocol": "cot"}, "cot-prompts/snarks.txt is missing"),
        ({"task": "bbh", "data": ".", "subjects": "tigers"}, "--subjects tigers is not one of bbh's 27"),
        ({"task": "passkey", "lengths": "50"}, "--lengths 50 must lie between"),
        ({"task": "passkey", "lengths": "many"}, "--lengths many must be numbers of tokens"),
        ({"task": "perplexity", "data": "nowhere"}, "--data nowhere: no such file or folder"),
        ({"task": "perplexity", "data": "bbh"}, "holds no files that end in"),
        ({"task": "perplexity", "data": str(tiny_data)} | stories, "was made with another tokenizer than the model's"),
    ):
        monkeypatch.setattr("sys.argv", ["eval.py", *flags({"model": saved} | change)])
        with pytest.raises(SystemExit) as stopped:
            run_command(eval.main, eval.Config)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and message in error, error


def test_a_continuation_of_no_tokens_is_refused(llama, tmp_path):
    row = {"question": "a", "choices": {"text": ["b", ""], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    broken = Tokenizer("bytes")
    broken.codec.encode = lambda text: list(text.rstrip().encode())  # one to which a blank at the end is nothing
    with pytest.raises(ValueError, match=r"t.jsonl:1: ' ' has no tokens"):
        questions_of(broken, "arc", tmp_path / "t.jsonl")
    assert questions_of(llama, "arc", tmp_path / "t.jsonl")[0].choices[1][1] == [29871]
