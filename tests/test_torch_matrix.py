"""The page of the torch matrix: what was measured takes its place, and nothing else's."""

from __future__ import annotations

from tools.torch_matrix.cases import Crossing, Measured
from tools.torch_matrix.page import page


def measured(name: str, python: str, passed: int, **failed: str) -> Measured:
    versions = {"Python": python, "torch": "2.13.0", "llvmlite": "0.50.0"}
    return Measured(name, "2026-11-27", commit="abc", versions=versions, passed=passed, failed=failed, test_seconds=9.0)


def line(text: str, begin: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {begin} |")]
    return found


def test_what_was_measured_takes_its_section_and_others_stay() -> None:
    torch = measured("2.15.0", "3.11.7", 5)
    torch.stamp = "now"
    same = Crossing("now", "abc", 1, {"elasticity": 0.0})
    before = page([torch, measured("python3.10", "3.10.13", 6)], {"2.15.0": {"2.15.0": same}}, jobs=2)
    assert "| all | 5 | 0 |" in before and "| 6 | 0 |" in before and "| 2.15.0 | 1: 0 |" in before
    failed = {"test_x": "assert 1 == 2"}
    pythons = [measured("python3.10", "3.10.13", 8), measured("python3.12", "3.12.1", 9, **failed)]
    after = page(pythons, {}, 2, before)
    assert "| 5 | 0 |" in after and "| 2.15.0 | 1: 0 |" in after
    assert after.count("## Pythons") == 1 and "| 6 | 0 |" not in after
    assert "| 8 | 0 |" in line(after, "3.10") and "| 9 | 1 |" in line(after, "3.12")
    assert "`test_x`: `assert 1 == 2`" in after
    assert page(pythons, {}, 2, after) == after


def test_a_failure_and_a_difference_are_told() -> None:
    torch = measured("2.15.0", "3.11.7", 0)
    torch.stamp, torch.trouble = "now", "install: no space"
    one = Crossing("now", "abc", 2, {"elasticity": 1e-3}, refused={"crystal": "OSError: gone"})
    text = page([torch], {"2.15.0": {"2.15.0": one}}, jobs=2)
    assert "stopped at `install: no space`" in text
    assert "`elasticity` differs by 1.0e-03" in text and "`crystal`: `OSError: gone`" in text
