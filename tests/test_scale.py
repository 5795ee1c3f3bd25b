"""Training at full scale: gradients under every way to save memory, many processes, and what goes wrong in a month."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import simulate
import test_train
import train
from conftest import ROOT, TINY_RUN, checkpoints_of, command, flags, forecast_of, run_ranks, start_ranks
from data import Batch, Mixture
from lib import forecast, saving, train_flags
from lib import world as world_of
from lib.kernels import sharding_units
from lib.world import join_world
from model import IGNORE, SIZES, ModelConfig, Transformer, load, save
from ranks import CONFIG
from test_train import CPU, build, log, micro_batch, read_checkpoint, rows, same_bits, world  # noqa: F401
from train import Config


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(rows()[:, :-1], rows()[:, 1:]).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


# ---- saving memory ----


@pytest.mark.parametrize("mode", ["selective", "full", "2"])
def test_activation_checkpointing_changes_no_bit_of_the_gradients(mode, world):  # noqa: F811
    """Trap 19."""
    plain, other = gradients(build()), gradients(build(checkpointing=mode))
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)


def test_activation_checkpointing_keeps_what_it_says(world):  # noqa: F811
    """A block that is computed again makes its first six products again (nobody needs the last), or three of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
                return NotImplemented
            self.count += function is torch.ops.aten.mm.default
            return function(*args, **(kwargs or {}))

    def products(mode: str) -> int:
        model = build(checkpointing=mode)
        with Products() as counter:
            gradients(model)
        return counter.count

    plain = products("none")
    assert [products(mode) - plain for mode in ("full", "2", "selective")] == [12, 6, 6]


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_compiled_blocks_have_no_graph_break_and_the_same_gradients(mode, world):  # noqa: F811
    """Trap 19: checkpoint, compile, shard; a graph break would raise."""
    plain, compiled = gradients(build()), gradients(build(checkpointing=mode, compiled=True))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-5, rtol=1e-4)


def test_gathered_weights_are_kept_or_given_back_with_the_same_gradients(world):  # noqa: F811
    kept, given_back = build(reshard_after_forward=False), build()
    one, other = gradients(kept), gradients(given_back)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for model, is_sharded in ((kept, False), (given_back, True)):
        model(rows()[:, :-1], rows()[:, 1:])
        weight = model.blocks[0].feed_forward.up.weight
        assert isinstance(weight, torch.distributed.tensor.DTensor) == is_sharded


@pytest.mark.parametrize("tied", [True, False])
def test_neighbouring_blocks_of_less_than_a_million_parameters_are_gathered_together(tied):
    """The laptop's have 0.2 million each; of those below, 4 * 256 * 256 + 3 * 256 * 192 + 512 make 0.41."""
    shape = ModelConfig(256, 7, 4, 4, 192, vocab_size=64, tie_embeddings=tied)
    model = Transformer(shape)
    units = sharding_units(model)
    blocks = [*model.blocks]
    expected = [blocks[:3], blocks[3:6], blocks[6:]]
    assert units == (expected if tied else [*expected, [model.embedding]])
    laptop = Transformer(SIZES["laptop"])
    assert sharding_units(laptop) == [[*laptop.blocks]]


def test_a_step_without_any_target_moves_nothing_and_is_counted(world):  # noqa: F811
    """Trap 1."""
    model = build()
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    optimizers = train.make_optimizers(model, Config())
    batch = micro_batch(rows())
    batch = batch._replace(targets=torch.full_like(batch.targets, IGNORE))
    outcome = train.train_step(model, optimizers, [batch], 0.0, Config(), train.Guard(6.0, CPU))
    assert outcome.loss == 0 and outcome.norm == 0 and not outcome.bad and outcome.counts.tolist() == [0, 0, 4]
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    some = batch._replace(targets=batch.targets.clone())
    some.targets[1, 3] = 7
    outcome = train.train_step(model, optimizers, [some, batch], 0.0, Config(), train.Guard(6.0, CPU))
    assert outcome.counts.tolist() == [1, 1, 7]


# ---- forecasts ----

SHAPE = SIZES["15M"]


@pytest.mark.parametrize("size, options", [
    ("15M", dict(micro_batch=8, batch_size=8, seq_len=256, gpus=1)),
    ("15M", dict(micro_batch=8, batch_size=8, seq_len=256, gpus=1, dtype="fp32", checkpointing="selective")),
    ("15M", dict(micro_batch=8, batch_size=32, seq_len=256, gpus=2)),
    ("15M", dict(micro_batch=8, batch_size=32, seq_len=256, gpus=2, dtype="fp16")),
    ("15M", dict(micro_batch=8, batch_size=32, seq_len=256, gpus=2, reduce_each=True, checkpointing="2")),
    ("1.1B", dict(micro_batch=2, batch_size=16, seq_len=2048, gpus=8, checkpointing="full")),
    ("7B", dict(micro_batch=4, batch_size=256, seq_len=4096, gpus=64, checkpointing="full")),
])  # fmt: skip
def test_the_forecast_of_memory_is_within_a_tenth_of_a_simulation(size, options):
    config = Config(**dict(dtype="bf16", compile="off") | options)
    expected = sum(forecast_of(SIZES[size], config, config.gpus, compiled=False).values())
    assert expected == pytest.approx(simulate.peak(SIZES[size], config, config.gpus, fake=True), rel=0.1)


@pytest.mark.parametrize("options, gib", [
    (dict(micro_batch=1, checkpointing="full"), 15.5), (dict(micro_batch=2, checkpointing="full"), 16.5),
    (dict(micro_batch=4, checkpointing="full"), 19.4), (dict(micro_batch=8, checkpointing="full"), 26.9),
    (dict(micro_batch=1), 34.7), (dict(micro_batch=2), 59.0),
])  # fmt: skip
def test_the_forecast_for_7b_on_8_gpus_is_within_a_tenth_of_traced_figures(options, gib):
    """Traced on another implementation of the same shape with the same sharding."""
    config = Config(seq_len=4096, batch_size=8 * options["micro_batch"], dtype="bf16", **options)
    assert sum(forecast_of(SIZES["7B"], config, 8, compiled=False).values()) / 2**30 == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("options", [dict(), dict(checkpointing="full"), dict(dtype="fp32")])
def test_the_forecast_of_memory_is_within_a_tenth_of_what_a_real_step_allocates(options):
    config = Config(**dict(dtype="bf16", compile="off", micro_batch=2, batch_size=2, seq_len=256) | options)
    expected = sum(forecast_of(SHAPE, config, 1, compiled=False).values())
    assert expected == pytest.approx(simulate.peak(SHAPE, config, 1, fake=False), rel=0.1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_forecast_knows_what_a_block_keeps_for_its_backward_pass(compiled, dtype, num_kv_heads):
    """Counted by autograd's hooks; compiled without code generation, but with the same choice of what to keep."""
    from model import Block, rope_table

    shape = dataclasses.replace(CONFIG, dim=64, ffn_dim=176, num_kv_heads=num_kv_heads)
    block, rope = Block(shape, 0).to(dtype), rope_table(shape, torch.arange(64))
    torch.compiler.reset()
    forward = torch.compile(block.forward, backend="aot_eager_decomp_partition") if compiled else block.forward
    x = torch.randn(1, 64, 64, dtype=dtype, requires_grad=True) * 1.0
    kept = simulate.kept_for_backward(lambda: forward(x, rope, None, None), (*block.parameters(), *rope))
    assert kept / 64 == forecast.kept_bytes(shape, "none", compiled, dtype.itemsize)


def test_a_plan_needs_no_data_and_says_whether_it_fits(tmp_path):
    words = "--plan --size 7B --seq_len 4096 --batch_size 512 --micro_batch 1 --steps 1000".split()
    done = command("train.py", *words, "--checkpointing", "full", cwd=tmp_path).stdout
    assert "6,738,415,616 parameters on 8 × A100-80GB" in done and ": fits" in done and "hours for 1,000 steps" in done
    done = command("train.py", *words, "--gpu", "A100-40GB", cwd=tmp_path).stdout
    assert "does not fit" in done and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [
    dict(), dict(optimizer="muon"), dict(freeze=("blocks.0.*",)),
    dict(lora_rank=128),  # of less the files' headers would be a good part
])  # fmt: skip
def test_the_forecast_of_a_checkpoint_is_what_one_takes_on_disk(options, tiny_run):
    shape = dict(dim=128, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=256, steps=2)
    run = tiny_run("base", **shape)
    if "lora_rank" in options:
        run = tiny_run("adapted", init_from=str(run), steps=2, **options)
    elif options:
        run = tiny_run("run", **shape, **options)
    config = Config(dtype="fp32", **options)
    model = train.empty_model(load(run).config, config)
    assert forecast.checkpoint_bytes(model, config) == pytest.approx(size_of(run / "step_00000002"), rel=0.05)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_a_plan_says_how_much_disk_a_run_takes():
    config = Config(size="7B", seq_len=512, batch_size=8, micro_batch=1)
    assert "disk: 80.9 GB a checkpoint, the first before step 1, up to 4 at a time" in train.plan(config)
    config = dataclasses.replace(config, keep=1, keep_every=100, steps=1000)
    assert "up to 13 at a time" in train.plan(config)
    assert "disk: 0.5 GB a checkpoint" in train.plan(dataclasses.replace(config, lora_rank=16))


@pytest.mark.parametrize("gpu", ["T4-16GB", "V100-32GB", "L4-24GB"])
def test_a_plan_for_a_gpu_without_bf16_is_in_fp16_and_says_so(gpu):
    """Needs and speed are those of any arithmetic of 16 bits; only a run with --dtype fp16 will have them there."""
    config = Config(size="110M", seq_len=1024, batch_size=8, micro_batch=1, gpus=1, gpu=gpu)
    told = train.plan(config)
    fp16, fp32 = (train.plan(dataclasses.replace(config, dtype=dtype)) for dtype in ("fp16", "fp32"))
    if gpu.startswith("L4"):
        assert told == train.plan(dataclasses.replace(config, dtype="bf16")) == fp16
        return
    assert told.startswith(fp16) and "--dtype fp16" in told.removeprefix(fp16)
    assert told.split(" GiB: ")[0] != fp32.split(" GiB: ")[0]
    with pytest.raises(ValueError, match=f"--dtype bf16 does not go with --gpu {gpu}, which has no bf16"):
        train.plan(dataclasses.replace(config, dtype="bf16"))


def test_gloo_does_not_start_threads_that_slow_training_down(tmp_path):
    """With two OpenMP threads, as on a machine of two cores: collectives of large tensors add none to them."""
    if not Path("/proc/self/task").exists():
        pytest.skip("the threads of a process are counted in /proc")
    (tmp_path / "count.py").write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import os, torch, torch.distributed as dist
from lib.world import join_world, leave
join_world()
torch.randn(2_000_000).exp()  # the training's own team
before = len(os.listdir("/proc/self/task"))
works = [dist.all_reduce(torch.randn(2_000_000), async_op=True) for _ in range(24)]
[work.wait() for work in works]
print("threads", len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
leave()
"""
    )
    done = command(tmp_path / "count.py", env={"OMP_NUM_THREADS": "2"})
    assert "threads 0 2" in done.stdout


# ---- many processes ----


def train_here(folder, options: dict):
    os.chdir(folder)
    train.main(Config(**options))


@pytest.fixture
def options(tiny_data) -> dict:
    return TINY_RUN | {"data": (str(tiny_data),)}


def test_any_number_of_processes_starts_from_the_same_weights(options, tmp_path):
    """Each draws only the rows that it holds."""
    for ranks in (1, 2, 4):
        run_ranks(ranks, train_here, tmp_path, options | {"out": str(ranks), "steps": 1})
    one = load(tmp_path / "1" / "step_00000000").state_dict()
    for ranks in ("2", "4"):
        other = load(tmp_path / ranks / "step_00000000").state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
    whole = Transformer(load(tmp_path / "1").config)
    whole.init_weights(0)
    assert all(torch.equal(one[name], weight) for name, weight in whole.state_dict().items())


def test_each_process_reads_its_rows_of_a_hugging_face_folder(options, tmp_path):
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=259))
    model.init_weights(5)
    save(model, tmp_path / "folder", max_shard_bytes=20_000)
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    shape = dict.fromkeys(("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"), 0) | {"size": Config.size}
    started = options | shape | {"init_from": "folder", "out": "run", "steps": 1}
    run_ranks(2, train_here, tmp_path, started)
    read = load(tmp_path / "run" / "step_00000000").state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in model.state_dict().items())


def test_copies_of_the_model_in_groups_of_processes_train_as_one(options, tmp_path):
    """HSDP: 4 processes, each pair holds a copy."""
    both = options | {"steps": 6, "batch_size": 8, "micro_batch": 1}
    run_ranks(1, train_here, tmp_path, both | {"out": "one"})
    run_ranks(4, train_here, tmp_path, both | {"out": "copies", "shard_over": 2})
    for field in ("loss", "grad_norm", "val_loss"):
        assert log(tmp_path / "copies", field) == pytest.approx(log(tmp_path / "one", field), rel=1e-5)
    with pytest.raises(ValueError, match="--shard_over 3 must divide the 4 processes"):
        train_flags.check_flags(Config(shard_over=3), 4)


def test_muon_trains_alike_on_any_number_of_processes_and_resumes_exactly(options, tmp_path, tiny_run):
    both = options | {"steps": 8, "optimizer": "muon"}
    run_ranks(1, train_here, tmp_path, both | {"out": "one"})
    run_ranks(2, train_here, tmp_path, both | {"out": "two"})
    # Muon makes a matrix orthogonal in bf16, where a last bit of fp32 can turn 2^-9 of a number
    assert log(tmp_path / "two", "loss") == pytest.approx(log(tmp_path / "one", "loss"), rel=2**-11)
    assert log(tmp_path / "one", "loss")[-1] < log(tmp_path / "one", "loss")[0] - 0.5
    straight = tiny_run("straight", steps=8, optimizer="muon")
    tiny_run("cut", steps=8, optimizer="muon", stop_at=3)
    cut = tiny_run(resume="cut")
    assert any("momentum_buffer" in name for name in read_checkpoint(cut))
    mine, theirs = read_checkpoint(cut), read_checkpoint(straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# ---- signals and kills ----


def drill(folder, options: dict, kills: int, number: int, seed: int) -> int:
    """Train on two processes, which are sent a signal at random moments; returns how many signals it took."""
    draw, sent = random.Random(seed), 0
    while not (folder / options["out"] / f"step_{options['steps']:08d}").exists():
        processes = start_ranks(2, train_here, folder, options)
        if sent < kills:
            time.sleep(draw.uniform(0.5, 2.0))
            victim = draw.choice(processes)
            if victim.is_alive():
                os.kill(victim.pid, number)
                sent += 1
        codes = ends_as_under_torchrun(processes)
        if number == signal.SIGTERM:  # it kills a process only before the run has begun
            assert codes == {0} or -signal.SIGTERM in codes, codes
    return sent


def ends_as_under_torchrun(processes: list) -> set[int]:
    """Wait for all of them, and two seconds after one has failed end the others; returns the exit codes."""
    started = time.monotonic()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.join(2)
                process.kill()
        assert time.monotonic() - started < 300, "a process does not end"
        time.sleep(0.02)
    return {process.exitcode for process in processes}


@pytest.mark.parametrize("number, kills", [
    (signal.SIGKILL, 2), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 20, marks=pytest.mark.slow), pytest.param(signal.SIGKILL, 20, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_that_is_killed_and_started_again_equals_the_straight_run(number, kills, options, tmp_path):
    """Traps 20 and 24, two processes: weights, moments, and what the guard has seen, bit for bit."""
    long = options | {"steps": 50 * kills, "save_every": 7, "eval_every": 500, "log_every": 20, "micro_batch": 1}
    run_ranks(2, train_here, tmp_path, long | {"out": "straight"})
    sent = drill(tmp_path, long | {"out": "drilled"}, kills, number, seed=kills)
    assert sent == kills and same_bits(tmp_path / "drilled", tmp_path / "straight")


def test_sigterm_saves_at_once_and_exits_with_0_and_the_same_command_goes_on(options, tmp_path):
    words = flags(options | {"data": options["data"][0], "steps": 2000, "save_every": 10**6, "eval_every": 10**6})
    words = [sys.executable, str(ROOT / "train.py"), *words, "--out", "run"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 0
    step = int((tmp_path / "run" / "last").read_text()[5:])
    assert f"SIGTERM: stopped after step {step}; the same command continues run" in rest and 5 <= step < 2000
    assert log(tmp_path / "run", "step")[-1] == step


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_crashed(options, tmp_path):
    words = flags(options | {"data": options["data"][0], "steps": 400, "save_every": 5, "out": "run"})
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*start, "--max-restarts", "2", str(ROOT / "train.py"), *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert "continuing run after step" in rest and log(tmp_path / "run", "step")[-1] == 400


def test_a_restarted_attempt_does_not_see_what_the_one_before_left_in_the_store(monkeypatch):
    """Else it would find there the addresses of processes that have ended."""
    kept, stores = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda where: iter([(kept, 0, 1)]))
    def join(backend, store, **ranks):
        stores.append(store)

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr("lib.world.tune_cpu", lambda: None)
    monkeypatch.setenv("RANK", "0")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        join_world()
    stores[0].set("address", "of a process that has ended")
    assert stores[0].check(["address"]) and not stores[1].check(["address"])


# ---- bad steps ----


def poisoned_run(folder, options: dict, ranks: list[int], steps: list[int], micro: int, factor: float):
    """Train with the loss of one micro-batch of some steps multiplied on some ranks."""
    loss_of, calls = Transformer.loss, [0]

    def poisoned(self, tokens, targets, documents=None):
        loss = loss_of(self, tokens, targets, documents)
        if not torch.is_grad_enabled():
            return loss
        step, part = divmod(calls[0], 2)
        calls[0] += 1
        return loss * factor if dist.get_rank() in ranks and step + 1 in steps and part == micro else loss

    Transformer.loss = poisoned
    train_here(folder, options)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_update_on_all_and_names_the_data(options, tmp_path):
    """Trap 16: one micro-batch of one of two processes is poisoned."""
    both = options | {"steps": 7, "save_every": 1, "keep": 9, "batch_size": 8, "micro_batch": 2, "log_every": 7}
    run_ranks(2, poisoned_run, tmp_path, both | {"out": "run"}, [1], [5], 1, float("nan"))
    states = [read_checkpoint(tmp_path / "run" / f"step_{step:08d}") for step in (3, 4, 5, 6)]
    names = [name for name in states[0] if name.startswith(("model.", "optimizer."))]
    same = [all(torch.equal(a[name], b[name]) for name in names) for a, b in zip(states, states[1:])]
    assert same == [False, True, False]
    (event,) = [row for row in map(json.loads, open(tmp_path / "run" / "log.jsonl")) if "event" in row]
    data = Mixture(both["data"], "train", 32)
    numbers = data.numbers(4, 8, rank=1, world=2)[2:]
    assert event["step"] == 5 and event["event"] == "bad step" and event["skipped"]
    assert event["data"] == [data.place(number, 0) for number in numbers]
    assert "train_00000.bin tokens" in event["data"][0] and "document" in event["data"][0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(optimizer, world):  # noqa: F811
    model, config = build(), Config(optimizer=optimizer)
    optimizers, guard = train.make_optimizers(model, config), train.Guard(6.0, CPU)
    train.train_step(model, optimizers, [micro_batch(rows())], 1e-3, config, guard)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    hook = model.blocks[1].register_full_backward_hook(lambda module, to, back: (to[0] * float("inf"), *to[1:]))
    outcome = train.train_step(model, optimizers, [micro_batch(rows())], 1e-3, config, guard)
    hook.remove()
    assert outcome.loss.isfinite() and not outcome.norm.isfinite() and outcome.bad
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    assert guard.level[0] == 1 and {int(state["step"]) for state in optimizers[0].state.values()} == {1}
    assert not train.train_step(model, optimizers, [micro_batch(rows())], 1e-3, config, guard).bad


def test_too_many_bad_steps_in_a_row_stop_the_run_with_advice(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformer, "loss", Transformer.loss)
    bad = options | {"steps": 40, "max_bad_steps": 4, "micro_batch": 2, "save_every": 5, "out": "run", "log_every": 50}
    with pytest.raises(ValueError, match="4 steps in a row up to 12 .*a lower --learning_rate usually helps"):
        poisoned_run(tmp_path, bad, [0], [3, 4, 5, *range(9, 40)], 0, float("inf"))
    assert (tmp_path / "run" / "last").read_text() == "step_00000010"
    assert all(p.isfinite().all() for p in load(tmp_path / "run").parameters())


def test_a_spike_is_what_lies_far_above_the_running_level():
    guard, draw = train.Guard(6.0, CPU), random.Random(0)

    def judge(loss: float, norm: float = 1.0) -> list[bool]:
        return [bool(flag) for flag in guard.judge(torch.tensor(loss), torch.tensor(norm))]

    noise = lambda: (draw.gauss(0, 0.05), 1 + draw.gauss(0, 0.1))  # noqa: E731
    for i in range(100):  # still settling
        loss, norm = noise()
        assert not any(judge(9.0 - i / 20 + loss, norm))
    for _ in range(400):
        loss, norm = noise()
        assert not any(judge(4.0 + loss, norm))
    level = guard.level.clone()
    assert judge(float("nan")) == [True, False] and judge(4.0, float("inf")) == [True, False]
    assert torch.equal(guard.level, level)
    assert judge(50.0) == [False, True]
    assert judge(5.0) == [False, True] and judge(4.0, 9.0) == [False, True] and judge(5.0) == [False, True]
    assert [judge(5.0 + draw.gauss(0, 0.05))[1] for _ in range(40)][-20:] == [False] * 20  # a new level, not a spike


@pytest.mark.parametrize("action", ["log", "skip", "rollback"])
def test_a_spike_is_logged_skipped_or_rolled_back_past_its_data(action, options, tmp_path, tiny_run, monkeypatch):
    original = Mixture.feed

    def garbage_in_one_step(data, config, steps, device):
        for step, batches in zip(steps, original(data, config, steps, device)):
            if step == 124:
                batches = [batch._replace(targets=batch.targets * 0 + 255) for batch in batches]
            yield batches

    steps = dict(steps=140, save_every=50, keep=9, log_every=10, learning_rate=3e-3)
    clean = tiny_run("clean", **steps)
    monkeypatch.setattr(Mixture, "feed", garbage_in_one_step)
    run = tiny_run("run", on_spike=action, **steps)
    events = [row for row in map(json.loads, open(run / "log.jsonl")) if "event" in row]
    kind = "spike" if action != "rollback" else "rollback"
    assert [event["event"] for event in events] == [kind]
    guard = {name: value for name, value in read_checkpoint(run).items() if name.startswith("guard.")}
    if action == "rollback":
        assert events[0]["step"] == 100 and events[0]["spike"] == 125 and guard["guard.passed_over"] == 25
        assert log(run, "loss")[-1] < log(clean, "loss")[0] - 1 and log(run, "step")[-1] == 140
        data = Mixture(options["data"], "train", 32)
        assert log(run, "epochs")[-1] == data.epochs(140 * 4)
    else:
        assert events[0]["step"] == 125 and events[0]["skipped"] == (action == "skip") and len(events[0]["data"]) == 4
    again = tiny_run("again", on_spike=action, **steps)
    assert same_bits(run, again)


def test_a_spike_that_rolling_back_does_not_help_ends_the_run(tiny_run, monkeypatch):
    monkeypatch.setattr(train.Guard, "judge", lambda self, loss, norm: (torch.tensor(False), torch.tensor(True)))
    with pytest.raises(ValueError, match="again after going back to step 0 3 times"):
        tiny_run(steps=4, log_every=2, on_spike="rollback", max_bad_steps=3)


# ---- a disk that is full, and other damage ----


def full_disk(monkeypatch, first: int, last: int):
    """No file can grow beyond 20 kB while the steps first … last are begun; a save is over before the next step."""
    original, before = train.learning_rate, resource.getrlimit(resource.RLIMIT_FSIZE)
    begin = train.Checkpoints.begin

    def begin_and_wait(self, step: int, loss: float | None = None):
        begin(self, step, loss)
        wait([self.saving[1]])

    monkeypatch.setattr(train.Checkpoints, "begin", begin_and_wait)

    def rate(step: int, config: Config) -> float:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if first <= step <= last else before[0], before[1]))
        return original(step, config)

    monkeypatch.setattr(train, "learning_rate", rate)


@pytest.fixture
def no_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield before
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tiny_run, monkeypatch, capsys, no_limit):
    straight = tiny_run("straight", steps=12, save_every=4)
    full_disk(monkeypatch, 2, 6)
    run = tiny_run("run", steps=12, save_every=4)
    said = capsys.readouterr().out
    assert "run: no checkpoint of step 4 (" in said and "; the last one is that of step 0; the run goes on" in said
    assert "File too large" in said
    assert same_bits(run, straight) and not list(run.glob("*.tmp"))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_loses_nothing(tiny_run, monkeypatch, no_limit):
    straight = tiny_run("straight", steps=12, save_every=4)
    full_disk(monkeypatch, 10, 12)
    with pytest.raises(ValueError, match="no checkpoint of step 12 .*File too large.*; the last one is that of step 8"):
        tiny_run("run", steps=12, save_every=4)
    monkeypatch.setattr(train, "learning_rate", test_train.learning_rate)
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    assert same_bits(tiny_run("run", steps=12, save_every=4), straight)


def test_a_folder_that_cannot_be_written_is_one_sentence_on_every_process(options, tmp_path):
    (tmp_path / "file").write_text("")
    words = flags(options | {"data": options["data"][0], "out": "file/run"})
    done = command("train.py", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "train.py: file/run: Not a directory"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_run, capsys):
    straight = tiny_run("straight", steps=12, save_every=4)
    run = tiny_run("run", steps=12, save_every=4, stop_at=8)
    for damage in ("part", "index", "all"):
        copy = run.with_name(damage)
        shutil.copytree(run, copy)
        if damage == "part":
            os.truncate(copy / "step_00000008" / "__0_0.distcp", 10_000)
        elif damage == "index":
            (copy / "step_00000008" / ".metadata").write_bytes(b"\x80\x04.")
        else:
            shutil.rmtree(copy / "step_00000008")
        assert same_bits(tiny_run(resume=damage), straight)
        said = capsys.readouterr()
        assert f"going back to {damage}/step_00000004" in said.err and f"continuing {damage} after step 4" in said.out


def test_a_checkpoint_is_read_again_before_it_counts(tiny_run, monkeypatch, tmp_path):
    """Trap 23: keys, shapes, finiteness."""

    def spoilt(tensors, *args, **kwargs):
        few = {name: weight for name, weight in tensors["model"].items() if name != "norm.weight"}
        saved(tensors | {"model": few}, *args, **kwargs)

    saved = saving.dcp.save
    monkeypatch.setattr(saving.dcp, "save", spoilt)
    with pytest.raises(ValueError, match="no checkpoint of step 0 .*there is none yet"):
        tiny_run(steps=3)

    def infinite(tensors, *args, **kwargs):
        world_of.local(tensors["model"]["norm.weight"])[0] = float("inf")
        saved(tensors, *args, **kwargs)

    monkeypatch.setattr(saving.dcp, "save", infinite)
    with pytest.raises(ValueError, match="it holds numbers that are not finite"):
        tiny_run(steps=3)
    assert not list((tmp_path / "run").glob("step_*"))


def test_what_would_fail_after_days_fails_before_the_first_step(tiny_run, monkeypatch):
    """Trap 28: a save (above), an evaluation and a sample are tried."""
    with pytest.raises(ValueError, match="--sample has 45 tokens, more than the context window of 32"):
        tiny_run("sample", steps=3, sample="x" * 44)
    monkeypatch.setattr(train, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run = tiny_run("evaluation", steps=3)
        assert not log(run, "loss")


def test_training_goes_on_while_a_checkpoint_is_written(world, tmp_path, monkeypatch):  # noqa: F811
    """What is written are the weights of the step at which the save began."""
    model = build()
    optimizers, guard = train.make_optimizers(model, Config()), train.Guard(6.0, CPU)
    checkpoints = checkpoints_of(tmp_path, Config(), model, optimizers, guard)
    save, trained = saving.dcp.save, threading.Event()

    def wait_and_save(*args, **kwargs):
        assert trained.wait(300), "a step waits for the checkpoint"
        save(*args, **kwargs)

    monkeypatch.setattr(saving.dcp, "save", wait_and_save)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    checkpoints.begin(1)
    train.train_step(model, optimizers, [micro_batch(rows())], 1e-1, Config(), guard)
    assert not (tmp_path / "last").exists()
    trained.set()
    assert checkpoints.finish() is None
    (tmp_path / "run.json").write_text("{}")
    saved = load(tmp_path).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())


def test_every_nth_checkpoint_is_kept_for_good(tiny_run):
    run = tiny_run(steps=14, save_every=2, keep=2, keep_every=4)
    steps = sorted(int(path.name[5:]) for path in run.glob("step_*"))
    assert steps == [0, 4, 8, 12, 14]


def test_the_same_command_gives_the_same_bits(tiny_run):
    first, second = tiny_run("first", steps=8), tiny_run("second", steps=8)
    assert same_bits(first, second) and log(first, "loss") == log(second, "loss")
    assert same_bits(tiny_run("third", steps=8, deterministic=True), first)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_save_stalls_training_for_a_fraction_of_what_writing_takes(world, tmp_path):  # noqa: F811
    """The 110M size; median of five."""
    model = train.build(SIZES["110M"], Config(dtype="fp32"), CPU)
    model.init_weights(0)
    optimizers, guard = train.make_optimizers(model, Config()), train.Guard(6.0, CPU)
    checkpoints = checkpoints_of(tmp_path, Config(keep=1), model, optimizers, guard)
    ratios = []
    for step in range(6):
        started = time.monotonic()
        checkpoints.begin(step)
        stalled = time.monotonic() - started
        assert checkpoints.finish() is None
        ratios.append(stalled / (time.monotonic() - started))
    print(f"stalled for {sorted(ratios[1:])[2]:.1%} of a blocking save")
    assert sorted(ratios[1:])[2] < 0.15


# ---- what a run reads ----


def test_a_run_on_packed_documents_and_on_a_mixture_resumes_exactly_and_says_what_it_read(options, tiny_run, tmp_path):
    """The validation loss of each source is there too; other weights are another run."""
    from conftest import byte_data

    (tmp_path / "more").mkdir()
    sources = (f"{options['data'][0]}:3", str(byte_data(tmp_path / "more", 60)))
    both = dict(data=sources, pack=True, steps=12, micro_batch=2, eval_tokens=2048)
    straight = tiny_run("straight", **both)
    tiny_run("cut", stop_at=5, **both)
    assert same_bits(tiny_run("cut", **both), straight)
    epochs = log(straight, "epochs")[-1]
    assert epochs.keys() == {options["data"][0], sources[1]} and epochs[sources[1]] > epochs[options["data"][0]] / 3
    last = [row for row in map(json.loads, open(straight / "log.jsonl")) if "val_loss" in row][-1]
    each = [last[f"val_loss {folder}"] for folder in epochs]
    assert min(each) <= last["val_loss"] <= max(each) and each[0] != each[1]
    with pytest.raises(ValueError, match="is another dataset than when straight began"):
        tiny_run("straight", **both | {"data": (sources[0].replace(":3", ":2"), sources[1])})


def test_packing_gives_the_same_losses_on_any_number_of_processes(options, tmp_path):
    both = options | {"pack": True, "steps": 6, "micro_batch": 1, "batch_size": 4}
    run_ranks(1, train_here, tmp_path, both | {"out": "one"})
    run_ranks(2, train_here, tmp_path, both | {"out": "two"})
    assert log(tmp_path / "two", "loss") == pytest.approx(log(tmp_path / "one", "loss"), rel=1e-5)
    assert log(tmp_path / "two", "val_loss") == pytest.approx(log(tmp_path / "one", "val_loss"), rel=1e-5)
    assert all(0.7 * 4 * 32 < targets <= 4 * 32 for targets in log(tmp_path / "one", "targets"))


def test_a_step_keeps_packed_documents_apart(world):  # noqa: F811
    """Trap 10."""
    bounds = np.array([0, 5, 19, 32, 40, 64])
    tokens = rows(2).numpy()
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), bounds).to(CPU)
    model = build()
    expected = model.loss(batch.tokens, batch.targets, batch.documents).item() / 64
    outcome = train.train_step(model, [], [batch], 0.0, Config(), train.Guard(6.0, CPU))
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-6)
    assert outcome.loss.item() != pytest.approx(model(batch.tokens, batch.targets).item(), rel=1e-6)
