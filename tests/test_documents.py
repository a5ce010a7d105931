"""What the documents show runs as it stands there: Python and shell blocks, one after the other; and links lead on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import neml2_aoti_plugin.parallel
import neml2_aoti_plugin.points
import neml2_aoti_plugin.serve
import page_shell
from page_shell import ROOT
from stubs.build import QUICK
from stubs.catalogue import CATALOGUE

# Compiles for an hour, with old releases.
NOT_RUN = {"legacy/README.md"}
# Run against a service, by tests/test_serve.py; with pyzag, by tests/test_pyzag.py.
ELSEWHERE = {"docs/service.md", "docs/howto/pyzag.md"}
# What these pages run takes longer than the default suite may.
WIDE = {"docs/howto/convergence.md", "docs/howto/renames.md", "docs/scaling.md", "docs/tool.md"}
# Has a compile that no stub of the catalogue has.
MARCH = "docs/howto/parameters.md"

PAGES = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/README.md"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").glob("*/README.md"))),
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of a page: language and content."""
    return list(page_shell.blocks(text_of(page)))


# What has something to run.
RUNNING = [
    page for page in PAGES if page not in ELSEWHERE and {"python", "sh"} & {language for language, _ in blocks(page)}
]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is like a clone, in which a reader does one page after the other."""
    place = tmp_path_factory.mktemp("clone")
    (place / "stubs").mkdir()
    for stub in CATALOGUE.values():
        shutil.copy(stub.path, place / "stubs")
    return place


def run(page: str, place: Path) -> None:
    """Run a page in a fresh process, as a reader would."""
    program = place / f"page_{Path(page).stem}.py"
    program.write_text(page_shell.script(text_of(page)), encoding="utf-8")
    # Without what this process has imported or set.
    kept = {n: v for n, v in os.environ.items() if not n.startswith("NEML2_") or n == "NEML2_AOTI_PLUGIN_STUB_CACHE"}
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    variables = {**kept, "PYTHONPATH": paths, "NEML2_AOTI_PLUGIN_KERNELS": "torch", "MPLBACKEND": "Agg"}
    with subprocess.Popen(
        [sys.executable, program.name],
        cwd=place,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=240)
        except BaseException:
            process.send_signal(signal.SIGINT)  # so that it ends what it has started
            raise
    if too_old := re.search(r"OlderTorchError: (.*)", printed):
        pytest.skip(too_old[1])
    assert process.returncode == 0, f"{page}:\n{printed}"


@pytest.mark.processes
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.wide] if p in WIDE else []) for p in RUNNING])
def test_blocks_run(page: str, clone: Path) -> None:
    run(page, clone)
    pictures = set(re.findall(r"--(?:out|plot) (\S+\.(?:png|svg))", text_of(page)))
    lost = [name for name in pictures if not (clone / name).is_file() or (clone / name).stat().st_size < 5000]
    assert not lost, f"{page}: no picture {lost}"


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_least_options_of_a_march_are_enough(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compile of the page, for real, and the gradient through the march of the page, against a difference."""
    (block,) = (block for language, block in blocks(MARCH) if language == "sh long")
    (command,) = page_shell.commands(block)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    page_shell.run(command, clone, 800)
    (march,) = re.findall(r"^def march\(.*?(?=^model = )", text_of(MARCH), flags=re.MULTILINE | re.DOTALL)
    program = f"import torch\nfrom neml2.aoti import Model\n\n{march}\n{GRADIENT}"
    page_shell.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}", clone)


GRADIENT = """
model = Model("march/viscoplasticity")
value = model.get_parameter("residual.overstress.sy").requires_grad_()
march(model)[0].backward()
ends = []
for moved in (179.99, 180.01):
    with torch.no_grad():
        model.set_parameter("residual.overstress.sy", moved)
        ends.append(float(march(model)[0]))
assert abs(float(value.grad) - (ends[1] - ends[0]) / 0.02) < 1e-5 * abs(float(value.grad))
"""


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_RUN | ELSEWHERE])
def test_commands_are_labelled_so_that_they_run(page: str) -> None:
    known = ("python", "sh", "ini", "dockerfile", "json", *(["sh long"] if page == MARCH else []))
    for language, block in blocks(page):
        if language in ("", "text"):
            assert not block.startswith(page_shell.PROGRAMS), f"{page}: label this `sh`, so that it is run:\n{block}"
        else:
            assert language in known or language.startswith("{"), f"{page}: nothing runs {language!r}"


def test_no_page_compiles_into_the_folder_of_another() -> None:
    """The first page of the site shows what README shows; all others have a folder of their own."""
    taken: dict[str, str] = {}
    for page in PAGES:
        for folder in set(re.findall(r"--output-dir (\S+)", text_of(page))) if page != "docs/index.md" else ():
            assert taken.setdefault(folder, page) == page, f"{page} and {taken[folder]} compile into {folder}"


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    lost = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not lost, f"{page} links to {lost}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(r"`((?:_?[a-z]+/)?_?[a-z]+(?:_[a-z]+)*\.py)`", text_of(page))
    package = Path(neml2_aoti_plugin.__file__).parent  # which is elsewhere where a wheel is tested
    folders = [*(ROOT / name for name in ("", "examples", "stubs")), package, (ROOT / page).parent]
    lost = [name for name in named if not any((folder / name).is_file() for folder in folders)]
    assert not lost, f"{page} names {lost}"


def test_each_public_name_is_in_the_reference() -> None:
    text = text_of("docs/reference.md")
    public = (neml2_aoti_plugin, neml2_aoti_plugin.parallel, neml2_aoti_plugin.points, neml2_aoti_plugin.serve)
    names = {name for module in public for name in module.__all__} - {"__version__"}
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_each_example_is_listed() -> None:
    text = text_of("examples/README.md")
    programs = [path.name for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in programs if f"| [{name}]({name}) |" not in text]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("false", "exit status 1"),
        ("make no-such-target", "the Makefile has no such target"),
        ("neml2-aoti inspect nowhere", "exit status 2"),
        ("neml2-compile nowhere.i --driver driver -d :", "there is no file"),
        ("neml2-compile elasticity.i --driver driver -d stress:", "no entry of stubs/catalogue.py"),
    ],
)
def test_a_command_that_fails_fails_the_page(
    command: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CATALOGUE["elasticity"].path, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=says):
        page_shell.shell(f"{command}  # and a comment")
