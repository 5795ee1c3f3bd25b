"""The recipes: flags that exist, figures of the forecast, and a Slurm job that comes back by itself."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import eval
import train
from conftest import ROOT
from lib import train_flags

RECIPES = ROOT / "recipes"


def command_lines(name: str) -> list[str]:
    """What follows train.py in each command of a recipe, also in its comments."""
    text = re.sub(r" \\\n(# +)?", " ", (RECIPES / name).read_text())
    return [line.partition("train.py ")[2] for line in text.splitlines() if "train.py --" in line]


FINE_TUNING = ["goat7b.sh", "alpaca7b.sh", "vicuna7b.sh", "lima.sh"]
QLORA = ["qlora65b.sh", "qlora70b.sh"]


def parse(words: str) -> train.Config:
    args = shlex.split(words)
    return tyro.cli(train.Config, args=args, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)


@pytest.mark.parametrize("name", ["slurm.sh", "skypilot.yaml", *FINE_TUNING, *QLORA])
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
        (words,) = re.findall(rf"eval.py (.* --task {task} .*)", script)
        words = shlex.split(words)
        evaluated = tyro.cli(eval.Config, args=words, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
        assert evaluated.model == (config.out,) and evaluated.protocol == "instructeval"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_scripts_of_the_recipes_are_shell():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] and task["resources"]["accelerators"] == "A100-80GB:8"
    assert task["file_mounts"]["/results"]["mode"] == "MOUNT"
    for script in (task["setup"], task["run"], *(path.read_text() for path in RECIPES.glob("*.sh"))):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


STUBS = {  # what Slurm's commands come to on one machine
    "srun": 'echo $$ > srun.pid\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "scancel": 'echo "$@" >> scancel.log\nkill -TERM "$(cat srun.pid)"',
    "scontrol": 'echo "$@" >> scontrol.log',
    "squeue": "echo RUNNING",
    "hostname": "echo localhost",
}


def job_id() -> int:
    """One whose port is free."""
    for number in range(os.getpid(), os.getpid() + 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20_000 + number % 10_000)):
                return number


def test_the_slurm_job_saves_on_sigterm_queues_up_again_and_goes_on_to_its_end(tiny_data, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    job = str(job_id())
    shape = "--dim 32 --num_layers 2 --num_heads 4 --num_kv_heads 2 --ffn_dim 64"
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",  # two processes wait for each other
        "SLURM_JOB_ID": job, "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "DATA": str(tiny_data), "OUT": "run", "SIZE": "260K", "SEQ_LEN": "32", "BATCH_SIZE": "4", "MICRO_BATCH": "2",
        "STEPS": "400", "EXTRA_FLAGS": f"{shape} --eval_tokens 512 --log_every 1 --dtype fp32 --sample=",
    }  # fmt: skip
    words, log = ["bash", str(RECIPES / "slurm.sh")], tmp_path / "run" / "log.jsonl"

    first = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=300)[0]
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
