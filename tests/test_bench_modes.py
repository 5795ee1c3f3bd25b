"""bench.py's other modes: how fast a model writes, steps beside busy processes, and growth."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import lib.busy
import lib.growth
import lib.timing
import lib.writing
from bench import Config
from conftest import ROOT, command, flags, random_model, run_ranks
from lib.bench_flags import check_alone
from lib.busy import busy_processes, measure_beside
from lib.decoding import has_packed, prepare
from lib.growth import cases, in_order
from lib.writing import Way, bytes_read, contests, fastest, ways_to_write
from model import SIZES, ModelConfig, Transformer
from sample import generate

CPU = torch.device("cpu")
TINY = dict(size="260K", seq_len=32, micro_batch=2, steps=2, warmup=1, repeats=2, compile="off", dtype="fp32")
UNTIED = ModelConfig(32, 2, 4, 2, 64, 96)


@pytest.fixture
def bench_run(tmp_path, monkeypatch):
    """A function that measures in this process and returns the results; flags change the defaults."""
    monkeypatch.setattr(bench, "matrix_product", lambda dtype, device: 1e11)
    monkeypatch.setattr(lib.writing, "read_speed", lambda device: 1e9)
    monkeypatch.setattr(lib.writing, "BATCHES", (1, 3))
    monkeypatch.setattr(lib.writing, "NEW", 4)

    def run(name: str = "results.json", **options) -> dict:
        bench.main(Config(**TINY | {"out": str(tmp_path / name)} | options))
        return json.loads((tmp_path / name).read_text())

    return run


# ---- writing ----


def test_every_job_is_written_by_generate_in_every_way(bench_run, monkeypatch):
    asked = []

    def watched(model, prompts, new):
        assert new < 5 and len({len(prompt) for prompt in prompts}) == 1
        asked.append((len(prompts), len(prompts[0]), new))
        return generate(model, prompts, new)

    monkeypatch.setattr(bench, "generate", watched)
    results = bench_run(decode=True, dtype="auto", repeats=2)
    shapes = [(1, 16, 4), (3, 16, 4), (1, 200, 1)]
    assert list(dict.fromkeys(asked)) == shapes
    # in each of three ways once to warm up, in one trial, and in two rounds
    assert [asked.count(shape) for shape in shapes] == [12, 12, 12]
    names = ["plainllama fp32", "plainllama bf16", "plainllama int8"]
    jobs = ["batch 1", "batch 3", "prefill of 200"]
    assert [(row["job"], row["name"]) for row in results["rows"]] == list(itertools.product(jobs, names))
    assert results["bandwidth"] == 1e9 and results["contests"] == []


def test_tokens_and_the_share_of_reading_are_those_of_the_seconds(bench_run):
    rows = bench_run(decode=True, dtype="auto")["rows"]
    # 260K by hand: 259,328 numbers in matrices of 3,512 rows, and 704 in norms
    weight_bytes = {"fp32": 4 * 260_032, "bf16": 2 * 260_032, "int8": 259_328 + 2 * 3_512 + 4 * 704}
    if has_packed():  # norms are fp32 then
        weight_bytes["bf16"] += 2 * 704
    tokens = {"batch 1": (4, 4), "batch 3": (12, 4), "prefill of 200": (200, 1)}
    for row in rows:
        num_tokens, passes = tokens[row["job"]]
        assert len(row["seconds"]) == 2 and row["weight_bytes"] == weight_bytes[row["dtype"]]
        seconds = sum(row["seconds"]) / 2
        assert row["tokens_per_s"] == pytest.approx(num_tokens / seconds)
        reading = passes * weight_bytes[row["dtype"]] / 1e9
        assert row["share_of_reading"] == pytest.approx(reading / seconds)


def test_a_pass_reads_all_weights_but_those_it_looks_up():
    model = Transformer(UNTIED)
    read = sum(p.nbytes for name, p in model.named_parameters() if name != "embedding.weight")
    assert bytes_read(model) == read
    tied = Transformer(SIZES["260K"])
    assert bytes_read(tied) == 4 * 260_032 == bytes_read(prepare(tied, "none"))


@pytest.mark.parametrize("shape", [UNTIED, SIZES["260K"]])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_peer_writes_the_same_text_with_the_same_weights(cache, shape):
    pytest.importorskip("transformers")
    from lib.peers import HuggingFaceWriter

    model = random_model(shape)
    writer = HuggingFaceWriter(model, cache)
    assert writer.model.lm_head.weight.data_ptr() == model.unembedding.weight.data_ptr()
    prompts = torch.randint(shape.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    ours = generate(prepare(model, "none"), prompts, 12)
    assert writer.write(prompts, 12) == ours
    assert [len(row) for row in ours] == [12] * 3


def test_the_peer_takes_turns_and_is_in_the_results(bench_run):
    pytest.importorskip("transformers")
    results = bench_run(decode=True, peer="hf", repeats=3)
    assert [row["name"] for row in results["rows"]] == ["plainllama fp32", "transformers fp32"] * 3
    for job, (ours, theirs) in zip(results["contests"], zip(results["rows"][::2], results["rows"][1::2])):
        assert job["job"] == ours["job"] and job["of"] == ["plainllama fp32", "transformers fp32"]
        assert job["ratios"] == [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        assert theirs["cache"] in ("dynamic", "static") and theirs["weight_bytes"] == ours["weight_bytes"]
    assert results["versions"]["transformers"]


def test_whole_numbers_are_compared_with_the_fastest_of_the_others():
    def row(name: str, *seconds: float) -> dict:
        return {"job": "j", "name": name, "dtype": name.split()[1], "seconds": seconds, "tokens_per_s": 1 / seconds[1]}

    theirs = [row("transformers fp32", 8, 8, 8), row("transformers bf16", 4, 4, 8)]
    ours = [row("plainllama fp32", 2, 4, 1), row("plainllama bf16", 1, 1, 1), row("plainllama int8", 2, 1, 2)]
    found = contests(ours + theirs)
    assert [one["of"][1] for one in found] == ["transformers fp32", "transformers bf16", "transformers bf16"]
    assert [one["ratio"] for one in found] == [4, 4, 4]
    assert found[2]["ratios"] == [2, 4, 4] and contests(ours) == []


def test_the_fastest_cache_counts(monkeypatch):
    def slow(prompts, new):
        return [[7] * new for _ in prompts]

    def quick(prompts, new):
        return [[8] * new for _ in prompts]

    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(lib.writing, "timed", lambda action, times, device: next(seconds))
    assert fastest(Way("x", "fp32", 0, [slow, quick]), [[1], [2]], 3, CPU) == (1, quick)
    with pytest.raises(AssertionError, match="wrote less"):
        fastest(Way("x", "fp32", 0, [lambda prompts, new: [[1]]]), [[1]], 3, CPU)


def test_a_gpu_writes_without_whole_numbers_and_a_dtype_is_taken_alone():
    assert lib.writing.our_kinds("auto", torch.device("cuda")) == ["fp32", "bf16"]
    (way,) = ways_to_write(Config(dtype="bf16"), SIZES["260K"], CPU, generate)
    assert (way.name, way.dtype, len(way.writes)) == ("plainllama bf16", "bf16", 1)
    (model,) = way.writes[0].args
    assert model.unembedding.weight.dtype == torch.bfloat16


def test_the_command_measures_memory_and_draws_a_picture(tmp_path):
    options = dict(size="260K", repeats=1, dtype="fp32", out=tmp_path / "r.json")
    said = command("bench.py", "--decode", *flags(options)).stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert "memory is read at" in said and "prefill of 200" in said and results["bandwidth"] > 1e8
    assert [row["job"] for row in results["rows"]] == ["batch 1", "batch 4", "batch 16", "prefill of 200"]
    assert results["parameters"] == 260_032 and (tmp_path / "r.png").stat().st_size > 1000


def test_memorys_speed_is_that_of_a_gibibyte(monkeypatch):
    monkeypatch.setattr(lib.timing, "timed", lambda action, times, device: float(action() == 2**28) / 4)
    assert lib.timing.read_speed(CPU) == 2**32


# ---- beside busy processes ----


def ended(pid: int) -> bool:
    """Whether no process has this id; one that nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition):
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


@needs_proc
def test_busy_processes_work_and_are_gone_afterwards():
    def worked(pid: int) -> float:
        """Seconds of the processor's time, in user code."""
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) / os.sysconf("SC_CLK_TCK")

    with busy_processes(2) as pids:
        assert len(set(pids)) == 2 and os.getpid() not in pids
        wait_until(lambda: all(worked(pid) > 0.3 for pid in pids))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@needs_proc
def test_busy_processes_end_when_their_parent_is_killed():
    words = "import time; from lib.busy import busy_processes\n"
    words += "with busy_processes(1) as pids: print(pids[0], flush=True); time.sleep(100)"
    parent = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    (pid,) = [int(parent.stdout.readline())]
    assert not ended(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: ended(pid))


@pytest.fixture
def started(monkeypatch):
    """The busy processes, as they begin."""
    processes, real = [], subprocess.Popen

    def begin(words):
        processes.append(real(words))
        return processes[-1]

    monkeypatch.setattr(lib.busy, "subprocess", SimpleNamespace(Popen=begin))
    return processes


def running(processes: list) -> int:
    return sum(process.poll() is None for process in processes)


def test_nothing_is_left_running_when_a_step_fails(started, monkeypatch):
    monkeypatch.setattr(lib.busy, "timed", lambda action, times, device: 1.0)

    def step():
        if running(started) == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_beside(step, Config(busy=2, warmup=1, steps=1), 1, CPU, print)
    assert len(started) == 3 and not running(started)


def test_nothing_is_left_running_when_one_cannot_be_started(started, monkeypatch):
    def begin(words, real=lib.busy.subprocess.Popen):
        if started:
            raise OSError("too many processes")
        return real(words)

    monkeypatch.setattr(lib.busy, "subprocess", SimpleNamespace(Popen=begin))
    with pytest.raises(OSError, match="too many"), busy_processes(2):
        raise AssertionError
    assert len(started) == 1 and not running(started)


def test_shares_of_the_quiet_speed_are_those_of_rounds_in_turn(started, monkeypatch):
    beside, seconds = [], iter([1.0, 2.0, 1.0, 4.0, 2.0, 5.0])

    def timed(action, times, device):
        beside.append(running(started))
        assert times == 7 and len(warm) == 2 * len(beside)
        return next(seconds)

    warm, said = [], []
    monkeypatch.setattr(lib.busy, "timed", timed)
    config = Config(busy=1, steps=7, warmup=2, repeats=3)
    quiet, busy = measure_beside(lambda: warm.append(1), config, 100, CPU, said.append)["rows"]
    assert beside == [0, 1, 0, 1, 0, 1] and not running(started)
    assert (quiet["name"], quiet["tokens_per_s"], quiet["share_of_quiet"]) == ("quiet", 100, 1)
    assert (busy["name"], busy["tokens_per_s"], busy["share_of_quiet"]) == ("beside 1 busy", 25, 0.4)
    assert busy["shares"] == [0.5, 0.25, 0.4] and quiet["seconds"] == [1, 1, 2]
    assert said[2].split() == ["beside", "1", "busy", "25", "40.0%", "50.0%,", "25.0%,", "40.0%"]


def test_the_step_that_is_measured_beside_others_is_that_of_a_training_run(bench_run, started):
    results = bench_run(busy=2, repeats=1)
    assert [row["busy"] for row in results["rows"]] == [0, 1, 2] and len(started) == 3 and not running(started)
    for row in results["rows"]:
        assert row["tokens_per_round"] == 2 * 32 * 2
        assert row["tokens_per_s"] * row["seconds"][0] == pytest.approx(128)


# ---- growth ----

SMALL = dict(NAMES=("260K", "laptop"), LENGTHS=(16, 64))


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(lib.growth, name, value)


def test_all_lengths_have_as_many_tokens_a_step(small, bench_run, capsys):
    results = bench_run(grow=True, micro_batch=4, steps=1, repeats=1)
    said = capsys.readouterr().out
    assert [(r["size"], r["seq_len"], r["micro_batch"]) for r in results["rows"]] == [
        ("260K", 16, 8), ("260K", 64, 2), ("laptop", 16, 8), ("laptop", 64, 2),
    ]  # fmt: skip
    params = {"260K": 260_032, "laptop": 4096 * 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 256) + 128}
    attention = {"260K": 12 * 5 * 64, "laptop": 12 * 4 * 128}
    for row in results["rows"]:
        size, speed = row["size"], row["tokens_per_s"]
        assert row["tokens_per_round"] == 128 and speed * row["seconds"][0] == pytest.approx(128)
        flops = 6 * params[size] + attention[size] * row["seq_len"]
        assert row["parameters"] == params[size]
        assert row["share_of_product"] == pytest.approx(flops * speed / 1e11)
        assert row["peak_bytes"] > 16 * params[size] and row["processes"] == 1
        assert f"{row['peak_bytes'] / 2**30:.2f}" in said and f"{speed:,.0f}" in said


def test_what_is_timed_of_a_case_is_cheaper_than_the_budget(small, monkeypatch):
    monkeypatch.setattr(lib.growth, "SECONDS", 2.0)
    config = Config(micro_batch=4, seq_len=32, steps=9, warmup=3, repeats=2, accumulate=2)
    each = (6 * 260_032 + 12 * 5 * 64 * 64) * 128 * 2  # FLOPs of a step of 260K at 64 tokens
    costs = [(cases(config, SIZES, product)[1]) for product in (each * 100, each * 5, each, each / 2, each / 9)]
    assert [(case.steps, case.repeats, case.warmup) for case in costs] == [
        (9, 2, 3), (5, 2, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert {(case.size, case.seq_len, case.micro_batch) for case in costs} == {("260K", 64, 2)}


def grow_on_a_rank(out: str, join: str):
    for name, value in SMALL.items():
        setattr(lib.growth, name, value)
    bench.matrix_product = lambda dtype, device: 1e11
    bench.main(Config(**TINY | dict(grow=True, micro_batch=4, steps=1, repeats=1, out=out, join=join)))


def test_one_and_two_processes_are_joined_in_one_table(small, bench_run, tmp_path):
    alone = bench_run("one.json", grow=True, micro_batch=4, steps=1, repeats=1)["rows"]
    run_ranks(2, grow_on_a_rank, str(tmp_path / "two.json"), str(tmp_path / "one.json"))
    rows = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert rows[:4] == alone and [row["processes"] for row in rows] == [1] * 4 + [2] * 4
    for one, two in zip(rows[:4], rows[4:]):
        assert (one["size"], one["seq_len"]) == (two["size"], two["seq_len"])
        assert two["tokens_per_round"] == 2 * one["tokens_per_round"] and two["micro_batch"] == one["micro_batch"]
    ordered = [(row["size"], row["processes"], row["seq_len"]) for row in in_order(rows)]
    assert ordered == list(itertools.product(("260K", "laptop"), (1, 2), (16, 64)))
    assert (tmp_path / "two.png").stat().st_size > 1000


# ---- flags ----


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(busy=-1), "--busy -1 must not be negative"),
        (dict(decode=True, busy=1), "only one of --sweep, --pack, --peer, --decode, --busy and --grow"),
        (dict(grow=True, peer="hf"), "only one of --sweep, --pack, --peer, --decode, --busy and --grow"),
        (dict(grow=True), "--micro_batch 2 × --seq_len 32 must be a multiple of 4096 tokens"),
        (dict(join="x.json"), "--join x.json goes with --grow alone"),
        (dict(grow=True, seq_len=2048, join="no.json"), "no.json is missing"),
    ],
)
def test_a_flag_that_does_not_fit_is_named_with_its_value(bench_run, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench_run(**options)


@pytest.mark.parametrize("rows", [3, [{"size": "260K"}], ["a"]])
def test_another_result_is_not_joined(bench_run, tmp_path, rows):
    (tmp_path / "other.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match="other.json is no result of bench.py --grow"):
        bench_run(grow=True, seq_len=2048, join=str(tmp_path / "other.json"))


@pytest.mark.parametrize("flag", ["decode", "busy"])
def test_what_one_process_measures_is_refused_to_two(flag):
    config = SimpleNamespace(**{"decode": False, "busy": 0} | {flag: 1})
    check_alone(config, 1)
    with pytest.raises(ValueError, match=f"--{flag} is measured by one process, and here are 2"):
        check_alone(config, 2)
