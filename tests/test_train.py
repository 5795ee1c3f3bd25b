"""Training: the law of the batch, exact resumption, precision, checkpoints, and what a run says of itself."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import train
from conftest import ROOT, TINY_RUN, byte_data, checkpoints_of, command, flags, prepare, torchrun
from data import Dataset
from lib import planning
from lib.checkpoints import checkpoint_folder
from lib.world import join_world, should_compile
from model import IGNORE, SIZES, Transformer, load, save
from ranks import CONFIG, one_step
from train import Config, learning_rate


def read_checkpoint(run) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and both moments."""
    reader = dcp.FileSystemReader(checkpoint_folder(run))
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def log(run, name: str) -> list:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def same_bits(a, b) -> bool:
    mine, theirs = read_checkpoint(a), read_checkpoint(b)
    assert sum("exp_avg" in name for name in mine) > 10
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- exactness ----


def test_any_split_into_resumed_runs_is_the_straight_run_bit_for_bit(tiny_run, tmp_path, monkeypatch):
    """Traps 20 and 22, across the end of an epoch and with two micro-batches a step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    data = byte_data(tmp_path, 30)
    options = dict(data=str(data), steps=30, batch_size=12, micro_batch=6)
    assert len(Dataset(data, "train", 32)) < 30 * 12
    straight = tiny_run("straight", **options)
    for cuts in ((15,), (7, 23)):
        name = f"cut{len(cuts)}"
        run = tiny_run(name, **options, stop_at=cuts[0])
        for stop in (*cuts[1:], 0):
            tiny_run(resume=name, stop_at=stop)
        assert same_bits(run, straight)
        for field in ("step", "loss", "grad_norm", "lr", "val_loss"):
            assert log(run, field) == log(straight, field)
    torch.set_num_threads(threads)


def test_the_same_command_again_continues_an_interrupted_run_and_leaves_a_finished_one(tiny_run, capsys):
    straight = tiny_run("straight", steps=12)
    run = tiny_run("run", steps=12, stop_at=5)
    tiny_run("run", steps=12)
    assert "continuing run after step 5" in capsys.readouterr().out and same_bits(run, straight)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.distcp")}
    tiny_run("run", steps=12)
    assert "run is finished; to train again, delete it or choose another --out" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.distcp")} and log(run, "step")[-1] == 12


def test_lines_logged_after_the_last_checkpoint_are_dropped_on_resuming(tiny_run):
    run = tiny_run(steps=12, stop_at=5)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0}) + "\n")
    tiny_run(resume="run", stop_at=0)
    assert [step for step in log(run, "loss")] and 0.0 not in log(run, "loss") and len(log(run, "loss")) == 12


@pytest.fixture(scope="module")
def alone_and_in_company(tiny_data, tmp_path_factory):
    """The same 12 steps on 1 and 4 processes; what 2 saved after step 6 is continued on 1."""
    folder = tmp_path_factory.mktemp("world")
    options = TINY_RUN | {
        "data": tiny_data,
        "steps": 12,
        "batch_size": 8,
        "eval_tokens": 1100,
    }  # 34 windows, uneven over 4
    command("train.py", *flags(options | {"out": "one"}), cwd=folder)
    torchrun(4, "train.py", *flags(options | {"out": "four"}), cwd=folder)
    torchrun(2, "train.py", *flags(options | {"out": "two_one", "stop_at": 6}), cwd=folder)
    command("train.py", "--resume", "two_one", "--stop_at", "12", cwd=folder)
    return folder


@pytest.mark.parametrize("other", ["four", "two_one"])
def test_any_number_of_processes_gives_the_same_losses_and_norms(other, alone_and_in_company):
    """Traps 13, 15 and 21, and the fixed validation set."""
    one, other = alone_and_in_company / "one", alone_and_in_company / other
    assert log(other, "step") == log(one, "step")
    for field in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert log(other, field) == pytest.approx(log(one, field), rel=1e-5)
    mine, theirs = read_checkpoint(one), read_checkpoint(other)
    for name in mine:
        if name.startswith("model."):
            torch.testing.assert_close(theirs[name], mine[name], atol=2e-4, rtol=1e-3)


def test_gradients_do_not_depend_on_how_a_step_is_divided(tmp_path):
    """Traps 1, 13 and 17: rows with 0 to 16 targets; one pass, two, eight, and two ranks with one pass or four."""
    whole = one_step(8)
    targets = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(1))
    model = Transformer(CONFIG)
    model.init_weights()
    counts = (16, 1, 0, 9, 2, 16, 1, 0)
    losses = [
        model.loss(
            targets[i : i + 1, :-1],
            targets[i : i + 1, 1:].clone().index_fill_(1, torch.arange(n, 16), IGNORE),
        )
        for i, n in enumerate(counts)
    ]
    torch.testing.assert_close(whole["loss"], sum(losses) / sum(counts))
    divided = [one_step(4), one_step(1)]
    for micro_batch in (4, 1):
        torchrun(2, "tests/ranks.py", str(tmp_path / f"{micro_batch}.pt"), str(micro_batch))
        divided.append(torch.load(tmp_path / f"{micro_batch}.pt", weights_only=True))
    for other in divided:
        for name in whole:
            torch.testing.assert_close(
                other[name], whole[name], atol=1e-6, rtol=1e-5, msg=lambda text: f"{name}: {text}"
            )


def test_evaluating_and_saving_do_not_touch_the_training(tiny_run):
    assert same_bits(
        tiny_run("a", steps=10, eval_every=1, save_every=1, micro_batch=2), tiny_run("b", steps=10, micro_batch=2)
    )


def test_the_validation_loss_does_not_depend_on_the_batch(tiny_run):
    scores = [
        log(tiny_run(f"b{size}", steps=1, batch_size=4, micro_batch=size, eval_tokens=1100), "val_loss")
        for size in (1, 2, 4)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6) and scores[0] == pytest.approx(scores[2], rel=1e-6)


# ---- precision ----


@pytest.fixture
def world():
    yield join_world()
    dist.destroy_process_group()


CPU = torch.device("cpu")


def build(dtype="fp32", compiled=False, **flags) -> Transformer:
    model = train.build(CONFIG, Config(dtype=dtype, compile="on" if compiled else "off", **flags), CPU)
    model.init_weights(0)
    return model


def micro_batch(tokens: torch.Tensor) -> train.Batch:
    return train.Batch(tokens[:, :-1], tokens[:, 1:], None)


def rows(count: int = 4, length: int = 33) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def test_weights_gradients_and_moments_are_fp32_under_bf16_arithmetic(world, monkeypatch):
    """Traps 14 and 18: every weight moves at a small learning rate; no rotary table is rounded on its way in."""
    import model as module

    seen = []
    original = module.rotate
    monkeypatch.setattr(module, "rotate", lambda x, rope: seen.append((x.dtype, rope[0].dtype)) or original(x, rope))
    model = build("bf16")
    optimizers = train.make_optimizers(model, Config())
    before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    loss = model(rows()[:, :-1], rows()[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and {p.grad.dtype for p in model.parameters()} == {torch.float32}
    model.zero_grad()
    for _ in range(20):
        train.train_step(model, optimizers, [micro_batch(rows())], 2e-5, Config(), train.Guard(6.0, CPU))
    model.set_requires_gradient_sync(False)
    model(rows()[:, :-1], rows()[:, 1:]).backward()
    model.set_requires_gradient_sync(True)
    model(rows()[:, :-1], rows()[:, :-1]).backward()
    sums = [p.grad.to_local() for p in model.parameters()]
    assert any((grad != grad.bfloat16().float()).any() for grad in sums)  # of two micro-batches, in fp32
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for state in optimizers[0].state.values() for value in state.values()} == {torch.float32}
    moved = sum((p.detach().full_tensor() != before[name]).sum().item() for name, p in model.named_parameters())
    assert moved > 0.99 * sum(p.numel() for p in before.values())


def test_bf16_training_follows_fp32_training(tiny_run):
    exact, rounded = (log(tiny_run(dtype, steps=12, dtype=dtype), "loss") for dtype in ("fp32", "bf16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_clipped_to_the_norm_asked_for(optimizer, world):
    """The first moments after a step hold the gradients that the optimizers got, whatever their way of clipping."""

    def moments(grad_clip: float) -> tuple[list[torch.Tensor], float]:
        config = Config(optimizer=optimizer, grad_clip=grad_clip)
        model = build()
        optimizers = train.make_optimizers(model, config)
        outcome = train.train_step(model, optimizers, [micro_batch(rows())], 1e-3, config, train.Guard(6.0, CPU))
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        return [state.get("exp_avg", state.get("momentum_buffer")).full_tensor() for state in states], outcome.norm

    whole, norm = moments(1e9)
    for limit, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
        clipped, same_norm = moments(float(limit))
        assert same_norm == norm and len(clipped) == len(whole)
        for mine, full in zip(clipped, whole):
            assert torch.allclose(mine, factor * full, rtol=1e-4, atol=1e-9) and full.any()


def test_only_matrices_decay(world):
    model = Transformer(CONFIG)
    decays = {
        id(p): group["weight_decay"]
        for group in train.make_optimizers(model, Config(weight_decay=0.3))[0].param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if "norm" in name else 0.3)


def test_a_compiled_model_keeps_its_names(world):
    """Trap 25."""
    plain = Transformer(CONFIG).state_dict().keys()
    assert build(compiled=True, checkpointing="full").state_dict().keys() == plain


@pytest.mark.slow
def test_compiled_training_follows_eager_training(tiny_run):
    eager, compiled = (log(tiny_run(choice, steps=8, compile=choice), "loss") for choice in ("off", "on"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    config = Config(steps=100, learning_rate=1.0, warmup=9, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:9] == pytest.approx([0.1 * (step + 1) for step in range(9)]) and rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(100, config) == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.55, abs=0.02)
    assert rates == [learning_rate(step, dataclasses.replace(config, warmup=0.09)) for step in range(100)]
    assert learning_rate(0, dataclasses.replace(config, warmup=0)) == 1.0


# ---- checkpoints ----


def test_the_newest_checkpoints_are_kept(tiny_run):
    run = tiny_run(steps=9, save_every=2, keep=3)
    assert sorted(path.name for path in run.glob("step_*")) == ["step_00000006", "step_00000008", "step_00000009"]
    assert (run / "last").read_text() == "step_00000009"


def test_a_run_its_checkpoint_and_an_exported_folder_are_one_model(tiny_run, tmp_path):
    from data import Tokenizer

    run = tiny_run(steps=3, num_heads=4)
    model = load(run)
    assert torch.equal(load(run / "step_00000003").norm.weight, model.norm.weight)
    save(model, tmp_path / "folder", Tokenizer(run))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    tokens = torch.randint(258, (2, 32))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    assert theirs.config.bos_token_id == 256 and (tmp_path / "folder" / "tokenizer.bytes").exists()


@pytest.mark.parametrize("source", ["run", "folder"])
def test_training_can_start_from_any_model_that_load_reads(source, tiny_run, tiny_data, tmp_path):
    """Trap 22: only weights come along; step, moments and schedule begin anew."""
    run = tiny_run(steps=10)
    if source == "folder":
        save(load(run), tmp_path / "folder")
    next_run = tiny_run("next", init_from=str(tmp_path / source), steps=5, learning_rate=1e-3)
    assert log(next_run, "step")[:2] == [0, 1] and log(next_run, "lr")[0] == pytest.approx(
        learning_rate(0, Config(steps=5, learning_rate=1e-3))
    )
    assert log(next_run, "loss")[0] < log(run, "loss")[0] - 0.5
    state = read_checkpoint(next_run)
    assert {int(value) for name, value in state.items() if name.endswith(".step")} == {5}


class Disk:
    """Remembers the order in which files are synced and named, and what was in them then."""

    def __init__(self, monkeypatch):
        self.synced = {}  # inode: the file's size and time of change
        self.named = []   # new name, and which files were not synced when it was given
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def sync(handle):
            fsync(handle)
            found = os.fstat(handle)
            self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

        def naming(function):
            def name(old, new, **options):
                files = filter(Path.is_file, [Path(old), *Path(old).rglob("*")])
                late = [path.name for path in files if not self.is_on_the_disk(path)]
                function(old, new, **options)
                self.named.append((Path(new).name, late))
                self.synced.pop(Path(new).parent.stat().st_ino, None)  # the name is in memory alone

            return name

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "rename", naming(rename))
        monkeypatch.setattr(os, "replace", naming(replace))

    def is_on_the_disk(self, path) -> bool:
        found = path.stat()
        return self.synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_last_names_it(tiny_run, monkeypatch):
    """Write, fsync, rename: else a power failure leaves an empty checkpoint, or an empty `last`."""
    disk = Disk(monkeypatch)
    run = tiny_run(steps=1)
    named = [(new, late) for new, late in disk.named if re.fullmatch("step_[0-9]{8}|last", new)]
    assert named == [("step_00000000", []), ("last", []), ("step_00000001", []), ("last", [])]
    assert run.stat().st_ino in disk.synced and (run / "last").read_text() == "step_00000001"


def save_for_ever(folder, ready):
    """Save checkpoints whose weights all equal their step, one after the other."""
    join_world()
    config = Config(keep=2)
    model = build()
    optimizers, guard = train.make_optimizers(model, config), train.Guard(6.0, CPU)
    checkpoints = checkpoints_of(folder, config, model, optimizers, guard)
    last = folder / "last"
    for step in range(int(last.read_text()[5:]) + 1 if last.exists() else 1, 10_000):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        checkpoints.begin(step)
        assert checkpoints.finish() is None
        ready.set()


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Trap 24: 20 times kill -9."""
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["train"])
    (tmp_path / "run.json").write_text("{}")
    steps = []
    for _ in range(20):
        ready = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(300)
        time.sleep(draw.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for folder in (checkpoint_folder(tmp_path), *tmp_path.glob("step_????????")):  # all that have their name
            values = {value.item() for p in load(folder).parameters() for value in p.unique()}
            assert values == {float(folder.name.removeprefix("step_"))}
        steps.append(int(checkpoint_folder(tmp_path).name.removeprefix("step_")))
    assert steps == sorted(steps) and len(set(steps)) == 20


def test_a_half_written_checkpoint_is_not_seen(tiny_run):
    straight = tiny_run("straight", steps=8)
    run = tiny_run("run", steps=8, stop_at=4)
    (run / "step_00000006.tmp").mkdir()
    (run / "step_00000006.tmp" / "__0_0.distcp").write_bytes(b"half")
    (run / "step_00000008").mkdir()  # renamed, but killed before `last` was written
    tiny_run(resume="run", stop_at=0)
    assert same_bits(run, straight)


# ---- what a run says of itself ----


def test_a_run_explains_itself(tiny_run, capsys):
    run = tiny_run(steps=6)
    record = json.loads((run / "run.json").read_text())
    assert (
        record["config"]["steps"] == 6
        and record["model"]["dim"] == 32
        and record["versions"]["torch"] == torch.__version__
    )
    assert record["dataset"][0]["tokenizer"]["name"] == "bytes" and record["processes"] == 1 and record["device"]
    first = json.loads((run / "log.jsonl").read_text().splitlines()[1])
    numbers = {"step", "loss", "mean_loss", "lr", "grad_norm", "tokens", "targets", "sequences_without_target"}
    assert first.keys() == numbers | {"epochs", "tokens_per_s", "mfu", "memory"}
    assert first["tokens"] == first["targets"] == 4 * 32 and first["sequences_without_target"] == 0
    assert abs(first["loss"] - math.log(258)) < 0.3
    nats, bits = log(run, "val_loss")[-1], log(run, "val_bits_per_byte")[-1]
    assert nats / math.log(2) < bits < 1.05 * nats / math.log(2)  # a byte is a token, but for BOS and EOS
    assert (run / "loss.png").read_bytes()[1:4] == b"PNG"
    out = capsys.readouterr().out
    assert "step 6/6  loss" in out and "tokens/s" in out and "left" in out and "bits a byte" in out


def test_wandb_mirrors_the_log_and_never_stops_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    run = tiny_run(steps=2, wandb="plainllama-test")
    assert list(run.glob("wandb/offline-run-*"))

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    assert log(tiny_run("second", steps=2, wandb="plainllama-test"), "step")[-1] == 2
    assert "wandb is off: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (dict(data="nowhere"), "nowhere holds no dataset .* python data.py --source"),
    (dict(size="8B"), "--size 8B is not one of 7B, 13B"),
    (dict(steps=0), "--steps 0 must be above 0"),
    (dict(batch_size=-4), "--batch_size -4 must be above 0"),
    (dict(micro_batch=3), "--micro_batch 3 must divide --batch_size / processes = 4"),
    (dict(warmup=-1), "--warmup -1 must be a number that is not negative"),
    (dict(beta2=1.5), "--beta2 1.5 must lie between 0 and 1"),
    (dict(eval_tokens=31), "--eval_tokens 31 is less than one window of --seq_len 32"),
    (dict(num_heads=5), "dim 32 must be a multiple of 2 \\* num_heads = 10"),
    (dict(seq_len=10**6, eval_tokens=10**6), "no train file has 1000001 tokens"),
    (dict(init_from="nowhere"), "nowhere: no such file or folder"),
    (dict(resume="nowhere"), "nowhere/run.json is missing"),
    (dict(beta1=1.0), "--beta1 1.0 must lie between 0 and 1"),
    (dict(seed=2**64), "--seed .* must lie between 0 and"),
    (dict(warmup=float("nan")), "--warmup nan must be a number"),
    (dict(init_from="nowhere", num_heads=4), "--num_heads 4 does not go with --init_from"),
    (dict(init_from="nowhere", size="15M"), "--size 15M does not go with --init_from"),
    (dict(out="."), "--out . holds other files"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_sentence(options, message, tiny_run, tmp_path):
    (tmp_path / "something").write_text("keep me")
    with pytest.raises(ValueError, match=message):
        tiny_run(**options)
    assert (tmp_path / "something").read_text() == "keep me" and not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(tiny_run):
    run = tiny_run(steps=3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="--out run holds a run with --learning_rate 0.01, not 0.02"):
        tiny_run(steps=3, learning_rate=0.02)
    with pytest.raises(ValueError, match="--resume run holds a run with --seed 0, not 5"):
        tiny_run(resume="run", seed=5)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_size_is_refused(tiny_run):
    run = tiny_run(steps=3, stop_at=2)
    for path in run.glob("step_*/config.json"):
        path.write_text(path.read_text().replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(ValueError, match="is of another size: intermediate_size 96, the run's is 64"):
        tiny_run(resume="run", stop_at=0)


def test_a_model_that_does_not_fit_the_data_is_refused(tiny_run, tmp_path, trained_data):
    save(Transformer(dataclasses.replace(CONFIG, vocab_size=100)), tmp_path / "small")
    with pytest.raises(ValueError, match="has a vocabulary of 258, larger than the model's 100"):
        tiny_run(init_from=str(tmp_path / "small"))
    save(Transformer(dataclasses.replace(CONFIG, vocab_size=258, max_seq_len=16)), tmp_path / "short")
    with pytest.raises(ValueError, match="--seq_len 32 exceeds the model's context window of 16"):
        tiny_run(init_from=str(tmp_path / "short"))
    tiny_run("bytes", steps=1)
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        tiny_run("words", init_from="bytes", data=str(trained_data))
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        tiny_run("words", init_from="bytes/step_00000001", data=str(trained_data))


def test_a_damaged_run_is_refused_in_one_sentence(tiny_run, tmp_path):
    def damaged(name: str, change) -> str:
        shutil.copytree(run, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(ValueError) as error:
            tiny_run(resume=name, stop_at=6)
        if name != "record":
            with pytest.raises(ValueError):
                load(tmp_path / name)
        return str(error.value)

    run = tiny_run(steps=6, stop_at=4)
    shutil.rmtree(run / "step_00000000")
    part = "step_00000004/__0_0.distcp"
    assert "cannot be read" in damaged("truncated", lambda folder: os.truncate(folder / part, 1000))
    assert "cannot be read" in damaged("missing", lambda folder: (folder / part).unlink())
    assert "cannot be read" in damaged("index", lambda folder: os.truncate(folder / "step_00000004/.metadata", 100))
    assert "config.json is missing" in damaged("gone", lambda folder: shutil.rmtree(folder / "step_00000004"))
    assert "run.json is not JSON" in damaged("record", lambda folder: (folder / "run.json").write_text("{"))


def test_a_run_can_be_continued_after_half_a_line_or_half_a_beginning(tiny_run, tmp_path):
    straight = tiny_run("straight", steps=8)
    run = tiny_run("run", steps=8, stop_at=4)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    tiny_run(resume="run")
    assert same_bits(run, straight) and log(run, "loss") == log(straight, "loss")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json.tmp").write_text("{")
    assert same_bits(tiny_run("new", steps=8), straight)
    (tmp_path / "failed").mkdir()  # a start with another flag that came to nothing
    record = json.loads((run / "run.json").read_text())
    record["config"]["learning_rate"] = 9.0
    (tmp_path / "failed" / "run.json").write_text(json.dumps(record))
    assert same_bits(tiny_run("failed", steps=8), straight)
    assert json.loads((tmp_path / "failed" / "run.json").read_text())["config"]["learning_rate"] != 9.0


def test_a_weight_without_gradient_does_not_stop_a_run_from_going_on(tiny_run, monkeypatch):
    """As after an edit that no longer uses the gate of the feed-forward layers."""
    monkeypatch.setattr("model.FeedForward.forward", lambda self, x: self.down(self.up(x).relu().square()))
    straight = tiny_run("straight", steps=8)
    tiny_run("run", steps=8, stop_at=4)
    assert same_bits(tiny_run(resume="run"), straight)


def test_a_run_knows_its_dataset_and_needs_its_first_model_no_more(tiny_run, tiny_data, tmp_path):
    tiny_run("first", steps=2)
    straight = tiny_run("straight", init_from="first", steps=8)
    run = tiny_run("run", init_from="first", steps=8, stop_at=4)
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(tiny_data, tmp_path / "moved")
    tiny_run(resume="run", data=str(tmp_path / "moved"))
    assert same_bits(run, straight)
    other = byte_data(tmp_path, 30)
    with pytest.raises(ValueError, match="is another dataset than when run began"):
        tiny_run(resume="run", data=str(other))


def test_resume_takes_the_runs_flags_and_a_typed_one_counts_also_when_it_is_the_default(tiny_run, tmp_path, capsys):
    tiny_run(steps=6, stop_at=4, micro_batch=2)
    done = command("train.py", "--resume", "run", "--steps", str(Config.steps), cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"holds a run with --steps 6, not {Config.steps}" in done.stderr
    done = command("train.py", "--resume", "run", "--micro_batch", "0", cwd=tmp_path)
    assert "continuing run after step 4" in done.stdout
    tiny_run(resume="run", stop_at=3)
    assert "run is finished" in capsys.readouterr().out
    done = command("train.py", "--resume", "run", "--out", "other", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--out other does not go with --resume run" in done.stderr
    tiny_run("early", steps=6, stop_at=4)
    tiny_run(resume="early", stop_at=3)
    assert "early is already at step 4" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    prepare((str(ROOT / "tests"),), folder / "data", "train:400", 0.3, workers=1)
    return folder / "data"


def test_position_interpolation_can_be_trained(tiny_run, tmp_path):
    save(Transformer(dataclasses.replace(CONFIG, vocab_size=258, max_seq_len=16)), tmp_path / "short")
    run = tiny_run(init_from=str(tmp_path / "short"), rope_scale=2.0, steps=1)
    assert (load(run).config.rope_scale, load(run).config.max_seq_len) == (2.0, 32)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="a lower --learning_rate usually helps"):
        tiny_run(steps=50, learning_rate=1e20, grad_clip=1e20, save_every=1, log_every=100)
    assert all(p.isfinite().all() for p in load(tmp_path / "run").parameters())


def test_bad_input_ends_with_exit_code_2_and_a_bug_with_its_traceback(tmp_path, monkeypatch):
    done = command("train.py", "--data", "nowhere", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: nowhere holds no dataset")
    done = command("train.py", "--lerning_rate", "1", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--learning_rate" in done.stderr
    from lib import cli
    from lib.errors import BadInput

    @dataclasses.dataclass
    class Nothing:
        pass

    monkeypatch.setattr("sys.argv", ["train.py"])
    for bug in (lambda config: json.loads("{"), lambda config: list(zip([1], [], strict=True))):
        with pytest.raises(ValueError) as raised:  # which is no BadInput
            cli.run_command(bug, Nothing)
        assert not isinstance(raised.value, BadInput)


def test_the_work_of_a_token_is_the_published_one():
    assert planning.flops_per_token(SIZES["7B"], 4096) / 1e9 == pytest.approx(46.87, abs=0.005)
    assert planning.flops_per_token(SIZES["7B"], 2048) / 1e9 == pytest.approx(43.65, abs=0.005)


def test_compiling_is_chosen_where_it_pays(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/" + name)
    assert [
        should_compile(*choice)
        for choice in (("auto", cpu, 1e13), ("auto", cpu, 1e16), ("on", cpu, 1), ("off", cpu, 1e16))
    ] == [False, True, True, False]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not should_compile("auto", cpu, 1e16)


def test_a_run_on_other_data_says_so_before_what_else_is_wrong_with_them(tiny_run, tmp_path):
    tiny_run(steps=1)
    other = byte_data(tmp_path, 3)  # too few tokens for a sequence, too
    with pytest.raises(ValueError, match="is another dataset than when run began"):
        tiny_run(steps=1, data=str(other), seq_len=32)
