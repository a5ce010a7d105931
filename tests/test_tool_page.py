"""docs/tool.md and `--help`: examples of each command, which run, and tables that are the forms of the documents.

`test_documents.py` runs the examples of the page.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from legacy import build
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin._cli.app import COMMANDS, HELP
from stubs.build import compiled
from stubs.catalogue import CATALOGUE
from tools import json_forms

MODELS = ("elasticity", "viscoplasticity", "promoted")
PAGE = json_forms.PAGE.read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page has it: the input files, and the models compiled."""
    for name in MODELS:
        shutil.copytree(compiled(name), tmp_path / "aoti", dirs_exist_ok=True)
        shutil.copy(CATALOGUE[name].path, tmp_path)
    monkeypatch.chdir(tmp_path)
    # The kernels would be compiled anew in each environment that runs this.
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "torch")
    return tmp_path


def run(line: str) -> None:
    """Run a line of a shell; the command itself in this process, which saves the import of torch."""
    words = shlex.split(line)
    if words[0] == "neml2-aoti":
        assert cli.main(words[1:]) == 0, line
    else:
        assert words[0] == "python" or line.startswith("cd aoti && sha256sum -c "), line
        done = subprocess.run(line.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_each_command_has_an_example() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines if line.startswith("neml2-aoti ")} == {*COMMANDS}


def examples(text: str) -> list[str]:
    return [line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip()]


def test_examples_of_help_run(place: Path) -> None:
    by_command = {name: examples(import_module(f"neml2_aoti_plugin._cli.{name}").EPILOG) for name in COMMANDS}
    assert all(by_command.values())
    for name in ("stiff", "soft"):
        run(f"neml2-aoti run aoti/viscoplasticity_aoti.i driver --out {name}.npz")
    # In an order in which each finds what it needs; bench takes long at its defaults.
    for name in ("doctor", "inspect", "verify", "run", "plot", "params", "seal", "serve"):
        for line in by_command[name]:
            # What takes a process of its own runs once, with the page; a service would not end.
            if "--try-binding" not in line and (name != "serve" or "--check" in line):
                run(line)
    for line in examples(HELP):
        run(line)
    for name in ("bench", "migrate", "warm"):
        for line in by_command[name]:
            assert line.startswith(("neml2-aoti ", "NEML2_AOTI_PLUGIN_CACHE=/opt/cache neml2-aoti "))


def test_tables_are_the_forms() -> None:
    assert json_forms.page(PAGE) == PAGE, "python -m tools.json_forms writes them"
    for report in json_forms.REPORTS.values():
        assert json_forms.explanations(report).keys() == json_forms.fields_of(report).keys()


def test_each_command_has_a_section() -> None:
    for name in COMMANDS:
        assert re.search(rf"^## (.* and )?{name}\b", PAGE, re.MULTILINE), name


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_the_example_of_migrate_runs(place: Path) -> None:
    shutil.copytree(build.artifact("3.0.6", "forward"), place / "old")
    (line,) = re.findall(r"```sh\n(neml2-aoti migrate .*)\n```", PAGE)
    run(line)
    assert cli.main(["verify", "new/elasticity_aoti.i"]) == 0
    for line in examples(import_module("neml2_aoti_plugin._cli.migrate").EPILOG):
        shutil.rmtree(place / "new", ignore_errors=True)
        run(line)
