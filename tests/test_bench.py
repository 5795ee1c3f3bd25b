"""Benchmarks: numbers that agree with each other, memory as it was forecast, and a fair peer."""

import dataclasses
import importlib.util
import json
import statistics
from shutil import which

import pytest
import torch
import torch.distributed as dist

import bench
import model
import train
from bench import Config, Setting
from conftest import command, flags, torchrun
from lib import naming, planning
from lib.cli import git_commit
from lib.world import join_world, local

TINY = dict(size="260K", seq_len=32, micro_batch=2, steps=2, warmup=1, repeats=2, compile="off", dtype="fp32")


@pytest.fixture
def bench_run(tmp_path, monkeypatch):
    """A function that measures in this process and returns the results; flags change the defaults."""
    monkeypatch.setattr(bench, "matrix_product", lambda dtype, device: 1e11)

    def run(**options) -> dict:
        bench.main(Config(**TINY | {"out": str(tmp_path / "results.json")} | options))
        return json.loads((tmp_path / "results.json").read_text())

    return run


def check_numbers(results: dict, processes: int, tokens_per_round: int):
    assert results["processes"] == processes and results["parameters"] == 260_032
    assert results["git_commit"] == git_commit() and results["versions"]["torch"] == torch.__version__
    for row in results["rows"]:
        seconds = statistics.median(row["seconds"])
        assert row["tokens_per_round"] == tokens_per_round and len(row["seconds"]) == 2 and seconds > 0
        assert row["tokens_per_s"] * seconds == pytest.approx(tokens_per_round)
        assert row["tokens_per_s_per_device"] == pytest.approx(row["tokens_per_s"] / processes)
        flops = planning.flops_per_token(model.SIZES["260K"], 32) * row["tokens_per_s_per_device"]
        assert row["share_of_product"] * results["product_flops"][row["dtype"]] == pytest.approx(flops)
        assert row["mfu"] is None  # nobody knows the peak of a CPU


def test_speed_times_seconds_is_the_number_of_tokens(tmp_path):
    options = TINY | {"out": tmp_path / "new" / "results.json", "accumulate": 3}
    said = command("bench.py", *flags(options)).stdout
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    check_numbers(results, 1, 2 * 3 * 32 * 2)
    (row,) = results["rows"]
    assert f"{row['tokens_per_s']:,.0f}" in said and row["name"] in said
    assert results["settings"]["accumulate"] == 3 and results["command"].endswith("--accumulate 3")
    assert (tmp_path / "new" / "results.png").stat().st_size > 1000


def test_the_same_command_measures_several_processes(tmp_path):
    said = torchrun(2, "bench.py", *flags(TINY | {"out": tmp_path / "results.json"})).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    check_numbers(results, 2, 2 * 2 * 32 * 2)
    assert said.count("fp32 compile off") == 1


COMPILED = pytest.param({"dtype": "fp32", "compile": "on"}, marks=pytest.mark.skipif(not which("g++"), reason="no g++"))


FULL_CHUNK = {"dtype": "bf16", "micro_batch": 16}  # of tokens whose logits exist at a time


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, FULL_CHUNK, COMPILED])
def test_measured_memory_is_the_forecast(bench_run, options):
    common = dict(size="15M", seq_len=64, micro_batch=4, steps=1, warmup=0, repeats=1)
    (row,) = bench_run(**common | options)["rows"]
    assert row["peak_bytes"] == pytest.approx(row["forecast_bytes"], rel=0.1)
    assert row["forecast_bytes"] == sum(row["forecast_parts"].values())
    assert row["peak_bytes"] / row["forecast_bytes"] == pytest.approx(row["peak_over_forecast"])


def test_the_peer_takes_turns_and_the_ratio_is_that_of_the_speeds(bench_run):
    results = bench_run(peer="hf", repeats=3, accumulate=2)
    rows = results["rows"]
    assert [row["side"] for row in rows] == ["plainllama", "hf", "hf here"] * 2
    ours, *others = rows[3:]
    for contest, other in zip(results["contests"], others, strict=True):
        assert contest["ratios"] == [b / a for a, b in zip(ours["seconds"], other["seconds"], strict=True)]
        assert len(contest["ratios"]) == 3 and contest["ratio"] == statistics.median(contest["ratios"])
        assert contest["of"] == [ours["name"], other["name"]]
    assert results["versions"]["transformers"]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("size", ["260K", "untied"])
@pytest.mark.parametrize("peer", ["hf", "hf here"])
def test_the_peer_is_the_same_model(peer, size, checkpointing):
    """As many parameters, and with the same weights the same loss and the same next step."""
    pytest.importorskip("transformers")
    shape = model.ModelConfig(32, 2, 4, 2, 64, 96) if size == "untied" else model.SIZES[size]
    device = join_world()
    try:
        setting = Setting("plainllama", "fp32", "off", 2, checkpointing, False)
        config = Config(**TINY, accumulate=2)
        ours, theirs = (
            bench.SIDES[side](dataclasses.replace(setting, side=side), config, shape, device)
            for side in ("plainllama", peer)
        )
        weights = dict(theirs.model.named_parameters())
        for name, p in ours.model.named_parameters():
            same = weights.pop(naming.translate(name, naming.HF_NAMES))
            assert same.shape == p.shape
            local(same.detach()).copy_(local(p.detach()))
        assert not weights
        whole = [torch.cat((batch.tokens, batch.targets[:, -1:]), 1) for batch in ours.batches]
        theirs.batches = [train.Batch(rows, rows, None) for rows in whole]
        losses = [(ours.step().item(), theirs.step().item()) for _ in range(3)]
        for mine, other in losses:
            assert mine == pytest.approx(other, abs=1e-4)
        assert losses[2][0] < losses[0][0]
    finally:
        dist.destroy_process_group()


def test_each_side_chooses_what_is_compiled_and_in_which_arithmetic():
    base = Setting("plainllama", "bf16", "blocks", 2, "none", False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def ways(side: str, device: torch.device, **options) -> list[str]:
        return [f"{s.dtype} {s.compile}" for s in bench.variants(base, side, Config(**options), device)]

    assert ways("plainllama", gpu) == ["bf16 off", "bf16 blocks"]
    assert ways("hf", gpu, compile="on") == ["bf16 whole"]
    assert ways("plainllama", cpu) == ["bf16 off", "bf16 blocks", "fp32 off", "fp32 blocks"]
    assert ways("hf here", cpu, dtype="bf16") == ["bf16 off", "bf16 whole"]


@pytest.mark.slow
def test_the_fastest_of_all_variants_is_measured(bench_run):
    results = bench_run(peer="hf", compile="auto", dtype="auto")
    *tried, ours, theirs, here = results["rows"]
    assert len(tried) == 4 + 4 + 4
    for side in (ours, theirs, here):
        best = max((row for row in tried if row["side"] == side["side"]), key=lambda row: row["tokens_per_s"])
        assert best["name"] == side["name"]


def test_the_sweep_names_the_fastest_row(bench_run, capsys):
    results = bench_run(sweep=True, micro_batch=2, repeats=1)
    rows = results["rows"]
    assert results["fastest"] == max(rows, key=lambda row: row["tokens_per_s"])["name"]
    assert {row["checkpointing"] for row in rows} == {"none", "selective", "2", "full"}
    assert {row["micro_batch"] for row in rows} == {1, 2}
    assert f"fastest: {results['fastest']}" in capsys.readouterr().out


def test_the_sweep_leaves_out_what_does_not_fit(bench_run, capsys, monkeypatch):
    """Neither what the forecast rules out, nor what runs out of memory all the same, ends it."""
    needs = {1: 1, 2: 1, 4: 2, 8: 1}
    monkeypatch.setattr(bench.Bench, "forecast", lambda self, setting: {"all": needs[setting.micro_batch]})
    monkeypatch.setattr(bench, "capacity", lambda device: 1)
    original = bench.Bench.measure

    def measure(self, setting: Setting, rounds: int) -> dict:
        if setting.checkpointing == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        row = original(self, setting, rounds)
        return row | {"seconds": [0.1]}  # never slower than the row before

    monkeypatch.setattr(bench.Bench, "measure", measure)
    results = bench_run(sweep=True, micro_batch=8, repeats=1, warmup=0)
    tried = [(row["checkpointing"], row["micro_batch"]) for row in results["rows"]]
    assert tried == [(mode, size) for mode in ("none", "selective", "2") for size in (1, 2)]
    assert capsys.readouterr().out.count("does not fit") == 4
    monkeypatch.setattr(bench, "capacity", lambda device: 0)
    with pytest.raises(ValueError, match="--size 260K with these flags does not fit in memory"):
        bench_run(sweep=True, out="")


def test_packed_rows_are_measured_beside_the_same_rows_unmasked(bench_run):
    results = bench_run(pack=True)
    assert [row["pack"] for row in results["rows"]] == [True, False] and results["contests"][0]["ratio"] > 0
    setting, config, shape = Setting("plainllama", "fp32", "off", 50, "none", True), Config(**TINY), model.SIZES["260K"]
    device = join_world()
    try:
        (packed,) = bench.random_batches(setting, config, shape, device)
        (plain,) = bench.random_batches(dataclasses.replace(setting, pack=False), config, shape, device)
    finally:
        dist.destroy_process_group()
    assert torch.equal(packed.tokens, plain.tokens) and torch.equal(packed.targets, plain.targets)
    lengths = packed.documents.bounds.diff().float()
    assert plain.documents is None and lengths.sum() == 50 * 32 and 5 < lengths.mean() < 10
    assert {i * 32 for i in range(51)} <= set(packed.documents.bounds.tolist())


def test_a_bad_flag_is_refused_in_one_sentence():
    done = command("bench.py", "--size", "8B", check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"bench.py: --size 8B is not one of {', '.join(model.SIZES)}\n"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(micro_batch=0), "--micro_batch 0 must be at least 1"),
        (dict(warmup=-1), "--warmup -1 must not be negative"),
        (dict(out="results.txt"), "--out results.txt must end in .json"),
        (dict(sweep=True, pack=True), "only one of --sweep, --pack, --peer, --decode, --busy and --grow"),
        (dict(peer="hf", checkpointing="2"), "--checkpointing 2 --optimizer adamw does not go with --peer hf"),
        (dict(shard_over=3), "--shard_over 3 must divide the 1 processes"),
        (dict(checkpointing="most"), "--checkpointing most is not none"),
    ],
)
def test_a_flag_out_of_range_is_named_with_its_value(bench_run, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench_run(**options)


def test_a_missing_peer_is_said_before_anything_is_measured(bench_run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--peer hf needs the package transformers, which is not installed"):
        bench_run(peer="hf")
