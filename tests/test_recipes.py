"""The recipes: flags that exist, figures of the forecast, and a Slurm job that comes back by itself."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

import eval
import model
import train
from conftest import ROOT, command, random_model
from data import Tokenizer
from lib import train_flags

RECIPES = ROOT / "recipes"


def command_lines(name: str) -> list[str]:
    """What follows train.py in each command of a recipe, also in its comments."""
    text = re.sub(r" \\\n(# +)?", " ", (RECIPES / name).read_text())
    return [line.partition("train.py ")[2] for line in text.splitlines() if "train.py --" in line]


FINE_TUNING = ["goat7b.sh", "alpaca7b.sh", "vicuna7b.sh", "lima.sh"]
QLORA = ["qlora65b.sh", "qlora70b.sh"]
ONE_CARD = ["lora7b.sh", "qlora7b.sh"]


def parse(words: str) -> train.Config:
    args = shlex.split(words)
    return tyro.cli(train.Config, args=args, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)


@pytest.mark.parametrize("name", ["slurm.sh", "skypilot.yaml", *FINE_TUNING, *QLORA, *ONE_CARD])
def test_a_recipe_uses_flags_that_exist_and_promises_what_the_forecast_says(name):
    lines = command_lines(name)
    for line in lines:
        assert set(re.findall(r"--(\w+)", line)) <= train.Config.__dataclass_fields__.keys()
    planned = [line for line in lines if line.startswith("--plan")]
    assert planned and len(lines) == len(planned) + 1
    for line in planned:
        plan, head = train.plan(parse(line)), (RECIPES / name).read_text()
        for figure in (r"about [\d,]+ tokens/s a GPU", r"[\d.]+ hours", r"[\d.]+ of [\d.]+ GiB"):
            assert re.search(figure, plan)[0] in head
        assert "fits" in plan and "does not fit" not in plan


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_recipe_for_fine_tuning_trains_what_it_forecasts_and_evaluates_it(name):
    planned, trained = sorted(command_lines(name), key=lambda line: not line.startswith("--plan"))
    forecast, config = parse(planned), parse(trained)
    for flag in ("seq_len", "batch_size", "micro_batch", "checkpointing", "reduce_each", "optimizer"):
        assert getattr(forecast, flag) == getattr(config, flag)
    train_flags.check_flags(config, forecast.gpus)
    assert config.epochs and config.dtype == "bf16"
    script = re.sub(r" \\\n +", " ", (RECIPES / name).read_text())
    assert f"--max_len {config.seq_len} " in script and f"recipes/{name}\n" in script
    for task in ("mmlu", "bbh"):
        (words,) = re.findall(rf'torchrun --standalone --nproc_per_node "\$GPUS" eval.py (.* --task {task} .*)', script)
        words = shlex.split(words)
        evaluated = tyro.cli(eval.Config, args=words, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
        assert evaluated.model == (config.out,) and evaluated.protocol == "instructeval"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("name", ONE_CARD)
def test_a_recipe_for_one_card_trains_what_it_forecasts(name):
    script = (RECIPES / name).read_text()
    defaults = dict(re.findall(r"^(\w+)=\$\{\w+:-(.*?)\}", script, re.M))
    (line,) = (line for line in command_lines(name) if not line.startswith("--plan"))
    for variable, value in defaults.items():
        line = line.replace(f'"${variable}"', value)
    trained = parse(line.replace('"${EXTRA_FLAGS[@]}"', ""))
    planned = [parse(line) for line in command_lines(name) if line.startswith("--plan")]
    assert {config.gpu for config in planned} == {"RTX4090-24GB", "A10G-24GB"}
    shape = ("seq_len", "batch_size", "micro_batch", "checkpointing", "optimizer")
    for flag in (*shape, "lora_rank", "lora_dropout", "lora_targets", "quantize"):
        assert {getattr(config, flag) for config in planned} == {getattr(trained, flag)}, flag
    train_flags.check_flags(trained, 1)
    assert trained.epochs == 1 and f"recipes/{name}\n" in script


@pytest.mark.parametrize("name", ONE_CARD)
@pytest.mark.slow
def test_a_recipe_for_one_card_goes_from_chats_to_a_folder_that_answers(name, tiny_data, tmp_path):
    if name == "qlora7b.sh":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes makes NF4")
    for script in ("data.py", "train.py", "sample.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    base = random_model(model.ModelConfig(64, 2, 4, 2, 128, 259, 128))
    model.save(base, tmp_path / "base", Tokenizer(tiny_data))
    chats = [{"instruction": f"Add 1 and {i}.", "output": f"That is {i + 1}."} for i in range(200)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    env = environment(
        tmp_path, MODEL="base", CHATS="chats.json", OUT="run", SEQ_LEN="128", MICRO_BATCH="2",
        EXTRA_FLAGS="--eval_tokens 128 --compile off --log_every 1 --sample=",
    )  # fmt: skip
    done = subprocess.run(["bash", str(RECIPES / name)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "last").exists()
    tuned = dict(model.load(tmp_path / "run-hf").named_parameters())
    assert not torch.equal(tuned["blocks.1.feed_forward.down.weight"], base.blocks[1].feed_forward.down.weight)
    question = ["--prompt", "Add 1 and 1.", "--max_new_tokens", "4", "--temperature", "0"]
    answers = [command("sample.py", "--model", path, *question, cwd=tmp_path).stdout for path in ("run", "run-hf")]
    assert answers[0] == answers[1] and answers[0].startswith("Add 1 and 1.")


def test_the_scripts_of_the_recipes_are_shell():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["resources"]["accelerators"] == "A100-80GB:8"
    assert task["file_mounts"]["/results"]["mode"] == "MOUNT"
    for script in (task["setup"], task["run"], *(path.read_text() for path in RECIPES.glob("*.sh"))):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    folder = re.search(r"uv venv --python 3.11 (\S+)", task["setup"])[1]
    assert f"--python {folder} -r requirements.txt" in task["setup"] and f"source {folder}/bin/activate" in task["run"]


def test_all_papers_are_run_in_turn_but_those_that_are_done(tmp_path):
    """Every command of the table; the python in the way here writes the report that a recipe would write."""
    table = (RECIPES / "README.md").read_text().partition("## Published systems")[0]
    names = re.findall(r"^\|.*?`python recipes/(\w+)\.py", table, re.MULTILINE)
    assert len(names) > 8 and all((RECIPES / f"{name}.py").exists() for name in names)
    (tmp_path / "recipes").mkdir()
    shutil.copy(RECIPES / "papers.sh", tmp_path / "recipes")
    reports = tmp_path / "out" / "papers"
    reports.mkdir(parents=True)
    (reports / "tax.md").write_text("done")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nname=$(basename "$1" .py)\n[ "$name" = "$FAILS" ] && exit 1\necho "ran $name"\n'
                      'echo > "out/papers/$name.md"\n')  # fmt: skip
    python.chmod(0o755)
    words = dict(args=["bash", tmp_path / "recipes" / "papers.sh"], capture_output=True, text=True)
    path = f"{python.parent}:{os.environ['PATH']}"
    ended = subprocess.run(**words, env=os.environ | {"PATH": path, "FAILS": "cabrita"})
    first = re.findall(r"ran (\w+)", ended.stdout)
    assert ended.returncode == 1 and first and "membership" not in first
    again = subprocess.run(**words, env=os.environ | {"PATH": path}, check=True)
    second = re.findall(r"ran (\w+)", again.stdout)
    assert sorted(first + second + ["tax"]) == sorted(names) and second[0] == "cabrita"


@pytest.mark.parametrize("path", [ROOT / "README.md", *RECIPES.glob("*.sh"), RECIPES / "RESULTS.md"])
def test_jobs_on_one_machine_do_not_meet_at_one_port(path):
    for line in re.sub(r" \\\n *", " ", path.read_text()).splitlines():
        if "torchrun" in line and "--nproc_per_node" in line:
            assert "--standalone" in line or "--rdzv_endpoint" in line


STUBS = {  # what Slurm's commands come to on one machine
    "srun": 'echo $$ > srun.pid\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "scancel": 'echo "$@" >> scancel.log\nkill -TERM "$(cat srun.pid)"',
    "scontrol": 'echo "$@" >> scontrol.log',
    "squeue": "echo RUNNING",
    "hostname": "echo localhost",
}


def commands(folder, **more: str) -> None:
    """Stand-ins for Slurm's commands in folder/bin, and more of them."""
    (folder / "bin").mkdir()
    for name, script in (STUBS | more).items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)


def environment(folder, **more: str) -> dict[str, str]:
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": str(job_id()), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | slurm | more


def of_slurm(folder, **given: str) -> tuple[list[str], str]:
    """The words of torchrun, and its environment, when slurm.sh is submitted so."""
    commands(folder, torchrun='printf "%s\\n" "$@" > words\nenv > env')
    subprocess.run(["bash", str(RECIPES / "slurm.sh")], cwd=folder, env=environment(folder, **given), check=True)
    return (folder / "words").read_text().splitlines(), (folder / "env").read_text()


def of_skypilot(folder, **given: str) -> tuple[list[str], str]:
    yaml = pytest.importorskip("yaml")
    commands(folder, torchrun='printf "%s\\n" "$@" > words\nenv > env')
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert given.keys() <= task["envs"].keys()
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}
    env = environment(folder, SKYPILOT_NUM_GPUS_PER_NODE="2", **sky, **task["envs"] | given)
    script = re.sub("source .*activate", "", task["run"])
    subprocess.run(["bash", "-e"], input=script, text=True, cwd=folder, env=env, check=True)
    return (folder / "words").read_text().splitlines(), (folder / "env").read_text()


def of_goat(name: str) -> dict[str, str]:
    """The variables with which a header says that GOAT's run is submitted."""
    text = re.sub(r" \\\n# +", " ", (RECIPES / name).read_text())
    line = next(line for line in text.splitlines() if "INIT_FROM=" in line and line.startswith("# "))
    words = shlex.split(line.removeprefix("#"))
    return dict(word.split("=", 1) for word in words if re.match("[A-Z]", word))


@pytest.mark.parametrize("name, script", [("slurm.sh", of_slurm), ("skypilot.yaml", of_skypilot)])
def test_a_cluster_pretrains_by_default_and_runs_goats_fine_tuning_as_its_recipe_does(name, script, tmp_path):
    (tmp_path / "7B").mkdir(), (tmp_path / "goat").mkdir()
    words, env = script(tmp_path / "7B")
    place = words.index("train.py")
    pretraining, planned = parse(shlex.join(words[place + 1 :])), parse(command_lines(name)[0])
    for flag in ("size", "seq_len", "batch_size", "micro_batch", "steps"):
        assert getattr(pretraining, flag) == getattr(planned, flag)
    assert (pretraining.learning_rate, pretraining.beta2, pretraining.init_from) == (3e-4, 0.95, "")
    assert pretraining.out.endswith("7B") and pretraining.shard_over == 2 and "SOCKET_IFNAME" not in env
    assert words[:2] == ["--nnodes", words[1]] and "--rdzv_endpoint" in words[:place]

    words, env = script(tmp_path / "goat", IFACE="eth7", **of_goat(name))
    submitted = parse(shlex.join(words[words.index("train.py") + 1 :]))
    (line,) = (line for line in command_lines("goat7b.sh") if "--plan" not in line)
    recipe = parse(line.replace("$MODEL", submitted.init_from))
    different = {"out", "data", "shard_over"}
    for flag in train.Config.__dataclass_fields__.keys() - different:
        assert getattr(submitted, flag) == getattr(recipe, flag), flag
    assert Path(submitted.data[0]).name == "goat7b" and Path(submitted.init_from).name == "Llama-2-7b"
    assert "GLOO_SOCKET_IFNAME=eth7" in env and "NCCL_SOCKET_IFNAME=eth7" in env


def job_id() -> int:
    """One whose port is free."""
    for number in range(os.getpid(), os.getpid() + 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20_000 + number % 10_000)):
                return number


def stopped_after(lines: int, words: list[str], folder, env: dict) -> str:
    """What a job says that gets SIGTERM when its log has so many lines."""
    log = folder / "run" / "log.jsonl"
    job = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= lines) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    return job.communicate(timeout=300)[0]


@pytest.mark.slow
def test_the_slurm_job_of_a_fine_tuning_queues_up_until_its_epochs_are_done(tiny_data, tmp_path):
    """Under one process, which tells nothing else apart."""
    commands(tmp_path, torchrun='while [[ $1 != train.py ]]; do shift; done\nexec python "$@"')
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    model.save(random_model(model.ModelConfig(32, 2, 4, 2, 64, 259, 32)), tmp_path / "base", Tokenizer(tiny_data))
    env = environment(
        tmp_path, DATA=str(tiny_data), OUT="run", INIT_FROM="base", EPOCHS="0.5", BATCH_SIZE="4",
        SLURM_GPUS_ON_NODE="1", EXTRA_FLAGS="--eval_tokens 512 --log_every 1 --dtype fp32 --sample=",
    )  # fmt: skip
    words = ["bash", str(RECIPES / "slurm.sh")]
    assert "SIGTERM: stopped after step" in stopped_after(4, words, tmp_path, env)
    queued = f"requeue {env['SLURM_JOB_ID']}\n"
    assert (tmp_path / "scontrol.log").read_text() == queued
    for said in ("continuing run after step", "run is finished"):
        again = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0 and said in again.stdout, again.stdout + again.stderr
    assert (tmp_path / "scontrol.log").read_text() == queued
    epochs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-1]
    assert epochs["step"] == int((tmp_path / "run" / "last").read_text()[5:]) > 200


@pytest.mark.slow
def test_the_slurm_job_saves_on_sigterm_queues_up_again_and_goes_on_to_its_end(tiny_data, tmp_path):
    commands(tmp_path)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    shape = "--dim 32 --num_layers 2 --num_heads 4 --num_kv_heads 2 --ffn_dim 64"
    env = environment(
        tmp_path, DATA=str(tiny_data), OUT="run", SIZE="260K", SEQ_LEN="32", BATCH_SIZE="4", MICRO_BATCH="2",
        STEPS="400", EXTRA_FLAGS=f"{shape} --eval_tokens 512 --log_every 1 --dtype fp32 --sample=",
    )  # fmt: skip
    job, words, log = env["SLURM_JOB_ID"], ["bash", str(RECIPES / "slurm.sh")], tmp_path / "run" / "log.jsonl"

    output = stopped_after(4, words, tmp_path, env)
    saved = (tmp_path / "run" / "last").read_text()
    assert "SIGTERM: stopped after step" in output and "step_00000000" < saved < "step_00000400"
    assert (tmp_path / "scancel.log").read_text() == f"--signal=TERM {job}\n"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"

    again = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"continuing run after step {int(saved[5:])}" in again.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if "tokens_per_s" in line]
    assert steps == list(range(1, 401)) and (tmp_path / "run" / "last").read_text() == "step_00000400"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {job}\n"
