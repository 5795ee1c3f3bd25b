"""The pictures by what is in them, and the report of a run."""

import json
import math
from pathlib import Path

import pytest

import lib.plots
import train
from conftest import command
from lib.ablation_plots import draw_arms
from lib.bench_plots import draw_growth, draw_writing
from lib.plots import draw_speeds
from lib.run_report import draw_together, seconds_of, write_report
from lib.runs import read_log
from lib.training_plot import draw_losses, smoothed


@pytest.fixture
def figures(monkeypatch):
    """The panels of every picture that is drawn, as they were when it was written."""
    import contextlib

    seen, real = [], lib.plots.picture

    @contextlib.contextmanager
    def watched(*args, **options):
        with real(*args, **options) as axes:
            yield axes
            panels = axes if hasattr(axes, "__len__") else [axes]
            seen.append([(panel, panel.get_figure()) for panel in panels])

    for place in ("lib.plots", "lib.training_plot", "lib.ablation_plots", "lib.bench_plots"):
        monkeypatch.setattr(f"{place}.picture", watched)
    return seen


def rows_of(count: int, tokens: int = 512) -> list[dict]:
    rows = [{"step": 0, "val_loss": 8.0}]
    for step in range(10, 10 * count + 1, 10):
        loss = 2 + 6 * math.exp(-step / 200) + (0.5 if step % 20 else -0.5)
        rows.append({"step": step, "loss": loss + 1, "mean_loss": loss, "lr": 1e-3 / step, "tokens": step * tokens})
    return [*rows, {"step": 10 * count, "val_loss": 2.1}]


def labels(panel) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_loss_is_smoothed_over_a_faint_one_with_validation_from_step_0(figures, tmp_path):
    rows = rows_of(100)
    draw_losses({"run": rows}, tmp_path / "loss.png", "run", "token", 4096)
    ((axes, _), (below, _)), = figures  # fmt: skip
    faint, smooth, validation, guess = axes.get_lines()
    assert faint.get_alpha() < 0.5 and list(faint.get_ydata()) == [r["mean_loss"] for r in rows if "lr" in r]
    spread = lambda line: max(abs(a - b) for a, b in zip(line.get_ydata()[40:], line.get_ydata()[41:]))
    assert spread(smooth) < 0.4 * spread(faint)
    assert list(validation.get_xdata()) == [0, 1000] and list(validation.get_ydata()) == [8.0, 2.1]
    assert guess.get_ydata()[0] == math.log(4096)
    assert labels(axes) == ["training", "validation", "ln V = 8.32, a guess at random"]
    assert list(below.get_lines()[0].get_ydata()) == [r["lr"] for r in rows if "lr" in r]
    (tokens,) = axes.child_axes
    assert tokens.get_xlabel() == "million tokens" and (tmp_path / "loss.png").stat().st_size > 10_000
    assert tokens._functions[0](1000) == pytest.approx(0.512)


def test_what_began_with_a_model_has_no_guess_at_random_and_pairs_have_no_tokens(figures, tmp_path):
    rows = [{"step": step, "loss": 0.7, "lr": 1e-6, "pairs": 8 * step} for step in range(1, 9)]
    draw_losses({"dpo": rows}, tmp_path / "loss.png", "dpo", "pair", 0)
    ((axes, _), _), = figures  # fmt: skip
    assert labels(axes) == ["training", "validation"] and not axes.child_axes
    assert axes.get_ylabel() == "loss (nats a pair)"


def test_the_ends_of_a_smoothed_line_are_near_the_ends():
    values = [float(i) for i in range(100)]
    assert list(smoothed(values)) == values  # a straight line stays one
    assert list(smoothed([3.0, 1.0])) == [3.0, 1.0]


def test_speeds_are_a_bar_a_side_and_a_dot_a_round(figures, tmp_path):
    sides = ["plainllama bf16 compile blocks, × 4, none", "hf bf16 compile off, × 4, none"]
    trials = [{"name": name, "tokens_per_s": 999.0, "seconds": [1.0], "dtype": "bf16"} for name in [*sides, "x bf16"]]
    turns = [
        {"name": sides[0], "tokens_per_s": 300.0, "seconds": [1.0, 2.0, 3.0], "dtype": "bf16"},
        {"name": sides[1], "tokens_per_s": 150.0, "seconds": [2.0, 4.0, 6.0], "dtype": "bf16"},
    ]
    contests = [{"of": sides, "ratio": 2.0, "ratios": [1.9, 2.0, 2.2]}]
    draw_speeds({"rows": trials + turns, "contests": contests}, "15M", tmp_path / "b.png")
    draw_speeds({"rows": trials}, "15M", tmp_path / "c.png")
    ((axes, _),), ((alone, _),) = figures
    assert [bar.get_width() for bar in axes.patches] == [150.0, 300.0]
    assert sorted(axes.get_lines()[1].get_xdata()) == [200.0, 300.0, 600.0]
    assert axes.get_title() == "15M\n2.00 × transformers with its own Trainer (1.90 to 2.20)"
    assert axes.get_yticklabels()[0].get_text().startswith("transformers with its own Trainer\nbf16")
    assert len(alone.patches) == 3


def test_writing_is_a_panel_a_job_and_a_bar_a_way(figures, tmp_path):
    rows = [{"job": job, "name": name, "dtype": "int8", "tokens_per_s": speed, "seconds": [1.0, 2.0, 4.0]}
            for job, first in (("batch 1", 10.0), ("prefill of 200", 300.0))
            for name, speed in (("plainllama int8", first), ("transformers int8", 2 * first))]  # fmt: skip
    draw_writing(rows, "15M", tmp_path / "w.png")
    (panels,) = figures
    assert [axes.get_title() for axes, _ in panels] == ["batch 1", "prefill of 200"]
    widths = [[bar.get_width() for bar in axes.patches] for axes, _ in panels]
    assert widths == [[20.0, 10.0], [600.0, 300.0]]  # from the bottom
    names = [label.get_text() for label in panels[0][0].get_yticklabels()]
    assert names == ["transformers\nint8", "plainllama\nint8"]
    assert sorted(panels[0][0].get_lines()[1].get_xdata()) == [5.0, 10.0, 20.0]


def test_growth_is_a_line_a_size_and_number_of_processes(figures, tmp_path):
    rows = [{"size": size, "processes": world, "seq_len": length, "tokens_per_s": 1e6 / length,
             "share_of_product": 0.5, "peak_bytes": world * 2**30}
            for size in ("15M", "42M") for world in (1, 2) for length in (256, 1024)]  # fmt: skip
    draw_growth(rows, "a machine", tmp_path / "g.png")
    ((speed, _), (share, _), (memory, _)), = figures  # fmt: skip
    lines = speed.get_lines()
    names = [line.get_label() for line in lines]
    assert names == [f"{size}, {world} processes" for size in ("15M", "42M") for world in (1, 2)]
    assert list(lines[3].get_xdata()) == [256, 1024] and list(lines[3].get_ydata()) == [1e6 / 256, 1e6 / 1024]
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    assert list(share.get_lines()[0].get_ydata()) == [0.5, 0.5]
    assert list(memory.get_lines()[1].get_ydata()) == [2**31, 2**31]


def test_all_pictures_are_drawn_in_one_place():
    from conftest import ROOT

    using = [path.name for name in ("lib", "recipes") for path in (ROOT / name).glob("*.py")
             if "import matplotlib" in path.read_text()]  # fmt: skip
    using += [path.name for path in ROOT.glob("*.py") if "matplotlib" in path.read_text()]
    assert using == ["plots.py"]
    assert draw_arms.__module__ == "lib.ablation_plots"


# ---- a run ----


def test_a_run_tells_of_itself(tiny_run, figures):
    run = tiny_run(steps=20, log_every=5, eval_every=10, save_every=10, sample="The ")
    rows = read_log(run / "log.jsonl")
    validated = [row["step"] for row in rows if "val_loss" in row]
    assert validated == [0, 10, 20]
    assert abs(next(row["val_loss"] for row in rows if "val_loss" in row) - math.log(258)) < 0.3
    each = [row["loss"] for row in read_log(tiny_run("each", steps=20, log_every=1) / "log.jsonl") if "loss" in row]
    means = [row["mean_loss"] for row in rows if "mean_loss" in row]
    assert means == pytest.approx([sum(each[i : i + 5]) / 5 for i in range(0, 20, 5)], rel=1e-5)
    text = (run / "report.md").read_text()
    best = min(row["val_loss"] for row in rows if "val_loss" in row)
    record = json.loads((run / "run.json").read_text())
    told = ["# run", record["command"], record["git_commit"], "| length | 20 steps of 20 steps |", f"| {best:.4f} |"]
    told += ["A sample after step 20:", "    The ", "![Training and validation loss](loss.png)"]
    for part in told:
        assert part in text
    assert seconds_of(rows) > 0
    assert [str(panel.get_title()) for panel, _ in figures[-1]][0] == "each"


def test_runs_are_drawn_into_one_picture(tiny_run, figures, tmp_path):
    a, b = tiny_run("a", steps=4), tiny_run("b", steps=6)
    figures.clear()
    assert draw_together((str(a), str(b))) == a / "losses.png"
    ((axes, _), _), = figures  # fmt: skip
    assert [text for text in labels(axes) if "training" in text] == [f"{a}, training", f"{b}, training"]
    done = command("train.py", "--draw", "a", "b", cwd=tmp_path)
    assert done.stdout == "a/losses.png\n"
    (b / "log.jsonl").write_text("")
    done = command("train.py", "--draw", "a", "b", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--draw b: its log.jsonl has no losses yet" in done.stderr
    done = command("train.py", "--draw", "c", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "c/run.json is missing" in done.stderr


def test_a_report_that_cannot_be_written_does_not_stop_a_run(tiny_run, monkeypatch):
    def full(path, text):
        if path.name == "report.md":
            raise OSError(28, "No space left on device", str(path))
        return real(path, text)

    import lib.run_report

    real = lib.run_report.write_whole
    monkeypatch.setattr(lib.run_report, "write_whole", full)
    run = tiny_run(steps=2)
    assert not (run / "report.md").exists() and (run / "last").exists()
    monkeypatch.undo()
    write_report(run)
    assert "random weights" in (run / "report.md").read_text()


def test_a_run_json_that_was_damaged_meanwhile_does_not_stop_a_run(tiny_run, monkeypatch):
    def spoil(step: int, config) -> float:
        if step == 2:
            (Path(config.out) / "run.json").write_text("{")
        return learning_rate(step, config)

    learning_rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", spoil)
    run = tiny_run(steps=4)
    assert (run / "last").read_text() == "step_00000004" and not (run / "report.md").exists()
