"""The script that measures on a GPU, tried with tiny sizes on any machine."""

import pytest

from conftest import command


@pytest.mark.slow
def test_one_command_writes_down_what_this_machine_does(tmp_path):
    command("tests/gpu/results.py", "--small", "--out", str(tmp_path / "RESULTS.md"))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count(": done, ") == text.count("## ") == 6 and "FAILED" not in text
    assert text.count("tokens/s") >= 4 and "ratio" in text and "fastest: " in text
    assert all(name in text for name in ("date: ", "device: ", "versions: Python", "commit: "))


def test_a_part_that_fails_is_written_down_and_the_others_go_on(tmp_path, monkeypatch):
    import results

    parts = {"first": (20, "-c 'print(1 / 0)'"), "second": (1, "-c 'import time; time.sleep(60)'"), "third": (20, "-V")}
    monkeypatch.setattr(results, "SMALL", parts)
    with pytest.raises(SystemExit):
        results.main(results.Config(str(tmp_path / "RESULTS.md"), small=True))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "FAILED with exit code 1" in text and "ZeroDivisionError" in text
    assert "FAILED: not done after 1 s" in text and "`python -V`: done" in text
