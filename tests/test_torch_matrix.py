"""The page of the torch matrix: what was measured under other Pythons takes its place, and nothing else's."""

from __future__ import annotations

from tools.torch_matrix.page import with_pythons
from tools.torch_matrix.results import Measured

PAGE = "# torch releases\n\nAll of it.\n\n## Tests\n\n| a |\n|---|\n\n## What failed\n\nNothing.\n"


def measured(python: str, passed: int, **failed: str) -> Measured:
    versions = {"Python": python, "torch": "2.13.0", "llvmlite": "0.68.1"}
    name = f"2.13.0-python{python}"
    return Measured(name, "2026-11-27", commit="abc", versions=versions, passed=passed, failed=failed, test_seconds=9.0)


def test_pythons_get_a_section_of_their_own_and_replace_the_one_before() -> None:
    once = with_pythons(PAGE, [measured("3.10.13", 7)])
    assert once.startswith(PAGE[: PAGE.index("## What failed")].rstrip("\n"))
    assert once.endswith("## What failed\n\nNothing.\n")
    (line,) = [line for line in once.splitlines() if line.startswith("| 3.10.13 |")]
    assert "| 7 | 0 |" in line
    twice = with_pythons(once, [measured("3.10.13", 8), measured("3.12.1", 9, test_x="assert 1 == 2")])
    assert twice.count("## Pythons") == 1 and "| 7 |" not in twice
    assert "| 8 | 0 |" in twice and "| 9 | 1 |" in twice and "`test_x`: `assert 1 == 2`" in twice
