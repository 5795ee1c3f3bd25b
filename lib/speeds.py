"""The table of bench.py: a line for each setting that was measured."""

TITLES = f"{'':48}   tokens/s   a device     MFU a product       GiB of forecast first step s"


def line_of(row: dict) -> str:
    """What bench.Bench measured, below TITLES."""
    shares = []
    for name in ("mfu", "share_of_product", "peak_over_forecast"):
        shares.append("-" if row[name] is None else f"{row[name]:.1%}")
    mfu, of_product, of_forecast = shares
    speeds = f"{row['tokens_per_s']:10,.0f} {row['tokens_per_s_per_device']:10,.0f}"
    memory = f"{row['peak_bytes'] / 2**30:9.3f} {of_forecast:>11}"
    first = f"{row['first_step_seconds']:12.1f}"
    return f"{row['name']:48} {speeds} {mfu:>7} {of_product:>9} {memory} {first}"
