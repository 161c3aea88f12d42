"""The tools import nothing from the directory that they are started in, unless PYTHONPATH names it."""

import ast
import os
import subprocess
import sys

import pytest
import tiny

TOOLS = sorted(
    p for p in (tiny.ROOT / "tools").glob("*.py") if p.stem not in ("prologue", "arguments")
)
#: Of the standard library, installed, and such as are not there: none may come from that directory.
MODULES = ["argparse", "json", "random", "struct", "tokenize", "numpy", "yaml", "not_there"]

START = """
import os
import sys
sys.path.insert(0, TOOLS)
import prologue
import argparse, importlib, multiprocessing

def child():
    import json, random, struct, tokenize

if __name__ == "__main__":
    for name in NAMES:
        try:
            importlib.import_module(name)
        except ImportError:
            print("missing", name)
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.fixture
def trap(tmp_path):
    """A directory of modules that leave a file behind when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / name)!r} + '.ran', 'w').close()\n"
        )
    return folder


def start(trap, *flags, path=None, safe=True):
    """Run a program like a tool there; returns the modules of the directory that were imported."""
    program = trap.parent / "program.py"
    names = MODULES if path is None else ["not_there"]
    text = START.replace("TOOLS", repr(str(tiny.ROOT / "tools"))).replace("NAMES", repr(names))
    program.write_text(text if safe else text.replace("import prologue", ""))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = path
    command = [sys.executable, *(flags or [str(program)])]
    done = subprocess.run(command, cwd=trap, env=env, stdout=subprocess.PIPE, timeout=100)
    assert done.returncode == 0 or not safe
    return sorted(p.stem for p in trap.parent.glob("*.ran"))


@pytest.mark.parametrize(
    "path", [None, "", os.pathsep, f"{os.pathsep}/nowhere", f"/nowhere{os.pathsep}"]
)
def test_nothing_comes_from_the_current_directory(trap, path):
    assert start(trap, path=path) == []


def test_the_trap_works(trap):
    """What the test above rests on: without the tools' first lines the directory is searched."""
    assert "argparse" in start(trap, path=os.pathsep, safe=False)


def test_spawned_processes_are_the_reason_for_one_of_the_lines(trap):
    assert {"struct", "tokenize"} & set(start(trap, safe=False))


def test_a_module_that_is_run_by_name(trap):
    program = trap / "program_by_name.py"
    start(trap)  # writes the program
    program.write_text((trap.parent / "program.py").read_text())
    assert start(trap, "-m", "program_by_name") == []


@pytest.mark.parametrize("named", ["{trap}", ".", "/nowhere:{trap}"])
def test_a_directory_that_pythonpath_names_is_searched(trap, named):
    for name in MODULES[:-1]:
        (trap / f"{name}.py").unlink()
    assert start(trap, path=named.format(trap=trap)) == ["not_there"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_begins_with_it(tool):
    imports = [
        alias.name
        for node in ast.parse(tool.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert imports[:3] == ["os", "sys", "prologue"]


def test_threads_sleep_and_only_warnings_of_the_users_code_are_shown(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT / 'tools')!r})\nimport prologue\n"
        "import os, warnings\n"
        "for module in ('torch', 'detectron2.layers', 'torchmine', 'mine.torch'):\n"
        "    warnings.warn_explicit(f'of {module}', UserWarning, 'file', 1, module=module)\n"
        "print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))\n"
    )
    for given, expected in (
        ({}, "PASSIVE 500"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
        ({"GOMP_SPINCOUNT": "0"}, "PASSIVE 0"),
    ):
        env = {k: v for k, v in os.environ.items() if k[:4] not in ("OMP_", "GOMP")} | given
        done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == expected
        said = [line.split(": ")[-1] for line in done.stderr.splitlines() if "UserWarning" in line]
        assert said == ["of torchmine", "of mine.torch"]
