"""docs/tool.md and `--help`: examples of each command, which run, and tables that are the forms of the documents.

`test_documents.py` runs the examples of the page.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context

from commands import answer, copy_of, printed
from legacy import build
from neml2_aoti_plugin._cli.app import HELP, app
from stubs.catalogue import CATALOGUE
from tools import json_forms

pytestmark = pytest.mark.processes

PAGE = json_forms.PAGE.read_text(encoding="utf-8")
# In an order in which each finds what it needs.
RUN = ("doctor", "example", "inspect", "verify", "run", "plot", "params", "seal", "serve")
# bench takes long at its defaults; what takes a process of its own runs once, with the page; a service would not end.
NOT_RUN = re.compile(r"--try-binding|neml2-aoti serve (?!.*--check)")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page has it: the input files, and the models compiled."""
    for name in ("elasticity", "viscoplasticity", "promoted"):
        copy_of(name, tmp_path / "aoti")
        shutil.copy(CATALOGUE[name].path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "torch")
    return tmp_path


def run(line: str) -> None:
    """Run a line of a shell; the command itself in this process, which saves the import of torch."""
    words = shlex.split(line)
    if words[0] == "neml2-aoti":
        printed(*words[1:])
    else:
        assert words[0] == "python" or line.startswith("cd aoti && sha256sum -c "), line
        done = subprocess.run(line.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def examples(command: str = "") -> list[str]:
    """The examples in the help of a command."""
    found = app.get_command(Context(app), command)
    text = (found and found.epilog) or HELP
    return [line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip()]


def test_each_command_has_a_section_with_an_example() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines if line.startswith("neml2-aoti ")} == {*app.commands}
    for name in app.commands:
        assert re.search(rf"^## (.* and )?{name}\b", PAGE, re.MULTILINE), name


def test_examples_of_help_run(place: Path) -> None:
    for name in ("stiff", "soft"):
        run(f"neml2-aoti run aoti/viscoplasticity_aoti.i driver --out {name}.npz")
    for line in (line for name in (*RUN, "") for line in examples(name) if not NOT_RUN.search(line)):
        run(line)
    for line in (line for name in app.commands if name not in RUN for line in examples(name)):
        assert line.startswith(("neml2-aoti ", "NEML2_AOTI_PLUGIN_CACHE=/opt/cache neml2-aoti "))


def test_tables_are_the_forms() -> None:
    assert json_forms.page(PAGE) == PAGE, "python -m tools.json_forms writes them"
    for report in json_forms.REPORTS.values():
        said = json_forms.explanations(report)
        assert said.keys() == json_forms.fields_of(report).keys() and all(text.strip(".") for text in said.values())


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_the_example_of_migrate_runs(place: Path) -> None:
    shutil.copytree(build.artifact("3.0.6", "forward"), place / "old")
    (line,) = re.findall(r"```sh\n(neml2-aoti migrate .*)\n```", PAGE)
    for example in (line, *examples("migrate")):
        shutil.rmtree(place / "new", ignore_errors=True)
        run(example)
        assert answer("verify", "new/elasticity_aoti.i" if example == line else "new/elasticity")
