"""docs/quickstart.md in a fresh clone and a fresh environment, with nothing but what the page says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import page_shell
from page_shell import ROOT
from stubs.build import QUICK

PAGE = "docs/quickstart.md"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["clone", "wheel"])
def test_the_quickstart_reaches_the_picture(way: str, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=120)
    text = (clone / PAGE).read_text(encoding="utf-8")
    other = {"clone": "pip wheel", "wheel": "pip install '.[plot]'"}[way]
    parts = ["set -euo pipefail"]
    for language, block in page_shell.blocks(text):
        if language == "sh":
            lines = [line for line in block.splitlines() if not line.startswith(other)]
            # The page gives a wheel as another way to install.
            parts += [line for line in lines if not (way == "clone" and "dist/" in line)]
        elif language == "python":
            (clone / "page.py").write_text(block, encoding="utf-8")
            parts.append("python page.py")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("NEML2_", "PYTHON", "TORCH", "VIRTUAL_ENV"))}
    # torch as it is here, rather than the newest with gigabytes of CUDA; and a compile without optimised wrappers. The
    # build has a llvmlite of its own, which pip would hold against the constraint too.
    constraints = tmp_path / "constraints.txt"
    wanted = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(line for line in wanted if not line.startswith("llvmlite")), encoding="utf-8")
    variables = {**kept, **QUICK, "PIP_CONSTRAINT": str(constraints)}
    # From another folder, the package that is imported is the installed one.
    parts.append("here=$PWD; cd /; $here/.venv/bin/python -c 'import neml2_aoti_plugin; print(neml2_aoti_plugin)'")
    done = subprocess.run(
        ["bash", "-c", "\n".join(parts)], cwd=clone, env=variables, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (clone / "first/curve.png").stat().st_size > 5000
    assert re.search(r"\d+\.\d MPa at 3\.0 % strain", done.stdout)
    assert "site-packages" in done.stdout.splitlines()[-1]
