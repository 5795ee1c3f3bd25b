"""recipes/ablate.py: grids of runs, and the answer drawn from them."""

import contextlib
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY_RUN, command, flags
from lib.ablation import Result, compare_arms
from lib.ablation_report import in_a_sentence, verdict, write_report
from lib.collected import find_runs, told_apart
from lib.errors import BadInput
from lib.grid import Run, arms_of, read_choices, runs_of, settings_of
from lib.records import read_json
from lib.side_by_side import Job, last_line, run_jobs

sys.path.insert(0, str(ROOT / "recipes"))
import ablate

RELU2 = str(ROOT / "variants" / "relu2.py")

# ---- the grid ----


def test_every_combination_is_an_arm_and_learning_rates_are_settings_of_each():
    vary = read_choices(("variant=none,variants/relu2.py", "optimizer=adamw,muon", "learning_rate=1e-3,2e-3"), "vary")
    arms, settings = arms_of(vary, {}), settings_of(vary)
    assert list(arms) == [
        "none, optimizer=adamw", "none, optimizer=muon", "relu2, optimizer=adamw", "relu2, optimizer=muon",
    ]  # fmt: skip
    assert list(settings) == ["learning_rate=1e-3", "learning_rate=2e-3"]
    runs = runs_of(Path("out"), arms, settings, [0, 1])
    assert len({run.folder for run in runs}) == len(runs) == 16
    assert dict(runs[0].flags) == {
        "optimizer": "adamw", "learning_rate": "1e-3", "seed": "0", "out": str(runs[0].folder),
    }  # fmt: skip
    assert dict(runs[-1].flags)["variant"] == "variants/relu2.py" and runs[-1].seed == 1


def test_each_changes_one_flag_at_a_time(monkeypatch):
    monkeypatch.chdir(ROOT)
    each = read_choices(("variant=variants/*.py", "optimizer=muon"), "each")
    arms = arms_of({}, each)
    assert list(arms)[0] == "baseline" and arms["baseline"] == {}
    assert arms["optimizer=muon"] == {"optimizer": "muon"} and arms["relu2"] == {"variant": "variants/relu2.py"}
    assert len(arms) == 2 + len(list((ROOT / "variants").glob("*.py")))


@pytest.mark.parametrize("texts, problem", {
    ("variant",): "is not FLAG=VALUE", ("variant=",): "is not FLAG=VALUE", ("dim=1,2", "dim=3"): "names dim twice",
    ("dim=1,1",): "names a value twice", ("variant=nowhere/*.py",): "no file is called nowhere/",
}.items())  # fmt: skip
def test_choices_that_cannot_be_read_are_one_sentence(texts, problem):
    with pytest.raises(BadInput, match=problem):
        read_choices(texts, "vary")


def test_arms_of_the_same_name_are_refused():
    twice = {"variant": ["a/relu2.py", "b/relu2.py"]}
    for vary, each in ((twice, {}), ({}, twice)):
        with pytest.raises(BadInput, match="two arms are called relu2; rename a file"):
            arms_of(vary, each)
    with pytest.raises(BadInput, match="--each dim is in --vary too"):
        arms_of({"dim": ["1", "2"]}, {"dim": ["3"]})


# ---- the answer ----


def results_of(arms: dict[str, dict[str, list[float]]]) -> list[Result]:
    """Made-up results: the values of each seed, by arm and setting."""
    results = []
    for arm, settings in arms.items():
        for setting, values in settings.items():
            for seed, value in enumerate(values):
                run = Run(arm, setting, seed, Path(f"out/{arm}/{setting}/{seed}"))
                curve = {step: 5 - step / 10 + seed / 100 for step in range(1, 6)}
                results.append(Result(run, value, 5, 500, 1234, 99.0, curve))
    return results


def test_each_arm_is_compared_at_its_own_best_setting():
    results = results_of({
        "none": {"lr=1": [2.0, 2.1, 2.2], "lr=2": [1.9, 2.0, 2.1]},
        "mine": {"lr=1": [1.8, 1.91, 2.0], "lr=2": [9.0, math.nan, 9.0]},
    })  # fmt: skip
    first, mine = compare_arms(results, True, [0, 1, 2])
    assert (first.setting, mine.setting) == ("lr=2", "lr=1")
    assert mine.difference.mean == pytest.approx(-0.29 / 3)
    assert mine.difference.spread == pytest.approx(0.01 / 3**0.5)  # of -0.1, -0.09, -0.1: pairs of one seed
    assert verdict(mine, True) == "better" and verdict(mine, False) == "worse"
    first, mine = compare_arms(results, False, [0, 1, 2])  # a score, of which more is better
    assert first.setting == "lr=1" and mine.setting == "lr=1"  # one that failed with a seed is not the best


def test_the_best_setting_may_be_chosen_on_fewer_seeds():
    results = results_of({"none": {"a": [2.0, 9.0, 9.0], "b": [2.1]}, "mine": {"a": [2.1], "b": [2.0, 8.0, 8.0]}})
    first, mine = compare_arms(results, True, [0])
    assert (first.setting, mine.setting) == ("a", "b") and mine.seeds == [0, 1, 2]


SENTENCES = {
    (2.00, 1.50, 1.51, 1.49): "mine is better than none by 0.5000 val_loss",
    (2.00, 2.50, 2.51, 2.49): "mine is worse than none by 0.5000 val_loss",
    (2.00, 2.30, 1.71, 2.00): "3 seeds cannot tell mine from none",
    (2.00, 2.00, 2.00, 2.00): "mine is the same as none: val_loss is equal with every seed",
    (2.00, math.nan, math.nan, math.nan): "mine did not get through",
    (2.00, 1.50, math.nan, math.nan): "1 seed cannot tell: mine minus none is -0.5000 val_loss",
}


@pytest.mark.parametrize("values", SENTENCES)
def test_the_answer_is_a_sentence(values):
    base, *mine = values
    arms = compare_arms(results_of({"none": {"": [base] * 3}, "mine": {"": mine}}), True, [0, 1, 2])
    assert in_a_sentence(arms, "val_loss", True).startswith(SENTENCES[values])


def test_of_many_arms_the_answer_says_which_are_better_worse_or_unclear(tmp_path):
    arms = compare_arms(results_of({
        "none": {"": [2.0, 2.0, 2.0]}, "a": {"": [1.5, 1.51, 1.49]}, "b": {"": [1.4, 1.41, 1.39]},
        "c": {"": [2.5, 2.51, 2.49]}, "d": {"": [2.3, 1.7, 2.0]}, "e": {"": [math.nan] * 3},
        "f": {"": [2.0, 2.0, 2.0]},
    }), True, [0, 1, 2])  # fmt: skip
    said = "In val_loss, a, b are better than none; c is worse than none; f is the same as none; 3 seeds cannot tell d "
    said += "from none; e did not get through."
    assert in_a_sentence(arms, "val_loss", True) == said
    assert arms[1].p == pytest.approx(4 * arms[1].difference.p) or arms[1].p > arms[1].difference.p  # Holm
    write_report(tmp_path, "a question <b>", "val_loss", True, arms, ["A note."])
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    said = said.replace("val_loss", "val_loss after 5 steps")
    for text in (said, "A note.", "| e | failed | – |", "Of val_loss, lower is better."):
        assert text in report
    assert said in page and "a question &lt;b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and page.count("data:image/png;base64,") == 2
    rows = read_json(tmp_path / "results.json")["arms"]
    assert [row["arm"] for row in rows] == ["none", "a", "b", "c", "d", "e", "f"] and rows[6]["mean"] == 0
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(lines) == 21 and lines[3]["val_loss"] == "1.5"


def test_the_note_says_how_many_settings_each_arm_had(tmp_path):
    arms = compare_arms(results_of({"none": {"x": [2.0, 2.1]}, "a": {"x": [1.5, 1.6], "y": [1.0, 1.2]}}), True, [0, 1])
    write_report(tmp_path, "q", "val_loss", True, arms, [])
    report = (tmp_path / "report.md").read_text()
    assert "The arms had different numbers of settings (none 1, a 2), which favours those with more" in report
    assert "| a | 1.5500 | 1.1000 * |" in report


def test_the_report_warns_of_a_best_setting_at_the_edge_and_of_unequal_steps(tmp_path):
    rates = {"x": [2.0, 2.1], "y": [1.9, 2.0], "z": [2.2, 2.3]}
    results = results_of({"none": rates, "mine": {"x": [1.5, 1.6], "y": [1.8, 2.0], "z": [1.9, 2.0]}})
    arms = compare_arms(results, True, [0, 1])
    for result in arms[1].results:
        result.steps = 7
    write_report(tmp_path, "q", "val_loss", True, arms, [])
    report = (tmp_path / "report.md").read_text()
    assert "At the edge of the settings tried, so a wider range may do better: mine." in report
    assert "Steps differ: none 5, mine 7." in report


def test_a_comparison_writes_over_no_other_report(tiny_run, tmp_path):
    tiny_run("runs/a", steps=1, stop_at=1)
    tiny_run("runs/b", steps=1, stop_at=1, optimizer="muon")
    compare("runs", tmp_path / "out")
    report = tmp_path / "out" / "report.md"
    compare("runs", tmp_path / "out")
    report.write_text(report.read_text().replace("recipes/ablate.py", "recipes/other.py"))
    with pytest.raises(BadInput, match="out holds the report of another command"):
        compare("runs", tmp_path / "out")


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_the_page_opens_in_a_browser(tmp_path):
    arms = compare_arms(results_of({"none": {"": [2.0, 2.1]}, "mine": {"": [1.5, 1.7]}}), True, [0, 1])
    write_report(tmp_path, "q", "val_loss", True, arms, [])
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    words += ["--virtual-time-budget=2000", "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "<td>mine</td>" in done.stdout and done.stdout.count("<img") == 2, done.stderr
    shot = [word for word in words if word != "--dump-dom"]
    subprocess.run([*shot[:-1], f"--screenshot={tmp_path / 'page.png'}", shot[-1]], capture_output=True, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 10_000


# ---- whole ----

TINY = TINY_RUN | {"dim": 16, "num_heads": 2, "num_kv_heads": 2, "compile": "off"}
REST = ["--", *flags({name: value for name, value in TINY.items() if name not in ("sample", "learning_rate")})]


def without_times(folder: Path) -> dict[str, str]:
    """What a report says, but for speeds and the name of its folder."""
    found = {name: (folder / name).read_text().replace(folder.name, "OUT") for name in ("report.md", "results.json")}
    found["report.md"] = found["report.md"].partition("What each arm costs")[0]
    for row in csv.reader((folder / "results.csv").open()):
        found[",".join(row[:3])] = row[3:6] + row[8:]  # but for speed and folder
    return found


@pytest.mark.slow
def test_a_grid_that_was_killed_ends_with_the_report_of_one_that_was_not(tiny_data, tmp_path):
    """Two variants, two seeds. One variant changes nothing, and makes a difference of exactly 0."""
    same = tmp_path / "same.py"
    same.write_text("import model\n\n\nclass FeedForward(model.FeedForward):\n    pass\n")

    def grid(out: str, steps: int = 6) -> list[str]:
        own = ["--data", str(tiny_data), "--seeds", "2", "--steps", str(steps), "--out", out, "--jobs", "2"]
        return ["recipes/ablate.py", *own, "--vary", f"variant=none,{same}", *REST]

    seed = random.randrange(2**32)
    print("random seed", seed)
    script, *words = grid("broken_off")
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(4, 10))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = command(*grid("broken_off"), cwd=tmp_path)
    assert "wrote report.html" in again.stdout and "same is the same as none" in again.stdout
    command(*grid("in_one_go"), cwd=tmp_path)
    mine, theirs = without_times(tmp_path / "broken_off"), without_times(tmp_path / "in_one_go")
    assert mine == theirs and len(mine) == 2 + 1 + 4
    none, equal = read_json(tmp_path / "in_one_go" / "results.json")["arms"]
    assert none["values"] == equal["values"] and len(none["values"]) == 2
    assert equal["mean"] == equal["low"] == equal["high"] == 0 and equal["p"] == 1
    # what is done is left alone, and other questions are not answered from it
    assert "to go" not in command(*grid("in_one_go"), cwd=tmp_path).stdout
    done = command(*grid("in_one_go", 7), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--out in_one_go holds an ablation with --steps 6, not 7" in done.stderr
    # the same from the runs alone
    compare("in_one_go", tmp_path / "compared")
    compared = read_json(tmp_path / "compared" / "results.json")["arms"]
    assert [row["values"] for row in compared] == [none["values"], equal["values"]]
    table = command("recipes/ablate.py", "--history", "in_one_go", cwd=tmp_path).stdout
    assert table.count("| 6/6 |") == 4 and "variant=" in table


def compare(folder: str, out: Path):
    with contextlib.chdir(out.parent):
        ablate.main(ablate.Config(compare=(folder,), out=str(out)), [])


def test_a_run_that_fails_is_named_and_the_others_are_compared(tiny_data, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import model\n\n\nclass FeedForward(model.FeedForward):\n    def forward(self, x):\n"
        "        assert x.size(-1) != 16 or x.size(0) != 4\n        return super().forward(x)\n"
    )
    config = ablate.Config(metric="nonsense")
    words = ["--data", str(tiny_data), "--seeds", "1", "--steps", "2", "--jobs", "2", "--out", "out"]
    done = command("recipes/ablate.py", *words, "--vary", f"variant=none,{broken}", *REST, cwd=tmp_path)
    assert "broken did not get through" in done.stdout and "FAILED: AssertionError" in done.stdout
    assert [len(row["values"]) for row in read_json(tmp_path / "out" / "results.json")["arms"]] == [1, 0]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "out/broken_seed=0 failed (AssertionError)" in report and "No val_bits" not in report
    # what no run logs is noticed after the first
    with pytest.raises(BadInput, match="--metric nonsense is not in .*log.jsonl, which has epochs, grad_norm, loss"):
        ablate.Trainer(config, []).check_metric(tmp_path / "out" / "none_seed=0")


MISTAKES = {
    ("--vary", "variant=none"): "one arm cannot be compared",
    ("--vary", "variant=none,gone.py"): "gone.py: No such file",
    ("--vary", "optimizer=adamw,sgd"): "sgd",
    ("--vary", "beta1=0.9,1.5"): "--beta1 1.5 must lie between 0 and 1",
    ("--vary", "dmi=16,32"): "dmi=16: train.py has no flag --dmi with this variant",
    ("--vary", "variant=none,WINDOW", "window=8,16"): "none, window=8: train.py has no flag --window with this variant",
    ("--vary", "learning_rate=1e-3,2e-3"): "learning rates are tried with every arm and make none",
    ("--vary", "dim=16,32", "--each", "learning_rate=1,2"): "it belongs in --vary, which tries it with every arm",
    ("--vary", "seed=1,2"): "every arm has the same seeds",
    ("--vary", "dim=16,32", "--metric", "arc:nowhere"): "there is no nowhere",
    ("--vary", "dim=16,32", "--minutes", "1"): "--steps, --tokens and --minutes do not go together",
    ("--vary", "dim=16,32", "--seeds", "0"): "--seeds 0 must be at least 1",
    ("--vary", "dim=16,32", "--metric", "mmul:data"): "mmul is no task of eval.py",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_ends_it_before_the_first_run(words, tiny_data, tmp_path, monkeypatch, capsys):
    """In this process; typed, it is the same sentence and exit code 2."""
    import tyro

    monkeypatch.chdir(tmp_path)
    window = str(ROOT / "variants" / "sliding_window.py")
    own = ["--data", str(tiny_data), "--out", "out", "--steps", "4"]
    own += [word.replace("WINDOW", window) for word in words]
    config = tyro.cli(ablate.Config, args=own, use_underscores=True)
    try:
        ablate.main(config, [])
    except (BadInput, OSError) as error:
        said = f"{getattr(error, 'filename', '')}: {getattr(error, 'strerror', '')} {error}"
    except SystemExit as error:
        assert error.code == 2
        said = capsys.readouterr().err
    assert MISTAKES[words] in said
    assert not (tmp_path / "out").exists()


def test_jobs_that_run_side_by_side_share_the_gpus_or_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        words = [sys.executable, "-c", f"import os; print(os.environ.get('{name}'))"]
        jobs = [Job(str(number), words, tmp_path / f"{name}{number}.txt") for number in range(4)]
        ended = []
        run_jobs(jobs, 2, 2 if name.startswith("CUDA") else 0, ended.append)
        printed = {last_line(job.log) for job in jobs}
        assert printed == ({"0", "1"} if name.startswith("CUDA") else {str(max(1, os.cpu_count() // 2))})
        assert len(ended) == 4 and all(job.process.returncode == 0 for job in ended)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends them")
def test_jobs_end_with_the_process_that_started_them_even_when_it_is_killed(tmp_path):
    child = tmp_path / "pid"
    work = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    words = "import sys; from pathlib import Path; from lib.side_by_side import Job, run_jobs; "
    words += f"run_jobs([Job('a', [sys.executable, '-c', {work!r}], Path({str(tmp_path / 'log')!r}))], 1, 0)"
    parent = subprocess.Popen([sys.executable, "-c", words], cwd=ROOT)
    while not (child.exists() and child.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    status = Path(f"/proc/{child.read_text()}/stat")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(200):  # ten seconds; a process that nobody waits for is a zombie, Z
        if not status.exists() or status.read_text().rpartition(") ")[2][0] == "Z":
            return
        time.sleep(0.05)
    os.kill(int(child.read_text()), signal.SIGKILL)
    raise AssertionError("the job went on alone")


def test_equal_time_gives_a_slower_arm_fewer_steps(tiny_data, tmp_path, monkeypatch, capsys):
    config = ablate.Config(data=(str(tiny_data),), out=str(tmp_path / "out"), minutes=0.01, seeds=2)
    trainer = ablate.Trainer(config, [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "timing.json").write_text(json.dumps({"a": 0.1, "b": 0.2}))
    assert trainer.steps_of({"a": {}, "b": {}}, {}) == {"a": 6, "b": 3}  # 0.6 seconds
    config.minutes, config.tokens = 0.0, 1000
    assert trainer.steps_of({"a": {}, "b": {}}, {"a": 100, "b": 200}) == {"a": 10, "b": 5}


@pytest.mark.slow
def test_the_steps_of_each_arm_are_timed(tiny_data, tmp_path):
    words = ["--data", str(tiny_data), "--out", "out", "--seeds", "1", "--minutes", "0.02"]
    done = command("recipes/ablate.py", *words, "--vary", "dim=16,64", *REST, cwd=tmp_path)
    assert done.stdout.count("s a step") == 2
    seconds = read_json(tmp_path / "out" / "timing.json")
    assert len(find_runs((str(tmp_path / "out"),))) == 2  # those that were timed are gone
    for row in csv.DictReader((tmp_path / "out" / "results.csv").open()):
        assert int(row["steps"]) == int(1.2 / seconds[row["arm"]])


def test_the_metric_may_be_a_task_of_eval_py(tiny_run, tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [{"context": f"{i} and", "choices": [" this", " that one"], "answer": i % 2} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_run("runs/a", steps=2, eval_every=2)
    tiny_run("runs/b", steps=2, eval_every=2, optimizer="muon")
    config = ablate.Config(compare=("runs",), out="out", metric=f"choices:{questions}")
    ablate.main(config, [])
    first, muon = read_json(tmp_path / "out" / "results.json")["arms"]
    assert (first["arm"], muon["arm"]) == ("optimizer=adamw", "optimizer=muon")
    assert all(0 <= value <= 1 for value in [*first["values"].values(), *muon["values"].values()])


def test_runs_are_told_apart_by_the_flags_in_which_they_differ(tiny_run, tmp_path):
    mine = tmp_path / "relu2.py"
    mine.write_text(Path(RELU2).read_text() + "# mine\n")
    for name, changes in (("a", {}), ("b", {"variant": RELU2}), ("c", {"variant": str(mine)}), ("d", {"dim": 16})):
        tiny_run(f"runs/{name}", steps=1, stop_at=1, num_heads=2, num_kv_heads=2, **changes)
    runs = {run.folder.name: run.arm for run in told_apart(find_runs(("runs",)))}
    assert runs["a"] == "none, dim=32" and runs["d"] == "none, dim=16"  # a flag that is 0 by the shape it means
    assert runs["b"] == "relu2, dim=32" and re.fullmatch("relu2#[0-9a-f]{8}, dim=32", runs["c"])
    assert len(set(runs.values())) == 4
    tiny_run("more/a", steps=1, stop_at=1, num_heads=2, num_kv_heads=2)
    with pytest.raises(BadInput, match="runs/a and more/a are runs of the same flags and seed"):
        told_apart(find_runs(("runs", "more")))
    with pytest.raises(BadInput, match="no run here"):
        find_runs(("nothing",))
