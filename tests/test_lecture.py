"""The lecture runs, and what it prints is what it shows."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
def test_the_lecture_runs_and_prints_what_it_shows(tmp_path):
    book = json.loads((ROOT / "recipes" / "lecture.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    mark = "print('@@@')"
    program = f"\n{mark}\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "lecture.py").write_text(program)
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / "lecture.py")]
    done = subprocess.run(words, cwd=ROOT / "recipes", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("@@@\n")
    assert len(parts) == len(cells)
    pictures = 0
    for cell, printed in zip(cells, parts):
        shown = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
        pictures += sum("image/png" in out.get("data", {}) for out in cell["outputs"])
        # numbers differ in their last digits between processors
        without = [re.sub(r"-?\d+\.\d+|\de-\d+", "#", text) for text in (printed, shown)]
        assert without[0] == without[1]
    assert pictures >= 3
