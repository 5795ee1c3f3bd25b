"""What only a GPU can show. PLAINLLAMA_TEST_DEVICE=cpu runs the same code without one, to try the tests themselves."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import ROOT, TINY_RUN, checkpoints_of, command, flags, forecast_of
from data import Batch, Mixture
from lib.checkpointing import KERNELS
from lib.decoding import prepare
from lib.packed import Documents, attend_within
from lib.recording import Recorded
from lib.rows import local_rows
from lib.sampling import Sampling
from lib.world import join_world
from model import SIZES, ModelConfig, empty, load
from sample import generate
from test_dpo import write_pairs
from test_train import log, same_bits

CUDA = os.environ.get("PLAINLLAMA_TEST_DEVICE", "cuda") == "cuda"
if CUDA and not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CPU = torch.device("cpu")
SHAPE = ModelConfig(dim=256, num_layers=4, num_heads=8, num_kv_heads=2, ffn_dim=512, vocab_size=258, max_seq_len=256)


@pytest.fixture(scope="module")
def device():
    yield join_world()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def clean():
    """What one test compiled or left in memory does not change the next."""
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def build(device, dtype="bf16", compiled=False, shape=SHAPE, **options) -> tuple:
    """The arguments of train_step without batches: model, optimizers, guard and flags."""
    config = train.Config(dtype=dtype, compile="on" if compiled else "off", **options)
    model = train.build(shape, config, device)
    model.init_weights(0)
    return model, train.make_optimizers(model, config), train.Guard(config.spike, device), config


def steps(parts: tuple, batches: list, count: int, lr: float = 3e-3) -> list[float]:
    model, optimizers, guard, config = parts
    return [train.train_step(model, optimizers, batches, lr, config, guard).loss.item() for _ in range(count)]


def random_batch(device, rows=4, seq_len=256, pack=False, shape=SHAPE) -> train.Batch:
    """Of documents of about 64 tokens where packed."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(shape.vocab_size, size=(rows, seq_len + 1))
    begins = draw.random((rows, seq_len)) < 1 / 64
    begins[:, 0] = True  # no document goes on in the next row
    bounds = np.append(begins.ravel().nonzero()[0], begins.size) if pack else None
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), bounds).to(device)


def gradients(model, batch: train.Batch) -> dict[str, torch.Tensor]:
    model.loss(batch.tokens, batch.targets, batch.documents).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the norm of theirs."""
    return ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item()


def largest_distance(mine: dict, theirs: dict) -> float:
    return max(distance(mine[name], theirs[name]) for name in theirs)


# ---- arithmetic ----


def by_hand(q, k, v, lengths: list[int]) -> torch.Tensor:
    """Causal attention of q (1, n, H, K) on k, v (1, n, G, K), each document alone, as in the textbook."""
    k, v = (heads.repeat_interleave(q.size(2) // k.size(2), 2) for heads in (k, v))
    outs = []
    for q_part, k_part, v_part in zip(*(heads.split(lengths, 1) for heads in (q, k, v))):
        scores = torch.einsum("bqhk,bshk->bhqs", q_part, k_part) / q.size(-1) ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outs.append(torch.einsum("bhqs,bshk->bqhk", scores.masked_fill(future, -torch.inf).softmax(-1), v_part))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_attention_over_documents_is_that_of_each_document_alone(head_dim, num_kv_heads, device):
    lengths = [1, 40, 87, 100, 28]  # two rows of 128
    draw = torch.Generator().manual_seed(0)
    rounded = [torch.randn(2, 128, n, head_dim, generator=draw) for n in (8, num_kv_heads, num_kv_heads)]
    rounded = [heads.to(device, torch.bfloat16).requires_grad_() for heads in rounded]
    exact = [heads.detach().float().reshape(1, 256, -1, head_dim).requires_grad_() for heads in rounded]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    mine = attend_within(*rounded, Documents(None, bounds)).reshape(1, 256, 8, head_dim)
    theirs = by_hand(*exact, lengths)
    assert mine.dtype == torch.bfloat16 and distance(mine, theirs) < 0.01
    upstream = torch.randn(theirs.shape, generator=draw).to(device)
    mine.backward(upstream.bfloat16())
    theirs.backward(upstream)
    for rounded_heads, exact_heads in zip(rounded, exact):
        assert distance(rounded_heads.grad.reshape(exact_heads.shape), exact_heads.grad) < 0.02


@pytest.mark.parametrize("pack", [False, True])
def test_training_in_bf16_on_a_gpu_follows_fp32_on_a_cpu(pack, device):
    exact, rounded = build(CPU, "fp32", pack=pack), build(device, pack=pack)
    with torch.no_grad():
        for mine, theirs in zip(rounded[0].parameters(), exact[0].parameters()):
            local_rows(mine)[1].copy_(local_rows(theirs)[1])
    expected = steps(exact, [random_batch(CPU, pack=pack)], 10)
    found = steps(rounded, [random_batch(device, pack=pack)], 10)
    assert expected[-1] < expected[0] - 0.3 and found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("pack", [False, True])
def test_compiled_blocks_are_one_graph_and_compute_the_same(pack, device):
    batch = random_batch(device, pack=pack)
    eager = gradients(build(device, pack=pack)[0], batch)
    compiled = gradients(build(device, compiled=True, pack=pack)[0], batch)
    if CUDA or not pack:  # the loop over documents on a CPU is not compiled
        graphs = counters["stats"]["unique_graphs"]  # of the blocks, the last norm, and the loss
        assert not counters["graph_break"] and graphs == 3
    assert largest_distance(compiled, eager) < 0.03


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_way_of_checkpointing_gives_the_same_gradients(compiled, pack, device):
    batch = random_batch(device, pack=pack)
    kept = gradients(build(device, compiled=compiled, pack=pack)[0], batch)
    for mode in ("selective", "full", "2"):
        again = gradients(build(device, compiled=compiled, checkpointing=mode, pack=pack)[0], batch)
        assert largest_distance(again, kept) < (0.03 if compiled else 0.005), mode


class CountAttention(TorchDispatchMode):
    """How often the kernel of attention was called in a forward pass, also one that is done again."""

    def __enter__(self):
        self.calls = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.calls += any(kernel in name for kernel in KERNELS) and "backward" not in name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pack", [False, True])
def test_selective_checkpointing_does_not_compute_attention_again(pack, device):
    calls = {}
    for mode in ("none", "selective", "full"):
        with CountAttention() as count:
            gradients(build(device, checkpointing=mode, pack=pack)[0], random_batch(device, pack=pack))
        calls[mode] = count.calls
    assert 0 < calls["none"] == calls["selective"] == calls["full"] / 2


# ---- memory and time ----


@pytest.mark.parametrize("compiled, options", [
    (False, dict(checkpointing="none")),
    (False, dict(checkpointing="none", micro_batch=2)),
    (False, dict(checkpointing="none", micro_batch=2, reduce_each=True)),
    (False, dict(checkpointing="selective")),
    (False, dict(checkpointing="2")),
    (False, dict(checkpointing="full")),
    (False, dict(checkpointing="full", optimizer="muon")),
    (True, dict(checkpointing="none")),
    (True, dict(checkpointing="selective")),
    (True, dict(checkpointing="full", micro_batch=2)),
])  # fmt: skip
def test_the_memory_forecast_is_within_a_tenth_of_the_peak(compiled, options, device):
    seq_len = 2048 if CUDA else 64
    shape = dataclasses.replace(SIZES["1.1B" if CUDA else "260K"], num_layers=6, max_seq_len=seq_len)
    options = dict(micro_batch=4) | options | dict(batch_size=4, seq_len=seq_len)
    before = torch.cuda.memory_allocated() if CUDA else 0
    parts = build(device, compiled=compiled, shape=shape, **options)
    batches = [random_batch(device, options["micro_batch"], seq_len, shape=shape)] * (4 // options["micro_batch"])
    steps(parts, batches, 2, lr=1e-4)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    steps(parts, batches, 1, lr=1e-4)
    expected = sum(forecast_of(shape, parts[3], 1, compiled).values())
    if not CUDA:
        pytest.skip("only a GPU counts its memory")
    found = torch.cuda.max_memory_allocated() - before
    sizes = f"peak {found / 2**30:.2f} GiB, forecast {expected / 2**30:.2f}, ratio {found / expected:.3f}"
    print(f"\nmemory: {'compiled' if compiled else 'eager'} {options}: {sizes}")
    assert found == pytest.approx(expected, rel=0.1), sizes


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_not_logged_never_waits_for_the_gpu(compiled, pack, device, tiny_data):
    data = Mixture((str(tiny_data),), "train", 64, pack)
    options = dict(batch_size=8, micro_batch=4, seq_len=64, on_spike="skip", pack=pack)
    model, optimizers, guard, config = build(device, compiled=compiled, **options)
    try:
        feed = data.feed(config, range(10), device)
        for step in range(10):  # warm after some, packed rows having had different numbers of documents
            with waiting_is_an_error() if CUDA and step > 5 else contextlib.nullcontext():
                outcome = train.train_step(model, optimizers, next(feed), 3e-3, config, guard)
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    assert outcome.loss.item() < 6


def test_a_checkpoint_is_of_its_step_and_holds_training_up_less_than_a_blocking_one(device, tmp_path):
    shape = dataclasses.replace(SIZES["1.1B"], num_layers=2) if CUDA else dataclasses.replace(SHAPE, dim=1024)
    model, optimizers, guard, config = build(device, shape=shape)
    weights = {name: p.detach().full_tensor().to(CPU, copy=True) for name, p in model.named_parameters()}
    (tmp_path / "run.json").write_text("{}")
    checkpoints = checkpoints_of(tmp_path, config, model, optimizers, guard)
    checkpoints.begin(0)  # also takes the memory to copy to
    assert checkpoints.finish() is None
    started = time.perf_counter()
    checkpoints.begin(1)
    held_up = time.perf_counter() - started
    with torch.no_grad():  # training goes on while it is written
        for p in model.parameters():
            p.zero_()
    assert checkpoints.finish() is None
    blocking = time.perf_counter() - started
    print(f"\ncheckpoint: training held up for {held_up:.2f} s, saved after {blocking:.2f} s")
    assert held_up < blocking / 2
    saved = load(tmp_path)
    assert all(torch.equal(p, weights[name]) for name, p in saved.named_parameters())


# ---- whole runs ----

RUN = TINY_RUN | dict(dim=64, dtype="bf16", steps=300, save_every=1000, eval_every=1000)


def run_words(data, out: str, **options) -> list[str]:
    return flags(RUN | {"data": data, "out": out} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(tiny_data, folder):
    command("train.py", *run_words(tiny_data, "straight"), "--deterministic", cwd=folder)
    return folder / "straight"


def test_a_deterministic_run_gives_the_same_bits_again(straight, tiny_data, folder):
    command("train.py", *run_words(tiny_data, "again"), "--deterministic", cwd=folder)
    assert same_bits(folder / "again", straight) and log(folder / "again", "loss") == log(straight, "loss")


def test_a_deterministic_run_of_packed_documents_gives_the_same_bits_again(tiny_data, folder):
    for name in ("packed", "packed_again"):
        command("train.py", *run_words(tiny_data, name, steps=50), "--deterministic", "--pack", cwd=folder)
    assert same_bits(folder / "packed_again", folder / "packed")


def test_a_run_stopped_by_sigterm_and_continued_is_the_straight_run(straight, tiny_data, folder):
    words = [sys.executable, str(ROOT / "train.py"), *run_words(tiny_data, "stopped"), "--deterministic"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    lines, deadline = folder / "stopped" / "log.jsonl", time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") > 5) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "SIGTERM: stopped after step" in output
    assert (folder / "stopped" / "last").read_text() < "step_00000300"
    command("train.py", "--resume", "stopped", cwd=folder)
    assert same_bits(folder / "stopped", straight) and log(folder / "stopped", "loss") == log(straight, "loss")


@pytest.fixture(scope="module")
def half_a_run(tiny_data, folder):
    """40 of 60 steps in fp32."""
    command("train.py", *run_words(tiny_data, "half", steps=60, stop_at=40, dtype="fp32", eval_every=40), cwd=folder)
    return folder / "half"


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_a_checkpoint_of_a_gpu_is_evaluated_and_continued_on_a_cpu(half_a_run, device, folder):
    values = json.loads((half_a_run / "run.json").read_text())["config"]
    config = train.Config(**values | {"data": tuple(values["data"])})
    val = Mixture(config.data, "val", config.seq_len)
    scores = train.evaluate(load(half_a_run), val, config, CPU)
    assert scores["val_loss"] == pytest.approx(log(half_a_run, "val_loss")[-1], rel=1e-4)
    shutil.copytree(half_a_run, folder / "whole")
    done = command("train.py", "--resume", "whole", cwd=folder, env=NO_GPU)
    assert "continuing whole after step 40" in done.stdout
    losses = log(folder / "whole", "loss")
    assert len(losses) == 60 and sum(losses[40:50]) < sum(losses[30:40])


def test_sampling_on_a_gpu_writes_what_a_cpu_writes(half_a_run, folder):
    words = ("sample.py", "--model", str(half_a_run), "--prompt", "Document", "--max_new_tokens", "40")
    greedy = ("--temperature", "0", "--dtype", "fp32")
    mine, theirs = command(*words, *greedy).stdout, command(*words, *greedy, env=NO_GPU).stdout
    assert mine == theirs and len(mine) > 20
    assert command(*words, "--num", "2").stdout.count("--- ") == 2  # bf16 on a GPU


def test_recorded_steps_write_on_a_gpu_what_plain_steps_write(device):
    """Rows end at different times, and the text outgrows the first room."""
    model = empty(SHAPE, device).eval()
    model.init_weights(0)
    prompts = [[1, 2, 3], [4] * 20, [5]]
    settings = dict(max_new_tokens=300, sampling=Sampling(temperature=1.0), end_ids=(7, 8))
    expected = generate(model, prompts, **settings)
    prepare(model, "none")
    assert isinstance(model.hidden, Recorded) == CUDA
    assert [generate(model, prompts, **settings) for _ in range(2)] == [expected] * 2
    assert len({len(text) for text in expected}) > 1


def test_muon_trains_on_a_gpu(tiny_data, folder):
    command("train.py", *run_words(tiny_data, "muon", steps=60, optimizer="muon"), cwd=folder)
    losses = log(folder / "muon", "loss")
    assert losses[-1] < losses[0] - 1 and max(losses) < losses[0] + 0.5


def tune_words(data, base, out: str, **options) -> list[str]:
    """As run_words; the model and its shape are those of base."""
    shape = ("size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
    run = {name: value for name, value in RUN.items() if name not in shape}
    return flags(run | {"data": data, "init_from": base, "out": out} | options)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_train_on_a_gpu(quantize, half_a_run, tiny_data, folder):
    """LoRA, and QLoRA, whose base is in 4 bits."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
        if torch.__version__ < "2.13":
            pytest.skip("FSDP of this PyTorch shards no whole numbers")
    out = f"adapters_{quantize}"
    options = dict(lora_rank=8, quantize=quantize, learning_rate=1e-2, steps=60)
    command("train.py", *tune_words(tiny_data, half_a_run, out, **options), cwd=folder)
    losses = log(folder / out, "loss")
    assert sum(losses[-10:]) < sum(losses[:10])
    words = ("--model", out, "--prompt", "Document", "--max_new_tokens", "5")
    assert command("sample.py", *words, cwd=folder).stdout


def test_dpo_trains_on_a_gpu(tiny_data, folder):
    command("train.py", *run_words(tiny_data, "base", seq_len=64, steps=4), cwd=folder)
    data = write_pairs(folder / "pairs", tiny_data, train=61, val=21)
    options = dict(seq_len=64, learning_rate=3e-3, steps=40, eval_every=20)
    command("train.py", *tune_words(data, "base", "dpo", **options), cwd=folder)
    assert log(folder / "dpo", "val_accuracy")[-1] > 0.9
