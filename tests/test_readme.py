"""The README's commands run as they stand, with small settings added, and the scripts start quickly."""

import doctest
import functools
import gzip
import importlib
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, SHARED, command, forked

SHAPE = "--dim 32 --num_layers 2 --num_heads 4 --num_kv_heads 4 --ffn_dim 64".split()
SHORT = "--seq_len 32 --steps 4 --batch_size 4 --eval_tokens 64 --dtype fp32".split()
TUNED = "--seq_len 32 --batch_size 4 --eval_tokens 64 --dtype fp32".split()
SMOL = {"hf:HuggingFaceTB/SmolLM2-135M": "smol"}
MMLU, SHAKESPEARE = (str(SHARED / name) for name in ("mmlu/data", "text/tinyshakespeare"))

# how each command is made small and local: words that are exchanged, and words that are added at the end
CHANGES = {
    "pip install -r requirements.txt && python train.py": ({}, SHAPE + SHORT),
    "pip install -r tests/requirements.txt && pytest": None,  # this is it
    'python sample.py --model out/stdlib --prompt "def fibonacci(n):" "import " --num 2': ({}, ["--seed", "1"]),
    "python sample.py --model out/stdlib --export out/stdlib-hf": ({}, []),
    "python eval.py --model out/stdlib --task perplexity --data data/stdlib": ({}, []),
    "python eval.py --model out/stdlib-hf --task mmlu --data data/mmlu --out out/mmlu.json": (
        {"data/mmlu": MMLU},
        ["--limit", "1", "--subjects", "anatomy"],
    ),
    "python eval.py --model out/stdlib-hf --task choices --data mine.jsonl --out out/mine.json": ({}, []),
    "python eval.py --compare out/mine.json out/mine.json": ({}, []),
    "python eval.py --model out/stdlib --task perplexity --data data/stdlib --checkpoints all --out out/curve.json": (
        {},
        [],
    ),
    "python train.py --plan --size 7B --seq_len 4096 --batch_size 512 --micro_batch 2 --checkpointing selective "
    "--gpus 8": ({}, []),
    "python bench.py --size 15M --peer hf --out out/bench.json": (
        {"15M": "260K"},
        "--seq_len 32 --micro_batch 2 --steps 1 --warmup 0 --repeats 1 --compile off".split(),
    ),
    "python train.py --data data/stdlib:0.7 data/more:0.3 --pack --out out/mix": ({}, SHAPE + SHORT),
    "python data.py --source texts/ more.jsonl.gz --out data/mine --tokenizer train:8192": (
        {"train:8192": "train:400"},
        ["--val_fraction", "0.3"],
    ),
    "python train.py --data data/mine --size 15M --out out/mine": ({}, SHAPE + SHORT),
    "python train.py --resume out/mine": ({}, []),
    "python data.py --source texts/ --out data/more --tokenizer out/stdlib-hf": ({}, ["--val_fraction", "0.3"]),
    "python train.py --data data/more --init_from out/stdlib-hf --out out/tuned": ({}, SHORT),
    "python data.py --source chats.json --template llama2-chat --tokenizer out/stdlib-hf --max_len 256 "
    "--out data/chats": (
        {},
        ["--max_len", "32", "--val_fraction", "0.3", "--near_duplicates", "0"],
    ),
    "python data.py --show data/chats --n 3": ({}, []),
    "python train.py --data data/chats --init_from out/stdlib-hf --learning_rate 2e-3 --out out/chat": ({}, TUNED),
    "python train.py --data data/chats --init_from out/stdlib-hf --lora_rank 16 --out out/lora": ({}, TUNED),
    "python sample.py --model out/lora --export_adapter out/adapter": ({}, []),
    "python data.py --source pairs.jsonl --template llama2-chat --tokenizer out/stdlib-hf --max_len 256 "
    "--out data/pairs": ({}, ["--max_len", "32", "--val_fraction", "0.3"]),
    "python train.py --data data/pairs --init_from out/chat --out out/dpo": ({}, TUNED),
    "python data.py --source chats.json --template chatml-tokens --tokenizer hf:HuggingFaceTB/SmolLM2-135M "
    "--out data/smol": (SMOL, ["--max_len", "32", "--val_fraction", "0.3", "--near_duplicates", "0"]),
    "python train.py --data data/smol --init_from hf:HuggingFaceTB/SmolLM2-135M --lora_rank 16 --out out/smol": (
        SMOL,
        TUNED,
    ),
    "python sample.py --model out/smol --chat": ({}, []),
    "python sample.py --model out/smol --prompts questions.jsonl --out out/answers.jsonl": (
        {},
        ["--max_new_tokens", "3"],
    ),
    "python sample.py --model out/smol --export out/smol-hf": ({}, []),
    "bash recipes/mini.sh": None,  # a test of its own
    "torchrun --standalone --nproc_per_node 8 train.py --data data/mine --size 7B --seq_len 4096 --batch_size 512 "
    "--micro_batch 2 --learning_rate 3e-4 --steps 10000 --out out/7B": ({"8": "2"}, SHAPE + SHORT),
    "python recipes/ablate.py --vary variant=none,variants/relu2.py --seeds 3 --steps 400 --out out/relu2": (
        {"3": "1", "400": "2"},
        ["--", *SHAPE, *TUNED],
    ),
    "python data.py --source tinyshakespeare --out data/shakespeare --tokenizer bytes --val_fraction 0.1 "
    "--val_last": ({"tinyshakespeare": SHAKESPEARE}, []),
    "python train.py --data data/shakespeare --out out/shakespeare --num_layers 4 --dim 128 --num_heads 4 "
    '--ffn_dim 344 --seq_len 64 --batch_size 12 --steps 2000 --learning_rate 2e-3 --sample "ROMEO:"': (
        {},
        ["--steps", "3", "--eval_tokens", "64"],
    ),
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    text = "".join(blocks).replace("\\\n", " ")
    return [
        re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in text.splitlines() if line.split("#")[0].strip()
    ]


def test_every_command_of_the_readme_is_tested():
    assert sorted(readme_commands()) == sorted(CHANGES)


def small_llama(folder, shared):
    """As SmolLM2's folder, but small."""
    import transformers

    from test_family import SMALL, write_tokenizer

    size = len(write_tokenizer("smollm2", folder, shared, 400))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | dict(vocab_size=size))).save_pretrained(folder)


def test_every_command_of_the_readme_works(tmp_path, shared):
    shared("mmlu/data"), shared("text/tinyshakespeare")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("lib", "variants", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "texts").mkdir()
    text = "".join(path.read_text() for path in sorted((ROOT / "tests").glob("*.py")))
    for i in range(60):
        (tmp_path / "texts" / f"{i}.py").write_text(text[i * 2000 : (i + 1) * 2000])
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a record"}\n'))
    (tmp_path / "mine.jsonl").write_text('{"context": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}\n')
    questions = [f"Add 1 and {i}." for i in range(20)]
    chats = [{"instruction": question, "output": str(i + 1)} for i, question in enumerate(questions)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    talk = "\n\nHuman: {}\n\nAssistant: {}"
    pairs = [{"chosen": talk.format(q, "2"), "rejected": talk.format(q, "No.")} for q in questions]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    small_llama(tmp_path / "smol", shared)
    (tmp_path / "questions.jsonl").write_text('{"question": "Add 1 and 1."}\n')
    for line in filter(CHANGES.get, readme_commands()):
        changes, added = CHANGES[line]
        words = [changes.get(word, word) for word in shlex.split(line.split("&& ")[-1])]
        for flag in added[::2]:  # a small setting takes the place of the README's
            if flag in words and added[0] != "--":
                del words[words.index(flag) : words.index(flag) + 2]
        if words[0] == "torchrun":
            start = [sys.executable, "-m", "torch.distributed.run", *words[1:], *added]
            done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True)
        else:
            done = forked([*words[1:], *added], tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "out/stdlib/loss.png").exists() and (tmp_path / "out/mmlu.jsonl").exists()
    again = forked(["train.py", *SHAPE, *SHORT], tmp_path)
    assert "out/stdlib is finished" in again.stdout and "def " in again.stdout


def seconds(*words: str) -> float:
    """The processor time of Python with these words, as other tests run beside it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@functools.cache
def seconds_of_torch() -> float:
    return max(seconds("-c", "import torch") for _ in range(2))


@pytest.mark.parametrize("script", ["data.py", "train.py", "sample.py", "eval.py", "bench.py"])
def test_help_answers_quickly(script):
    """In less than three times what `import torch` takes; data.py, which does without, in less than once."""
    most = seconds_of_torch() * (1 if script == "data.py" else 3)
    assert any(seconds(str(ROOT / script), "--help") < most for _ in range(2))


@pytest.mark.parametrize("script, required, mistyped, meant", [
    ("data.py", [], "--tokeniser", "--tokenizer"),
    ("train.py", [], "--batchsize", "--batch_size"),
    ("sample.py", ["--model", "x"], "--temprature", "--temperature"),
    ("eval.py", ["--model", "x", "--task", "mmlu", "--data", "y"], "--shot", "--shots"),
])  # fmt: skip
def test_help_explains_every_flag_and_a_mistyped_one_gets_a_suggestion(script, required, mistyped, meant):
    flags = re.findall(r"--\w+", command(script, "--help").stdout)
    assert meant in flags and all("-" not in flag[2:] for flag in flags)
    done = command(script, *required, mistyped, "1", check=False)
    assert done.returncode == 2 and meant in done.stderr


SCRIPTS = ["bench", "data", "eval", "model", "sample", "train"]
LIBRARY = sorted(f"lib.{path.stem}" for path in (ROOT / "lib").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", SCRIPTS + LIBRARY)
def test_the_examples_in_docstrings_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
