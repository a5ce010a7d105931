"""The Python snippets of the README and the usage page run as they stand there, one after the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stubs.build import compiled

ROOT = Path(__file__).resolve().parent.parent
# The pages, and the stubs that their snippets find under aoti/.
PAGES = {
    "README.md": ("elasticity", "promoted", "viscoplasticity"),
    "docs/tool.md": ("promoted",),
    "docs/usage.md": ("elasticity", "promoted", "viscoplasticity", "cross_group"),
    "docs/solvers.md": ("viscoplasticity",),
    "docs/scaling.md": ("viscoplasticity",),
}


def snippets(page: str) -> str:
    """Join the Python blocks of a page, each on its line of the page, so that a traceback tells where it failed."""
    inside = False
    lines = []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page: str, tmp_path: Path) -> None:
    for name in PAGES[page]:
        shutil.copytree(compiled(name), tmp_path / "aoti", dirs_exist_ok=True)
    script = tmp_path / Path(page).with_suffix(".py").name
    script.write_text(snippets(page), encoding="utf-8")
    # From a fresh process, as a reader would run them, and without what this process has imported or set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEML2_")}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    lost = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not lost, f"{page} links to {lost}"
