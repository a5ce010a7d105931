"""What the documents show runs as it stands there: Python and shell blocks, one after the other; and links lead on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import neml2_aoti_plugin.parallel
import neml2_aoti_plugin.points
import neml2_aoti_plugin.serve
import page_shell
from environments import OUTSIDE, ROOT
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
QUICKSTART = "docs/quickstart.md"

PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "examples/*/README.md")
    for path in sorted(ROOT.glob(pattern))
]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {page: page_shell.blocks(text) for page, text in TEXT.items()}


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is like a clone, in which a reader does one page after the other."""
    place = tmp_path_factory.mktemp("clone")
    (place / "stubs").mkdir()
    for stub in CATALOGUE.values():
        shutil.copy(stub.path, place / "stubs")
    return place


@pytest.mark.processes
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.wide] if page in WIDE else [])
        for page, blocks in BLOCKS.items()
        if page not in ELSEWHERE and {"python", "sh"} & dict(blocks).keys()
    ],
)
def test_blocks_run(page: str, clone: Path) -> None:
    """In a fresh process, as a reader would."""
    program = clone / f"page_{Path(page).stem}.py"
    program.write_text(page_shell.script(TEXT[page]), encoding="utf-8")
    # Without what this process has imported or set.
    kept = {n: v for n, v in os.environ.items() if not n.startswith("NEML2_") or n == "NEML2_AOTI_PLUGIN_STUB_CACHE"}
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    variables = {**kept, "PYTHONPATH": paths, "NEML2_AOTI_PLUGIN_KERNELS": "torch", "MPLBACKEND": "Agg"}
    try:
        page_shell.run(f"exec python {program.name}", clone, variables=variables)
    except AssertionError as error:
        if too_old := re.search(r"OlderTorchError: (.*)", str(error)):
            pytest.skip(too_old[1])
        raise
    pictures = set(re.findall(r"--(?:out|plot) (\S+\.(?:png|svg))", TEXT[page]))
    lost = [name for name in pictures if not (clone / name).is_file() or (clone / name).stat().st_size < 5000]
    assert not lost, f"{page}: no picture {lost}"


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


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_least_options_of_a_march_are_enough(clone: Path) -> None:
    """The compile of the page, for real, and the gradient through the march of the page, against a difference."""
    (block,) = (block for language, block in BLOCKS[MARCH] if language == "sh long")
    (command,) = page_shell.commands(block)
    page_shell.run(command, clone, 800, {**os.environ, **QUICK})
    (march,) = re.findall(r"^def march\(.*?(?=^model = )", TEXT[MARCH], flags=re.MULTILINE | re.DOTALL)
    program = f"import torch\nfrom neml2.aoti import Model\n\n{march}\n{GRADIENT}"
    page_shell.run(f"python -c {shlex.quote(program)}", clone)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["clone", "wheel"])
def test_the_quickstart_reaches_the_picture(way: str, tmp_path: Path) -> None:
    """In a fresh clone and a fresh environment, with nothing but what the page says."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=120)
    # The page gives a wheel as another way to install.
    other = {"clone": ("pip wheel", "dist/"), "wheel": ("pip install '.[plot]'",)}[way]
    parts = ["set -euo pipefail"]
    for language, block in page_shell.blocks((clone / QUICKSTART).read_text(encoding="utf-8")):
        if language == "sh":
            parts += [line for line in block.splitlines() if not any(words in line for words in other)]
        elif language == "python":
            (clone / "page.py").write_text(block, encoding="utf-8")
            parts.append("python page.py")
    # torch as it is here, rather than the newest with gigabytes of CUDA; and a compile without optimised wrappers. The
    # build has a llvmlite of its own, which pip would hold against the constraint too.
    constraints = tmp_path / "constraints.txt"
    wanted = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(line for line in wanted if not line.startswith("llvmlite")), encoding="utf-8")
    kept = {n: v for n, v in os.environ.items() if not n.startswith((*OUTSIDE, "TORCH", "VIRTUAL_ENV"))}
    # From another folder, the package that is imported is the installed one.
    parts.append("here=$PWD; cd /; $here/.venv/bin/python -c 'import neml2_aoti_plugin; print(neml2_aoti_plugin)'")
    printed = page_shell.run("\n".join(parts), clone, 1700, {**kept, **QUICK, "PIP_CONSTRAINT": str(constraints)})
    assert (clone / "first/curve.png").stat().st_size > 5000
    assert re.search(r"\d+\.\d MPa at 3\.0 % strain", printed)
    assert "site-packages" in printed.splitlines()[-1]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_RUN | ELSEWHERE])
def test_commands_are_labelled_so_that_they_run(page: str) -> None:
    known = ("python", "sh", "ini", "dockerfile", "json", *(["sh long"] if page == MARCH else []))
    assert 2 * len(BLOCKS[page]) == len(re.findall(r"^ *```", TEXT[page], re.MULTILINE)), f"{page}: a block has no end"
    for language, block in BLOCKS[page]:
        if language in ("", "text"):
            assert not block.startswith(page_shell.PROGRAMS), f"{page}: label this `sh`, so that it is run:\n{block}"
        else:
            assert language in known or language.startswith("{"), f"{page}: nothing runs {language!r}"


def test_no_page_compiles_into_the_folder_of_another() -> None:
    """The first page of the site shows what README shows; all others have a folder of their own."""
    taken: dict[str, str] = {}
    for page in PAGES:
        for folder in set(re.findall(r"--output-dir (\S+)", TEXT[page])) if page != "docs/index.md" else ():
            assert taken.setdefault(folder, page) == page, f"{page} and {taken[folder]} compile into {folder}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_on_and_modules_are_there(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    lost = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not lost, f"{page} links to {lost}"
    named = re.findall(r"`((?:_?[a-z]+/)?_?[a-z]+(?:_[a-z]+)*\.py)`", TEXT[page])
    package = Path(neml2_aoti_plugin.__file__).parent  # which is elsewhere where a wheel is tested
    folders = [*(ROOT / name for name in ("", "examples", "stubs")), package, (ROOT / page).parent]
    lost = [name for name in named if not any((folder / name).is_file() for folder in folders)]
    assert not lost, f"{page} names {lost}"


def test_each_public_name_and_each_example_is_listed() -> None:
    public = (neml2_aoti_plugin, neml2_aoti_plugin.parallel, neml2_aoti_plugin.points, neml2_aoti_plugin.serve)
    names = {name for module in public for name in module.__all__} - {"__version__"}
    assert not [name for name in names if not re.search(rf"\b{name}\b", TEXT["docs/reference.md"])]
    programs = [path.name for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in programs if f"| [{name}]({name}) |" not in TEXT["examples/README.md"]]


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
