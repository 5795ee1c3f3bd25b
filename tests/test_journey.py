"""A folder of transformers 5 through data.py, train.py, sample.py, and back; what the kind of a run decides."""

import json
import subprocess
import sys

import pytest
import torch

import train
from conftest import ROOT, command
from data import Tokenizer
from lib.checkpoints import place_of
from lib.defaults import BY_KIND, by_kind
from lib.runs import read_log
from model import load
from sample import load_model
from test_chat import chat_set, sharegpt, talk
from test_family import SMALL, write_tokenizer


@pytest.fixture(scope="module")
def smol(tmp_path_factory, shared):
    """A model as SmolLM2's, saved by transformers 5, whose tokenizer.json is alone, and 200 chats."""
    import transformers

    folder = tmp_path_factory.mktemp("smol")
    tokenizer = write_tokenizer("smollm2", folder / "hf", shared, 600)
    shape = SMALL | dict(vocab_size=len(tokenizer), max_position_embeddings=128, head_dim=16)
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    lines = [json.dumps(sharegpt(talk(number, 40, 30))) for number in range(200)]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    command(
        "data.py", "--source", "chats.jsonl", "--template", "chatml-tokens", "--tokenizer", "hf", "--max_len", "96",
        "--out", "data", "--near_duplicates", "0", cwd=folder,
    )  # fmt: skip
    return folder


def test_a_folder_of_transformers_5_comes_back_as_a_chat_model(smol):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = command(
        "train.py", "--data", "data", "--init_from", "hf", "--lora_rank", "4", "--out", "lora", "--learning_rate",
        "5e-3", "--batch_size", "16", "--sample_every", "10", "--dtype", "fp32", cwd=smol,
    )  # fmt: skip
    first = done.stdout.splitlines()[0]
    assert first.startswith("LoRA: learning rate 0.005, cosine to 0 of it, weight decay 0; ")
    config = json.loads((smol / "lora" / "run.json").read_text())["config"]
    assert config["seq_len"] == 96 and config["epochs"] == 3.0 and config["weight_decay"] == 0.0
    rows = [row for row in read_log(smol / "lora" / "log.jsonl") if "sample" in row]
    assert [row["step"] for row in rows][0] == 10 and rows[-1]["step"] > 10
    assert all(row["sample"].startswith("user\nQ") for row in rows) and "sample.py" not in done.stdout
    assert Tokenizer(smol / "lora").sha256 == Tokenizer(smol / "hf").sha256
    command("sample.py", "--model", "lora", "--export", "out", cwd=smol)
    words = [sys.executable, str(ROOT / "sample.py"), "--model", "out", "--chat", "--temperature", "0"]
    more = ["--max_new_tokens", "24", "--dtype", "fp32"]
    said = subprocess.run([*words, *more], cwd=smol, input="Q7\n", capture_output=True, text=True)
    assert said.returncode == 0, said.stderr

    ours, tokenizer = load_model(str(smol / "lora"), dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(smol / "out", dtype=torch.float32)
    cut, before = AutoTokenizer.from_pretrained(smol / "out"), AutoTokenizer.from_pretrained(smol / "hf")
    text = "Hello  world,\n\n 12.5 <|im_end|> 日本"
    assert cut(text, split_special_tokens=True).input_ids == tokenizer.encode(text)
    assert cut.get_vocab() == before.get_vocab()
    asked = [{"role": "user", "content": "Q7"}]
    ids = cut.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ids == before.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    written = theirs.generate(tokens, do_sample=False, max_new_tokens=24)[0, len(ids) :]
    answer = cut.decode(written, skip_special_tokens=True)
    assert said.stdout.strip() == answer.strip() != ""
    assert (smol / "out" / "tokenizer.json").read_bytes() == (smol / "hf" / "tokenizer.json").read_bytes()
    kept, base = (json.loads((smol / name / "tokenizer_config.json").read_text()) for name in ("out", "hf"))
    changed = {name for name in kept.keys() | base.keys() if kept.get(name) != base.get(name)}
    assert changed == {"chat_template", "plainllama_template"}
    generation = json.loads((smol / "out" / "generation_config.json").read_text())
    assert tokenizer.special("<|im_end|>") in generation["eos_token_id"]


# ---- defaults ----


def defaults(monkeypatch, *words: str, **flags) -> train.Config:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return by_kind(train.Config(**flags))


def test_a_kind_of_run_brings_its_rate_epochs_and_length(smol, tiny_data, tmp_path, monkeypatch):
    chats, model, text = (str(smol / "data"),), str(smol / "hf"), (str(tiny_data),)
    found = defaults(monkeypatch, data=chats, init_from=model)
    assert (found.learning_rate, found.epochs, found.seq_len) == (2e-5, 3.0, 96)
    found = defaults(monkeypatch, data=chats, init_from=model, lora_rank=8)
    assert (found.learning_rate, found.weight_decay, found.final_lr) == (2e-4, 0.0, 0.0)
    found = defaults(monkeypatch, data=text, init_from=model)
    assert (found.learning_rate, found.epochs, found.seq_len) == (2e-5, 1.0, 128)
    found = defaults(monkeypatch, "--steps", "5", data=text, init_from=model)
    assert found.epochs == 0
    assert defaults(monkeypatch, data=text) == train.Config()
    assert defaults(monkeypatch, data=("not-yet",)) == train.Config()
    lines = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command(
        "data.py", "--source", "p.jsonl", "--template", "plain", "--tokenizer", "bytes", "--out", "pairs",
        "--val_fraction", "0.3", cwd=tmp_path,
    )  # fmt: skip
    pairs = (str(tmp_path / "pairs"),)
    for rank, kind in ((0, "DPO"), (4, "DPO with LoRA")):
        found = defaults(monkeypatch, data=pairs, init_from=model, lora_rank=rank)
        assert found.learning_rate == BY_KIND[kind]["learning_rate"] < 1e-5 and found.epochs == 1


def test_a_conversation_that_does_not_fit_is_told_both_ways_out(tmp_path, tiny_run):
    data = chat_set(tmp_path, [talk(number, 100) for number in range(40)])
    with pytest.raises(ValueError, match="has 106 tokens, more than --seq_len 32; give --seq_len 106, or prepare it"):
        tiny_run(data=data)


# ---- samples and the best checkpoint ----


def test_samples_are_of_the_text_or_a_question(tmp_path, tiny_run, capsys):
    run = tiny_run(steps=6, sample="The ", sample_every=2)
    samples = [(row["step"], row["sample"]) for row in read_log(run / "log.jsonl") if "sample" in row]
    assert [step for step, _ in samples] == [2, 4, 6]
    assert all(text.startswith("The ") for _, text in samples)
    data = chat_set(tmp_path, [talk(number, 10) for number in range(60)], template="llama2-chat", val_fraction=0.2)
    run = tiny_run("chat", data=data, steps=2, seq_len=96, sample="Who?")
    (row,) = [row for row in read_log(run / "log.jsonl") if "sample" in row]
    assert row["step"] == 2 and row["sample"].startswith("[INST] Who? [/INST]")
    with pytest.raises(ValueError, match="--sample has 209 tokens, more than the context window of 96"):
        tiny_run("long", data=data, steps=2, seq_len=96, sample="x" * 193)
    with pytest.raises(ValueError, match="--sample_every -1"):
        tiny_run("odd", steps=2, sample_every=-1)


def test_the_best_checkpoint_by_validation_is_kept(tiny_run, tiny_data, monkeypatch):
    losses = iter([3.0, 3.0, 2.0, 2.5, 2.1, 2.2, 1.5])
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: real(*args) | {"val_loss": next(losses)})
    run = tiny_run(steps=10, eval_every=2, save_every=2, keep=1)
    kept = sorted(path.name for path in run.glob("step_*"))
    assert kept == ["step_00000004", "step_00000010"]
    assert place_of(f"{run}:best") == run / "step_00000004"
    best, tokenizer = load_model(f"{run}:best", dtype="fp32")
    assert tokenizer.name == "bytes"
    weights = dict(load(run / "step_00000004").named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in best.named_parameters())
    assert any(not torch.equal(weight, weights[name]) for name, weight in load(run).named_parameters())
    with pytest.raises(ValueError, match="run2 has no best checkpoint"):
        place_of(run.parent / "run2:best")


def test_going_back_forgets_a_best_checkpoint_that_is_yet_to_come(tiny_run):
    run = tiny_run(steps=8, eval_every=4, save_every=2, stop_at=4)
    assert place_of(f"{run}:best").name == "step_00000004"
    (run / "last").write_text("step_00000002")
    tiny_run(resume=str(run), stop_at=4, eval_every=100)
    with pytest.raises(ValueError, match="no best checkpoint"):
        place_of(f"{run}:best")
