"""Data and models that people bring: other files, other columns, tools, names of the Hub, files of prompts."""

import csv
import json
import os

import pytest

import data
from conftest import command
from data import Config, make_dataset
from lib import hub
from lib.chat_formats import Turn, read_conversations
from lib.chat_source import Chats

ROWS = [{"question": f"What is {n}, please?", "reply": f"A number,\n\"{n}\".", "note": "x" * n} for n in range(60)]


def chats(tmp_path, *source, **flags) -> dict:
    out = str(tmp_path / f"set{len(os.listdir(tmp_path))}")
    plain = dict(template="plain", tokenizer="bytes", val_fraction=0.2, workers=1, allow_bad=0.0)
    config = Config(source=tuple(map(str, source)), out=out, **plain | flags)
    config.cleaning.near_duplicates = 0
    return make_dataset(config, Chats(config))


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig" if "bom" in path.name else "utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def said(path, **how) -> list[list[Turn]]:
    return [record.sides[0] for record in read_conversations(path, **how)]


def test_csv_and_parquet_are_read_by_their_columns(tmp_path):
    fields = "question=user, reply=assistant"
    expected = [[Turn("user", row["question"]), Turn("assistant", row["reply"])] for row in ROWS]
    files = [write_csv(tmp_path / "a.csv", ROWS), write_csv(tmp_path / "bom.csv", ROWS)]
    files.append(write_parquet(tmp_path / "a.parquet", ROWS))
    for file in files:
        assert said(file, columns=fields) == expected
        meta = chats(tmp_path, file, fields=fields)
        assert meta["counts"]["conversations"] == 60 and "--fields" in meta["command"]
    messages = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]}
                for n in range(60)]  # fmt: skip
    nested = write_parquet(tmp_path / "m.parquet", messages)
    assert said(nested)[7] == [Turn("user", "Q7"), Turn("assistant", "A7")]
    known = [{"instruction": row["question"], "input": "", "output": row["reply"]} for row in ROWS]
    assert said(write_csv(tmp_path / "alpaca.csv", known)) == expected


@pytest.mark.parametrize("fields, message", [
    ("ask=user,reply=assistant", r"a.csv has no column ask \(it has question, reply, note\)"),
    ("question=asker,reply=assistant", "'question=asker' is not a column and its role"),
    ("question=user", "must name a column of the user and one of the assistant"),
])  # fmt: skip
def test_a_column_that_is_not_there_is_named(fields, message, tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(ValueError, match=message):
        chats(tmp_path, tmp_path / "a.csv", fields=fields)


def test_a_column_that_a_parquet_has_not_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(ValueError, match="a.parquet: no column `ask`"):
        chats(tmp_path, tmp_path / "a.parquet", fields="ask=user,reply=assistant")


def test_a_row_of_too_many_cells_and_empty_cells_are_bad(tmp_path):
    (tmp_path / "a.csv").write_text('question,reply\nQ1,A1\nQ2,"A,2",more\nQ3,\n')
    found = list(read_conversations(tmp_path / "a.csv", columns="question=user,reply=assistant"))
    assert [record.problem for record in found] == ["", "more cells than the 2 columns", ""]
    with pytest.raises(ValueError, match="1 of 3 records are bad, .*a.csv:3: more cells"):
        chats(tmp_path, tmp_path / "a.csv", fields="question=user,reply=assistant")


def test_prompt_and_completion_are_an_exchange(tmp_path):
    rows = [
        {"prompt": "Hi?", "completion": " Ho."},
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi?"}],
         "completion": [{"role": "assistant", "content": "Ho."}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, talk = said(tmp_path / "a.jsonl")
    assert plain == [Turn("user", "Hi?"), Turn("assistant", " Ho.")]
    assert talk == [Turn("system", "S"), Turn("user", "Hi?"), Turn("assistant", "Ho.")]


def test_turns_of_tools_are_rendered_dropped_or_bad(shared, tmp_path):
    path = shared("chat/llamafactory_glaive_toolcall_en_demo.json")
    with pytest.raises(ValueError, match=r"records are bad.*turn 4 is of a tool; give --tools render or --tools drop"):
        chats(tmp_path, path)
    counts = {}
    for tools in ("render", "drop"):
        meta = chats(tmp_path, path, tools=tools, allow_bad=0.05)
        counts[tools] = meta["counts"]
        assert meta["counts"]["conversations"] + meta["counts"]["cleaned_away"] >= 290
    assert counts["render"]["tool_turns_rendered"] == counts["drop"]["tool_turns_dropped"] > 300
    turns = [{"role": "user", "content": "Rain?"},
             {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain"}}]},
             {"role": "tool", "content": "no"}, {"role": "assistant", "content": "No rain."}]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps([{"messages": turns}]))
    (talk,) = said(tmp_path / "t.json")
    assert [turn.role for turn in talk] == ["user", "call", "tool", "assistant"]
    assert talk[1].text == '[{"function": {"name": "rain"}}]'
    names = ["developer", "user", "model"]
    turns = [{"from": name, "value": name} for name in names]
    (tmp_path / "n.json").write_text(json.dumps([{"conversations": turns}]))
    assert [turn.role for turn in said(tmp_path / "n.json")[0]] == ["system", "user", "assistant"]


# ---- a template of your own ----

MINE = 'question = "{system}Q: {question}\\nA:"\nanswer = " {answer}"\nlater = "\\n"\ndefault = "Short."\n'


def test_a_template_of_your_own_is_a_small_file(tmp_path):
    from data import Tokenizer
    from lib.template_forms import spelled
    from lib.templates import bracketed, render

    (tmp_path / "mine.toml").write_text(MINE)
    turns = [Turn("user", "Hi {answer}"), Turn("assistant", "Ho {question}"), Turn("user", "B"), Turn("assistant", "C")]
    told = [Turn("system", "A {question}"), *turns[:2]]
    tokenizer = Tokenizer("bytes")
    ids, mask = render(turns, str(tmp_path / "mine.toml"), tokenizer)
    text = "<s>Short.\n\nQ: Hi {answer}\nA:⟦ Ho {question}</s>⟧\nQ: B\nA:⟦ C</s>⟧"
    assert bracketed(ids, mask, tokenizer) == text
    text = bracketed(*render(told, str(tmp_path / "mine.toml"), tokenizer), tokenizer)
    assert text == "<s>A {question}\n\nQ: Hi {answer}\nA:⟦ Ho {question}</s>⟧"
    write_csv(tmp_path / "a.csv", ROWS)
    flags = dict(fields="question=user,reply=assistant", template=str(tmp_path / "mine.toml"))
    meta = chats(tmp_path, tmp_path / "a.csv", **flags)
    (tmp_path / "mine.toml").unlink()  # the set keeps it
    assert render(turns, meta["template"], tokenizer) == (ids, mask)
    assert spelled(meta["template"]) == meta["template"]


@pytest.mark.parametrize("text, message", [
    ('question = "Q: {question}"', r"question must have {system} once, or that text is lost"),
    ('question = "{system}{question}"\nanswer = "A"', r"answer must have {answer} once"),
    ('question = "{system}{question}"\nanswers = "A"', "a template has no field answers"),
    ('question = 7', "field question: Expected `?str`?, got `?int`?"),
    ('answer = "{answer}"', "missing required field `?question`?"),
    ('question = "', "is not TOML"),
    ('question = "{system}{question}"\nend = "<|x|>"', r"its end <\|x\|> is not among its special tokens"),
])  # fmt: skip
def test_a_template_that_would_lose_something_says_what(text, message, tmp_path):
    from lib.template_forms import form_of

    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=f"mine.toml.*{message}"):
        form_of(str(tmp_path / "mine.toml"))
    with pytest.raises(ValueError, match="--template other is not one of llama2-chat, .*nor a file .toml"):
        form_of("other")


# ---- the Hub ----


def test_a_data_set_and_a_model_of_the_hub_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", [{"prompt": f"Q{n}", "completion": f"A{n}"} for n in range(60)])
    asked = []

    def download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, "*.parquet" in allow_patterns, "*.safetensors" in allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.fetched.cache_clear()
    assert chats(tmp_path, "hf:who/chats")["counts"]["conversations"] == 60
    (tmp_path / "hub" / "tokenizer.bytes").write_text("")
    assert data.Tokenizer("hf:who/model").name == "bytes"
    assert asked == [("who/chats", "dataset", True, False), ("who/model", "model", False, True)]


def test_without_a_network_a_name_of_the_hub_is_one_sentence(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = ("sample.py", "--model", "hf:who/model", "--prompt", "hi")
    done = command(*words, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sample.py: hf:who/model: this model cannot be fetched (")
    done = command("sample.py", "--model", "who/model", cwd=tmp_path, check=False)
    assert "who/model: no such file or folder; a model of the Hugging Face Hub is called hf:who/model" in done.stderr


# ---- files of prompts ----


@pytest.fixture
def folder(tmp_path, shared):
    """A model that learned stories, exported with a chat template, and forty prompts."""
    from data import Tokenizer
    from model import load, save

    tokenizer = Tokenizer(shared("stories260K/tok512.rebuilt.model"))
    model = load(shared("stories260K/stories260K.bin"))
    save(model, tmp_path / "chat", tokenizer, "plain")
    save(model, tmp_path / "text", tokenizer)
    names = ["Lily", "Tom", "a cat", "the sun"]
    rows = [{"prompt": f"Once upon a time, {names[n % 4]} saw {n}", "id": n} for n in range(40)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def answer(folder, *words: str, check: bool = True):
    settings = ("--max_new_tokens", "12", "--dtype", "fp32")
    return command("sample.py", "--prompts", "p.jsonl", *settings, *words, cwd=folder, check=check)


def test_a_file_of_prompts_is_answered_and_goes_on_where_it_was(folder):
    from data import Tokenizer
    from model import load
    from sample import Chat, Sampling, complete

    answer(folder, "--model", "text", "--out", "text.jsonl", "--temperature", "0")
    lines = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(40))
    model, tokenizer = load(folder / "text").eval(), Tokenizer(folder / "text")
    prompts = [tokenizer.encode_prompt(line["prompt"]) for line in lines[:5]]
    assert complete(model, tokenizer, prompts, 12) == [line["answer"] for line in lines[:5]]

    answer(folder, "--model", "chat", "--out", "a.jsonl", "--seed", "3")
    whole = (folder / "a.jsonl").read_bytes()
    cut = whole.splitlines(keepends=True)
    for kept in (b"".join(cut[:20]) + cut[20][:30], b"".join(cut[:16]), b""):
        (folder / "a.jsonl").write_bytes(kept)
        answer(folder, "--model", "chat", "--out", "a.jsonl", "--seed", "3")
        assert (folder / "a.jsonl").read_bytes() == whole
    done = answer(folder, "--model", "chat", "--out", "a.jsonl", "--seed", "4", check=False)
    assert done.returncode == 2 and "line 1 is no answer to the prompt at this place" in done.stderr
    assert (folder / "a.jsonl").read_bytes() == whole
    answer(folder, "--model", "chat", "--out", "b.jsonl", "--temperature", "0")
    first = json.loads((folder / "b.jsonl").read_text().splitlines()[0])
    chat = Chat(model, tokenizer, "plain")
    assert first["answer"].strip() == chat.answer(first["prompt"], 12, Sampling(), lambda text: None)


def test_prompts_may_be_messages_or_have_an_input(folder):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}]}, {"question": "Hi"}, {"instruction": "Hi"},
        {"instruction": "Hi", "input": "there"}, {"text": "Hi"},
    ]  # fmt: skip
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answer(folder, "--model", "chat", "--out", "a.jsonl", "--temperature", "0")
    keys = [json.loads(line)["key"] for line in (folder / "a.jsonl").read_text().splitlines()]
    assert keys[0] == keys[1] == keys[2] == keys[4] != keys[3]


@pytest.mark.parametrize("row, message", [
    ({"prompts": "x"}, "p.jsonl:1: it has none of the fields prompt, question, instruction, text, messages"),
    ([], "p.jsonl:1: it is not an object"), ({"prompt": "x " * 999}, "p.jsonl:1: .* do not fit the model's window"),
    ({"messages": []}, "p.jsonl:1: messages need a model of chats"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_asked_is_named_before_any_is(row, message, folder):
    import re

    (folder / "p.jsonl").write_text(json.dumps(row))
    done = answer(folder, "--model", "text", "--out", "a.jsonl", check=False)
    assert done.returncode == 2 and re.search(message, done.stderr) and not (folder / "a.jsonl").exists()
    done = answer(folder, "--model", "text", check=False)
    assert "go together" in done.stderr


def test_an_evaluation_asks_in_the_models_own_template(folder):
    rows = [{"context": f"Is {n} a number?", "choices": ["Yes", "No"], "answer": 0} for n in range(4)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = ("eval.py", "--task", "choices", "--data", "q.jsonl", "--chat")
    scores = {}
    for name, more, template in (
        ("own", ("--model", "chat"), "plain (the model's own)"),
        ("named", ("--model", "text", "--template", "plain"), "plain (--template)"),
        ("none", ("--model", "text"), "llama2-chat (LLaMA-2's, for the model has none)"),
    ):
        done = command(*plain, *more, "--out", f"{name}.json", cwd=folder)
        assert f"chat template: {template}" in done.stdout
        scores[name] = [json.loads(line)["key"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert json.loads((folder / f"{name}.json").read_text())["template"] == template.split()[0]
    assert scores["own"] == scores["named"] != scores["none"]
    done = command(*plain[:-1], "--model", "text", "--template", "plain", cwd=folder, check=False)
    assert done.returncode == 2 and "--template plain is for --chat, which is off" in done.stderr
