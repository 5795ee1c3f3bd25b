"""The table of bench.py: a line for each setting that was measured."""

TITLES = f"{'':48}   tokens/s   a device     MFU a product       GiB of forecast first step s"
LINE = (
    "{name:48} {tokens_per_s:10,.0f} {tokens_per_s_per_device:10,.0f} {mfu:>7} {product:>9} "
    "{gib:9.3f} {forecast:>11} {first_step_seconds:12.1f}"
)


def in_percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def line_of(row: dict) -> str:
    """What bench.Bench measured, below TITLES."""
    values = dict(row)
    values["mfu"] = in_percent(row["mfu"])
    values["product"] = in_percent(row["share_of_product"])
    values["forecast"] = in_percent(row["peak_over_forecast"])
    values["gib"] = row["peak_bytes"] / 2**30
    return LINE.format(**values)
