"""The shape of the project: what imports what, and how long, wide and dense the files are.

The ceilings are those of today or of the goal, whichever is higher. They only ever fall.
"""

import ast
import io
import re
import tokenize

import pytest

from conftest import ROOT

SCRIPTS = ("model", "data", "train", "sample", "eval", "bench")
BOOK = {  # file: lines, columns of its widest line, syntax nodes a code line, lines of its longest function
    "model.py": (385, 100, 12.0, 45),
    "data.py": (385, 100, 10.5, 45),
    "train.py": (396, 100, 10.5, 45),
    "sample.py": (318, 100, 10.5, 45),
    "eval.py": (375, 100, 10.5, 45),
    "bench.py": (400, 100, 10.5, 45),
}
LIBRARY = sorted(path.name for path in (ROOT / "lib").glob("*.py"))
ABOVE = {  # which script may import which
    "model": set(),
    "data": set(),
    "train": {"model", "data"},
    "sample": {"model", "data"},
    "eval": {"model", "data", "sample"},
    "bench": {"model", "data", "train", "sample"},
}


def imported(path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def code_lines(source: str) -> int:
    """Lines with code: neither blank nor comments nor docstrings."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def density(source: str) -> float:
    """Syntax nodes a code line."""
    return sum(1 for _ in ast.walk(ast.parse(source))) / code_lines(source)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_file_of_the_library_imports_no_script_and_is_short_and_not_dense(name):
    path = ROOT / "lib" / name
    source = path.read_text()
    assert not imported(path) & set(SCRIPTS)
    assert len(source.splitlines()) <= 250
    assert density(source) <= 12.0


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_only_upwards(name):
    assert imported(ROOT / f"{name}.py") & set(SCRIPTS) <= ABOVE[name]


def test_openmps_threads_sleep_soon_beside_other_work_unless_told_otherwise():
    """Their library reads the setting when PyTorch is loaded; so lib.cli is imported before it."""
    import os
    import subprocess
    import sys

    code = "import os, sys, lib.cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for typed, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        words, env = [sys.executable, "-c", code], others | typed
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stdout == f"{expected} False\n", done.stderr
    for name in SCRIPTS[1:]:
        nodes = ast.parse((ROOT / f"{name}.py").read_text()).body
        first = next(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
        assert first.module == "lib.cli"


def test_no_script_loads_the_compiler_when_it_begins():
    """It takes longer than all else together; and eval.py, which has sample.py's, no parts of distributed training."""
    import subprocess
    import sys

    late = ("torch._dynamo.convert_frame", "torch.distributed.tensor")
    code = f"import sys, eval; found = set({late}) & set(sys.modules); import train, bench; print(found, "
    code += f"{late[0]!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set() False\n", done.stderr


def test_the_library_has_no_circles_of_imports():
    below = {name[:-3]: imported(ROOT / "lib" / name) for name in LIBRARY}
    arrows = {name: {other for other in below if f"lib.{other}" in found} for name, found in below.items()}
    while arrows:
        free = {name for name, others in arrows.items() if not others & arrows.keys() - {name}}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in free}


@pytest.mark.parametrize("name, lines, width, nodes, longest", [(name, *most) for name, most in BOOK.items()])
def test_a_file_of_the_book_is_read_in_one_sitting(name, lines, width, nodes, longest):
    source = (ROOT / name).read_text()
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(source.splitlines()) <= lines
    assert max(map(len, source.splitlines())) <= width
    assert density(source) <= nodes
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= longest


def test_the_five_files_together_have_at_most_1860_lines():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in BOOK if name != "bench.py") <= 1860


@pytest.mark.parametrize("name", [*BOOK, *(f"lib/{name}" for name in LIBRARY)])
def test_no_lambda_is_bound_to_a_name(name):
    assert not re.search(r"^\s*\w+ = lambda\b", (ROOT / name).read_text(), re.M)


def test_the_readme_is_read_in_ten_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).exists()
    assert len(re.findall(r"!\[.*?\]\(", text)) >= 2


def test_the_model_can_be_copied_alone_into_a_notebook(tmp_path):
    """With the files of lib that it imports, and those that they import."""
    import shutil
    import subprocess
    import sys

    (tmp_path / "lib").mkdir()
    waiting, copied = ["config_checks", "kernels", "packed", "rows", "errors", "__init__"], set()
    while waiting:
        name = waiting.pop()
        copied.add(name)
        shutil.copy(ROOT / "lib" / f"{name}.py", tmp_path / "lib")
        found = imported(ROOT / "lib" / f"{name}.py")
        waiting += [other for other in (path[:-3] for path in LIBRARY) if f"lib.{other}" in found - copied]
    shutil.copy(ROOT / "model.py", tmp_path)
    words = "import torch, model; net = model.Transformer(model.SIZES['260K']); net.init_weights(); "
    words += "print(net(torch.zeros(1, 3, dtype=torch.long)).shape)"
    done = subprocess.run([sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 3, 512])\n", done.stderr
