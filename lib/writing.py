"""How fast a model writes, for bench.py --decode, beside transformers and what memory gives."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from lib.decoding import prepare
from lib.peers import CACHES, HuggingFaceWriter
from lib.rounds import compare, in_turns
from lib.timing import read_speed, timed
from lib.world import compute_dtype

BATCHES = (1, 4, 16)  # rows that are written together
PROMPT = 16  # tokens that each of them begins with
NEW = 64  # tokens that are then written to each
PREFILL = 200  # tokens of a prompt after which one token is written
TITLES = f"{'':16} {'':18}   tokens/s  of reading   ratio (rounds)"
LINE = "{job:16} {name:18} {tokens_per_s:10,.1f} {share:>11}   {ratio}"

Prompts = list[list[int]]
Write = Callable[[Prompts, int], Prompts]


class Job(NamedTuple):
    name: str
    rows: int
    prompt: int  # tokens of a row that are there
    new: int  # tokens of a row that are written, each by a pass over all weights
    tokens: int  # that the speed counts


class Way(NamedTuple):
    """One of those who write."""

    name: str
    dtype: str
    num_bytes: int  # of weights, that a pass reads
    writes: list[Write]  # to choose from, the fastest counts


def jobs() -> list[Job]:
    written = [Job(f"batch {rows}", rows, PROMPT, NEW, rows * NEW) for rows in BATCHES]
    return [*written, Job(f"prefill of {PREFILL}", 1, PREFILL, 1, PREFILL)]


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that a pass reads: all but embeddings, of which it looks up single rows."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    return sum(p.nbytes for p in parameters)


def our_kinds(dtype: str, device: torch.device) -> list[str]:
    """What --dtype stands for, and on a CPU with auto whole numbers too."""
    if dtype != "auto":
        return [dtype]
    return ["fp32", "bf16", "int8"] if device.type == "cpu" else ["fp32", "bf16"]


def ways_to_write(config, shape, device: torch.device, generate: Callable) -> list[Way]:
    """Models of random weights, as sample.py prepares them; with --peer hf also transformers'."""
    ours, theirs = [], []
    for kind in our_kinds(config.dtype, device):
        dtype = compute_dtype("fp32" if kind == "int8" else kind, device)
        with device:
            model = shape.build()
        model.init_weights()
        model.to(dtype).eval()
        if config.peer == "hf" and kind != "int8":
            writers = [HuggingFaceWriter(model, cache) for cache in CACHES]
            writes = [writer.write for writer in writers]
            theirs.append(Way(f"transformers {kind}", kind, bytes_read(model), writes))
        model = prepare(model, "int8" if kind == "int8" else "none")
        write = partial(generate, model)
        ours.append(Way(f"plainllama {kind}", kind, bytes_read(model), [write]))
    return ours + theirs


def fastest(way: Way, prompts: Prompts, new: int, device: torch.device) -> tuple[int, Write]:
    """The fastest of a way's, by one trial after one that is not timed, and its number."""
    seconds = []
    for write in way.writes:
        written = write(prompts, new)
        assert [len(row) for row in written] == [new] * len(prompts), f"{way.name} wrote less"
        seconds.append(timed(partial(write, prompts, new), 1, device))
    number = seconds.index(min(seconds))
    return number, way.writes[number]


def measure_job(job: Job, ways: list[Way], config, shape, device: torch.device) -> list[dict]:
    """A row for each way, in turns."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(shape.vocab_size, (job.rows, job.prompt), generator=draw).tolist()
    actions, rows = [], []
    for way in ways:
        number, write = fastest(way, prompts, job.new, device)
        actions.append(partial(timed, partial(write, prompts, job.new), 1, device))
        row = {"job": job.name, "name": way.name, "dtype": way.dtype, "weight_bytes": way.num_bytes}
        if len(way.writes) > 1:
            row["cache"] = CACHES[number]
        rows.append(row)
    for row, seconds in zip(rows, in_turns(actions, config.repeats)):
        row |= {"seconds": seconds, "tokens_per_round": job.tokens, "passes": job.new}
        row["tokens_per_s"] = job.tokens / median(seconds)
    return rows


def contests(rows: list[dict]) -> list[dict]:
    """Each of ours of a job against theirs of the same dtype; int8 against their fastest."""
    theirs = {row["dtype"]: row for row in rows if row["name"].startswith("transformers")}
    if not theirs:
        return []
    best = max(theirs.values(), key=lambda row: row["tokens_per_s"])
    found = []
    for row in rows:
        if row["name"].startswith("plainllama"):
            other = theirs.get(row["dtype"], best)
            found.append({"job": row["job"]} | compare(row, other))
    return found


def share_of_reading(row: dict, bandwidth: float) -> float:
    """What part of the time reading the weights takes, at so many bytes a second.

    This is tokens/s × bytes of the weights read a token / bandwidth. Above 1 the weights come from
    a cache.
    """
    bytes_a_token = row["weight_bytes"] * row["passes"] / row["tokens_per_round"]
    return row["tokens_per_s"] * bytes_a_token / bandwidth


def measure_writing(config, shape, device: torch.device, generate: Callable, say: Callable) -> dict:
    """Rows and contests of every job; says each line as it is there.

    config is a bench.Config, shape a model.ModelConfig, generate is sample.generate.
    """
    bandwidth = read_speed(device)
    ways = ways_to_write(config, shape, device, generate)
    say(f"memory is read at {bandwidth / 1e9:.3g} GB/s")
    say(TITLES)
    all_rows, all_contests = [], []
    for job in jobs():
        rows = measure_job(job, ways, config, shape, device)
        found = contests(rows)
        for row in rows:
            row["share_of_reading"] = share_of_reading(row, bandwidth)
            say(line_of(row, found))
        all_rows += rows
        all_contests += found
    return {"bandwidth": bandwidth, "rows": all_rows, "contests": all_contests}


def line_of(row: dict, found: list[dict]) -> str:
    """A row below TITLES, with the contest that it is the first of."""
    ratio = f"({row['cache']} cache)" if "cache" in row else "-"
    for contest in found:
        if contest["of"][0] == row["name"]:
            rounds = ", ".join(f"{one:.2f}" for one in contest["ratios"])
            ratio = f"{contest['ratio']:.2f} × {contest['of'][1]} ({rounds})"
    return LINE.format(**row, share=f"{row['share_of_reading']:.1%}", ratio=ratio)
