"""What befalls a run from outside: two at once, a full disk, files that somebody changed, flags out of range."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import train
from conftest import ROOT, TINY_RUN, command, flags, run_ranks
from data import Dataset, Mixture, Tokenizer, mixture_weights
from eval import PROTOCOLS, World, evaluate
from eval import Config as EvalConfig
from lib import files, opening, saving, shards, train_flags
from lib.curves import draw_runs
from lib.datasets import HASHES, changed_file
from lib.runs import find_template, held, read_log
from lib.shards import ShardWriter
from lib.tensors import unwrapped
from lib.world import join_world
from model import IGNORE, Transformer
from test_chat import chat_set, talk
from test_scale import no_limit, poisoned_run, train_here  # noqa: F401
from test_train import CPU, log, same_bits, world  # noqa: F401
from train import Config, learning_rate


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- whose folder it is ----


def test_a_folder_with_somebody_elses_run_json_is_left_alone(tiny_run, tmp_path):
    (tmp_path / "o").mkdir()
    for name in ("run.json", "log.jsonl", "loss.png", "thesis.txt"):
        (tmp_path / "o" / name).write_text('{"my": "file"}')
    before = contents(tmp_path / "o")
    with pytest.raises(ValueError, match="--out o holds other files; choose another folder"):
        tiny_run("o", steps=1)
    assert contents(tmp_path / "o") == before


def refused(folder: Path, options: dict):
    os.chdir(folder)
    with pytest.raises(ValueError, match="run: another process is working on this run right now"):
        train.main(Config(**options))


def test_a_second_run_in_a_folder_is_refused_on_every_process_and_changes_nothing(tiny_run, tiny_data, tmp_path):
    run = tiny_run(steps=4, stop_at=2)
    before = contents(run)
    with held(run):
        with pytest.raises(ValueError, match="run: another process is working on this run right now"):
            tiny_run(steps=4)
        run_ranks(2, refused, tmp_path, TINY_RUN | {"data": (str(tiny_data),), "steps": 4, "out": "run"})
        assert contents(run) == before
    assert log(tiny_run(steps=4), "step")[-1] == 4


def test_a_run_holds_the_lock_of_its_folder_from_before_it_writes_until_its_end(tiny_run, tmp_path, monkeypatch):
    seen = []

    def watched(original):
        def call(*args, **kwargs):
            seen.append(files.lock(tmp_path / "run") is None)
            return original(*args, **kwargs)

        return call

    for place, name in ((opening, "choose_run"), (train, "prepare_folder"), (train, "evaluate")):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    tiny_run(steps=1)
    assert len(seen) >= 3 and all(seen)
    os.close(files.lock(tmp_path / "run"))


def test_the_workers_of_a_killed_torchrun_end_and_the_same_run_goes_on(tiny_data, tmp_path):
    """Without an end of their own they would train on for hours."""
    options = TINY_RUN | {"steps": 10**6, "save_every": 10, "eval_every": 10**6, "log_every": 10, "micro_batch": 2}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(ROOT / "train.py"), *flags(options | {"data": tiny_data, "out": "run"})]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(words, cwd=tmp_path, env=one_thread, stdout=subprocess.PIPE, text=True)
    for line in torchrun.stdout:
        if line.startswith("step 10/"):
            break
    workers = children(torchrun.pid)
    torchrun.kill()
    torchrun.wait()
    started = time.monotonic()
    while alive(workers) and time.monotonic() < started + 60:
        time.sleep(0.1)
    left = alive(workers)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left
    last = int((tmp_path / "run" / "last").read_text()[5:])
    here = options | {"data": (str(tiny_data),), "stop_at": last + 10}
    run_ranks(2, train_here, tmp_path, here | {"out": "run"})
    run_ranks(2, train_here, tmp_path, here | {"out": "straight"})
    assert same_bits(tmp_path / "run", tmp_path / "straight")
    assert log(tmp_path / "run", "step") == log(tmp_path / "straight", "step")


def children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [map(int, line.split()) for line in listed.splitlines()]
    return [pid for pid, above in pairs if above == parent]


def alive(processes: list[int]) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout
    running = {int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")}
    return [pid for pid in processes if pid in running]


# ---- run.json ----


@pytest.fixture
def edited(tiny_run, tmp_path):
    """A function that begins a run, changes a field of its run.json, and gives the run's folder."""
    shutil.copytree(tiny_run("whole", steps=2, stop_at=1), tmp_path / "run")

    def change(*keys: str, **fields) -> Path:
        path = tmp_path / "run" / "run.json"
        record = json.loads((tmp_path / "whole" / "run.json").read_text())
        part = record
        for key in keys:
            part = part[key]
        part |= fields
        path.write_text(json.dumps(record))
        return tmp_path / "run"

    return change


@pytest.mark.parametrize("keys, fields, message", [
    (["config"], {"steps": None}, "run/run.json, config: field steps: Expected int, got null"),
    (["config"], {"flux": 1}, "run/run.json, config: field flux is unknown to this version; a newer one made the run"),
    (["config"], {"compile": "perhaps"}, "run/run.json, config: field compile: "),
    ([], {"dataset": [5]}, r"run/run.json: field dataset\[0\]: Expected object, got int"),
    ([], {"model": []}, "run/run.json: field model: Expected object, got array"),
    (["model"], {"dim": "32"}, "run/run.json, model: field dim: Expected int, got str"),
    (["model"], {"experts": 8}, "run/run.json, model: field experts is unknown"),
    ([], {"init_from": 7}, "run/run.json: field init_from: Expected str, got int"),
])  # fmt: skip
def test_a_run_json_that_was_edited_is_one_sentence_naming_its_field(keys, fields, message, edited, tiny_run):
    edited(*keys, **fields)
    with pytest.raises(ValueError, match=message):
        tiny_run(resume="run", stop_at=0)


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_newer_flags(edited, tiny_run, tmp_path):
    record = json.loads((edited() / "run.json").read_text())
    del record["config"]["z_loss"], record["model"]["rope_scale"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds a run with --z_loss 0.0, not 0.5"):
        tiny_run("run", steps=2, z_loss=0.5)
    tiny_run("run", steps=2)
    assert same_bits(tmp_path / "run", tiny_run("whole", steps=2))


def test_an_edited_run_json_is_one_sentence_where_a_template_or_curves_are_asked_for(edited, tmp_path):
    run = edited(dataset=[{"template": 5}])
    for path in (run, run / "step_00000001"):
        with pytest.raises(ValueError, match=r"run/run.json: field dataset\[0\].template: Expected str, got int"):
            find_template(str(path))
    edited(dataset=[{"template": "plain"}])
    assert find_template(str(run / "step_00000001")) == "plain"
    edited("config", batch_size="many")
    with pytest.raises(ValueError, match="run/run.json: field config.batch_size: Expected int, got str"):
        config = EvalConfig(model=(str(run),), out=str(tmp_path / "c.json"), checkpoints="all")
        draw_runs(config, World(), evaluate, PROTOCOLS)
    (tmp_path / "run.json").write_text("[]")  # somebody else's, in the folder above a model's
    (tmp_path / "model").mkdir()
    assert find_template(str(tmp_path / "model")) == ""


# ---- log.jsonl ----

BROKEN = [
    b'{"step": 2, "lo', b'{"step": 2, "epochs": {"ds": 0.1}', b'{"loss": 1.0}', b'{"step": "two"}', b"\xff\xfe}", b"5",
    b"[" * 100_000, b'{"step": 2, "loss": %s}' % (b"9" * 5000), b'{"step": 2, "loss": "low"}',
]  # fmt: skip


def test_broken_lines_of_a_log_are_dropped_when_a_run_goes_on(tiny_run):
    straight = tiny_run("straight", steps=4)
    run = tiny_run("run", steps=4, stop_at=2)
    lines = (run / "log.jsonl").read_bytes().splitlines()
    (run / "log.jsonl").write_bytes(b"\n".join([lines[0], *BROKEN, *lines[1:], BROKEN[1]]))
    tiny_run(resume="run", stop_at=0)
    assert same_bits(run, straight) and log(run, "loss") == log(straight, "loss")


def test_a_disk_that_is_full_for_a_moment_costs_a_checkpoint_and_a_line(tiny_run, monkeypatch, capsys, no_limit):  # noqa: F811
    """A line of step 6 is written by half; from step 7 on there is room again."""
    straight = tiny_run("straight", steps=12, save_every=3)

    def rate(step: int, config: Config) -> float:
        room = (Path(config.out) / "log.jsonl").stat().st_size + 100 if step == 5 else no_limit[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, no_limit[1]))
        return learning_rate(step, config)

    def begin_and_wait(self, *what):  # so that it is written while there is no room
        begin(self, *what)
        self.saving[1].exception()

    begin = train.Checkpoints.begin
    monkeypatch.setattr(train.Checkpoints, "begin", begin_and_wait)
    monkeypatch.setattr(train, "learning_rate", rate)
    run = tiny_run("run", steps=12, save_every=3, stop_at=9)
    said = capsys.readouterr()
    assert "log.jsonl: step 6 is missing (File too large)" in said.err and "no checkpoint of step 6" in said.out
    assert [row["step"] for row in read_log(run / "log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 7, 8, 9]
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    tiny_run(resume="run", stop_at=0)
    assert same_bits(run, straight) and log(run, "loss")[-5:] == log(straight, "loss")[-5:]


def test_a_full_disk_when_the_log_is_begun_anew_does_not_end_a_run(tiny_run, monkeypatch, capsys):
    run = tiny_run(steps=4, stop_at=2)
    before = (run / "log.jsonl").read_text()

    def full(path: Path, text: str):
        if path.name != "last":
            raise OSError(28, "No space left on device", str(path))
        files.write_whole(path, text)

    monkeypatch.setattr("lib.report.write_whole", full)
    monkeypatch.setattr(Tokenizer, "save", lambda self, folder: 1 / 0)  # it would leave half of the one there
    tiny_run(resume="run", stop_at=0)
    assert "log.jsonl: what follows step 2 is still there (No space left on device)" in capsys.readouterr().err
    assert (run / "log.jsonl").read_text().startswith(before) and log(run, "step")[-1] == 4


def test_a_tokenizer_that_was_deleted_from_a_run_comes_back_when_it_goes_on(tiny_run):
    run = tiny_run(steps=2, stop_at=1)
    (run / "tokenizer.bytes").unlink()
    assert (tiny_run(resume="run", stop_at=0) / "tokenizer.bytes").exists()


def test_a_checkpoint_under_way_is_finished_when_a_run_ends_with_an_error(tiny_data, tmp_path, monkeypatch):
    """Its writing waits until somebody asks for it."""
    monkeypatch.setattr(Transformer, "loss", Transformer.loss)
    asked, save = threading.Event(), saving.dcp.save
    begin, finish = train.Checkpoints.begin, train.Checkpoints.finish

    def slowly(*args, **kwargs):
        asked.wait(5)
        save(*args, **kwargs)

    monkeypatch.setattr(saving.dcp, "save", slowly)
    monkeypatch.setattr(train.Checkpoints, "begin", lambda self, *what: asked.clear() or begin(self, *what))
    monkeypatch.setattr(train.Checkpoints, "finish", lambda self: asked.set() or finish(self))
    options = TINY_RUN | {"data": (str(tiny_data),), "out": "run", "steps": 40, "max_bad_steps": 4, "micro_batch": 2}
    with pytest.raises(ValueError, match="4 steps in a row up to 12"):
        poisoned_run(tmp_path, options | {"save_every": 5, "log_every": 50}, [0], range(9, 40), 0, float("inf"))
    assert (tmp_path / "run" / "last").read_text() == "step_00000010"
    assert not list((tmp_path / "run").glob("*.tmp"))


# ---- data ----


def flipped(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train_00000.bin", "val_00000.bin", "train_00000.mask"])
def test_a_data_file_that_was_changed_is_refused_when_a_run_begins_or_goes_on(name, tiny_run, tmp_path):
    folder = Path(chat_set(tmp_path, [talk(i, 10) for i in range(60)], 64, val_fraction=0.2))
    options = {"data": str(folder), "seq_len": 64, "steps": 2}
    run = tiny_run(**options, stop_at=1)
    flipped(folder / name)
    for out in ("new", "run"):
        with pytest.raises(ValueError, match=rf"{name} has SHA-256 .*…, meta.json says .*…; prepare the dataset again"):
            tiny_run(out, **options)
    assert not (tmp_path / "new").exists() and log(run, "step")[-1] == 1


def test_masks_and_bounds_have_their_hashes_in_meta_json_over_several_writes_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    writer = ShardWriter(tmp_path, np.dtype("<u2"))
    for first in range(4):
        writer.write("train", np.arange(first, first + 6), 2, 9, np.arange(6) % 2, [2, 4])
    entries = writer.splits()["train"]["files"]
    assert [entry["tokens"] for entry in entries] == [12, 12]
    for entry in entries:
        path = tmp_path / entry["file"]
        for suffix, name in HASHES.items():
            assert entry[name] == files.sha256(path.with_suffix(suffix))
        assert np.fromfile(path.with_suffix(".bounds"), "<u8").tolist() == [0, 2, 6, 8, 12]


def check_files(folder: str):
    join_world()
    with pytest.raises(ValueError, match="train_00000.bin has SHA-256"):
        opening.check_files([(Path(folder), Mixture((folder,), "train", 32).parts[0].meta)])


def test_processes_share_the_reading_of_the_data_and_all_learn_what_is_wrong(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "ds")
    flipped(tmp_path / "ds" / "train_00000.bin")
    meta = json.loads((tmp_path / "ds" / "meta.json").read_text())
    found = [changed_file([(tmp_path / "ds", meta)], rank, 2) for rank in range(2)]
    assert "train_00000.bin has SHA-256" in found[0] and found[1] == ""
    run_ranks(2, check_files, str(tmp_path / "ds"))


def test_bounds_that_do_not_rise_from_0_to_the_end_are_refused(tmp_path):
    folder = Path(chat_set(tmp_path, [talk(i, 10) for i in range(40)], 64, val_fraction=0.2))
    path = folder / "train_00000.bounds"
    whole = np.fromfile(path, "<u8")
    huge = whole.copy()
    huge[1] = 2**63 + 1
    for bounds in (whole[::-1], whole * 0, whole + 1, np.append(whole[:-1], whole[-1] - 1), huge):
        bounds.astype("<u8").tofile(path)
        with pytest.raises(ValueError, match=f"train_00000.bounds must rise from 0 to the {whole[-1]} tokens of its"):
            Dataset(folder, "train", 64)


def test_a_data_file_that_is_cut_while_it_is_read_is_one_sentence(tiny_data, tmp_path):
    """Read in a process of its own, which the system would end."""
    shutil.copytree(tiny_data, tmp_path / "ds")
    shutil.move(chat_set(tmp_path, [talk(i, 10) for i in range(60)], 64, val_fraction=0.2), tmp_path / "chats")
    code = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from data import Dataset
for data, suffix in (Dataset("ds", "train", 32), ".bin"), (Dataset("chats", "train", 64), ".mask"):
    data.batch([0])
    os.truncate(data.folder + "/train_00000" + suffix, 10)
    try:
        data.batch([len(data) - 1])
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    size = (tiny_data / "train_00000.bin").stat().st_size
    assert done.returncode == 0, done.returncode
    assert f"train_00000.bin has 10 bytes, {size} when it was opened; it was cut" in done.stdout
    assert "train_00000.mask has 10 bytes" in done.stdout


def test_the_same_folder_twice_and_no_folder_are_refused(tiny_run, tiny_data, tmp_path):
    (tmp_path / "link").symlink_to(tiny_data)
    for other in (tiny_data, f"{tiny_data}/", tmp_path / "link", f"{tiny_data}:3"):
        with pytest.raises(ValueError, match=f"--data .* names {tiny_data} twice"):
            tiny_run(data=(str(tiny_data), str(other)))
    with pytest.raises(ValueError, match="--data names no folder"):
        mixture_weights(())
    done = command("train.py", "--data", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("train.py: --data names no folder; it takes one or more")


# ---- what a run counts ----


def constant_loss(bos: int):
    """A model for which every target costs one nat, but for BOS, which costs none: packed rows have no such target."""

    def loss(tokens, targets, documents=None):
        targets = unwrapped(targets)
        return ((targets != IGNORE) & (targets != bos)).sum().float()

    return types.SimpleNamespace(loss=loss, config=None)


@pytest.mark.parametrize("bos", [256, 257])
def test_packed_rows_and_windows_agree_in_bits_a_byte(bos, tiny_data, tmp_path, world, monkeypatch):  # noqa: F811
    """Also where BOS and EOS are one token; a window here reaches over the whole split, to its last token."""
    folder = tmp_path / "ds"
    shutil.copytree(tiny_data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.fromfile(folder / "val_00000.bin", meta["dtype"])
    np.where(tokens == 256, bos, tokens).astype(meta["dtype"]).tofile(folder / "val_00000.bin")
    (folder / "meta.json").write_text(json.dumps(meta | {"bos": bos}))
    tokenizer = types.SimpleNamespace(bos_id=bos, eos_id=257, vocab_size=258, sha256=meta["tokenizer"]["sha256"])
    monkeypatch.setattr("lib.meta.Tokenizer", lambda folder: tokenizer)
    split, documents = meta["splits"]["val"], meta["splits"]["val"]["documents"]
    whole = len(tokens) - 1
    windows = Mixture((str(folder),), "val", whole)
    assert len(windows) == 1 and windows.parts[0].bytes_per_target == split["bytes"] / whole
    for seq_len in (32, 600):  # documents cut at the end of a row, and whole ones
        packed = Mixture((str(folder),), "val", seq_len, packed=True)
        targets = sum((packed.parts[0].batch([i]).targets != IGNORE).sum() for i in range(len(packed)))
        assert targets == len(tokens) - documents
        config = Config(seq_len=seq_len, eval_tokens=10**7, batch_size=4)
        scores = train.evaluate(constant_loss(256 if bos == 256 else -1), packed, config, CPU)
        nats = scores["val_loss"] * targets
        assert scores["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / split["bytes"], rel=1e-9)
    if bos == 256:
        config = Config(seq_len=whole, eval_tokens=10**7, batch_size=1)
        other = train.evaluate(constant_loss(bos), windows, config, CPU)
        assert other["val_bits_per_byte"] == pytest.approx(scores["val_bits_per_byte"], rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_the_last_step_has_the_final_learning_rate(schedule, steps):
    for final_lr in (0.0, 0.1):
        config = Config(steps=steps, learning_rate=0.5, schedule=schedule, final_lr=final_lr, decay=0.3)
        rates = [learning_rate(step, config) for step in range(steps)]
        peak = rates.index(max(rates))
        assert rates[-1] == 0.5 * final_lr and rates[peak:] == sorted(rates[peak:], reverse=True)
        if schedule == "linear" and steps > 2:
            assert rates[-2] - rates[-1] == pytest.approx(rates[-3] - rates[-2])


@pytest.mark.parametrize("name", ["learning_rate", "lora_alpha", "dpo_beta"])
def test_a_flag_that_is_infinite_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name} inf must be a finite number"):
        train_flags.check_flags(Config(**{name: math.inf}), 1)
