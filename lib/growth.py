"""How the cost of a step grows with size, length and processes, for bench.py --grow."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lib.errors import BadInput
from lib.planning import count_parameters, flops_per_token
from lib.records import read_json
from lib.speeds import in_percent
from lib.timing import matrix_product

NAMES = ("laptop", "15M", "42M", "110M")  # of model.SIZES
LENGTHS = (256, 1024, 4096)               # tokens of a sequence
SECONDS = 5.0                             # of a matrix product: what is timed of a case costs less
TITLES = f"{'':8} parameters processes      T   tokens/s a product   GiB of forecast   steps"
LINE = (
    "{size:8} {parameters:10,} {processes:9} {seq_len:6} {tokens_per_s:10,.0f} {product:>9} "
    "{gib:5.2f} {forecast:>11} {timed:>7}"
)
FIELDS = (  # that the table and the picture need
    "size", "parameters", "processes", "seq_len", "tokens_per_s", "share_of_product",
    "peak_bytes", "peak_over_forecast", "seconds", "steps",
)  # fmt: skip


def most_steps(flops: float, product: float, steps: int, repeats: int) -> tuple[int, int]:
    """Steps of a round, and rounds, of a case whose step has so many FLOPs in each process.

    At most as many as asked for; fewer where a matrix product, of so many FLOP/s, would take more
    than SECONDS for all of them. At least one step is timed.

    >>> most_steps(flops=1e9, product=1e11, steps=10, repeats=3)
    (10, 3)
    >>> most_steps(flops=5e10, product=1e11, steps=10, repeats=3)
    (3, 3)
    >>> most_steps(flops=2e11, product=1e11, steps=10, repeats=3)
    (1, 2)
    """
    afforded = max(1, int(SECONDS * product / flops))
    rounds = min(repeats, afforded)
    return min(steps, afforded // rounds), rounds


def cases(config, shapes: dict, product: float) -> list:
    """A bench.Config for every size and length, each with as many tokens a step as config's.

    shapes are model.SIZES, product is the FLOP/s of a matrix product.
    """
    tokens = config.micro_batch * config.seq_len
    found = []
    for size, length in itertools.product(NAMES, LENGTHS):
        flops = flops_per_token(shapes[size], length) * tokens * config.accumulate
        steps, rounds = most_steps(flops, product, config.steps, config.repeats)
        changes = dict(size=size, seq_len=length, micro_batch=tokens // length, steps=steps)
        changes |= dict(repeats=rounds, warmup=min(steps, config.warmup))
        found.append(dataclasses.replace(config, **changes))
    return found


def measure_growth(
    measure: Callable, config, shapes: dict, product: float, say: Callable
) -> dict:
    """Rows for all cases, measured by measure(config); says the table, with the rows of --join."""
    rows = rows_to_join(config.join) if config.join else []
    say(TITLES)
    for case in cases(config, shapes, product):
        matrix_product.cache_clear()  # measured again, beside this case
        row = measure(case)
        facts = {"size": case.size, "parameters": count_parameters(shapes[case.size])}
        facts |= {"seq_len": case.seq_len, "steps": case.steps, "processes": dist.get_world_size()}
        row |= facts
        say(line_of(row))
        rows.append(row)
    if config.join:
        say("\n".join(["all together:", *map(line_of, in_order(rows))]))
    return {"rows": rows}


def check_growth(config):
    """Raise ValueError for flags of bench.py that do not go with --grow."""
    tokens, longest = config.micro_batch * config.seq_len, max(LENGTHS)
    if config.grow and tokens % longest:
        given = f"--micro_batch {config.micro_batch} × --seq_len {config.seq_len}"
        raise BadInput(f"{given} must be a multiple of {longest} tokens, the longest row of --grow")
    if config.join and not config.grow:
        raise BadInput(f"--join {config.join} goes with --grow alone")
    if config.join:
        rows_to_join(config.join)


def rows_to_join(path: str) -> list[dict]:
    """The rows of an earlier --grow --out. Raises ValueError for another file."""
    rows = read_json(Path(path), "rows")["rows"]
    if not isinstance(rows, list) or not all(has_fields(row) for row in rows):
        raise BadInput(f"--join {path} is no result of bench.py --grow")
    return rows


def has_fields(row) -> bool:
    return isinstance(row, dict) and all(name in row for name in FIELDS)


def line_of(row: dict) -> str:
    """A row below TITLES."""
    values = dict(row)
    values["product"] = in_percent(row["share_of_product"])
    values["forecast"] = in_percent(row["peak_over_forecast"])
    values["gib"] = row["peak_bytes"] / 2**30
    values["timed"] = f"{len(row['seconds'])} × {row['steps']}"
    return LINE.format(**values)


def in_order(rows: list[dict]) -> list[dict]:
    """Rows of the same size together, then those of as many processes."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    places = [(sizes.index(row["size"]), row["processes"], row["seq_len"]) for row in rows]
    return [row for _, row in sorted(zip(places, rows), key=lambda pair: pair[0])]
