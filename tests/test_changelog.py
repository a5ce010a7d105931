"""CHANGELOG.md keeps its form: an Unreleased section first, known headings, and the version of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import neml2_aoti_plugin

TEXT = (Path(__file__).resolve().parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
HEADINGS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def problems(text: str, version: str) -> list[str]:
    """What is wrong with a changelog."""
    found = []
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    if sections[:1] != ["[Unreleased]"]:
        found.append("the first section is not [Unreleased]")
    for section in sections[1:]:
        if not re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", section):
            found.append(f"{section!r} is not '[VERSION] - DATE'")
    # Nothing has been released yet, or this version is the last one that was.
    if sections[1:] and not sections[1].startswith(f"[{version}]"):
        found.append(f"the last release is {sections[1]}, the package is {version}")
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.*)$", part, re.MULTILINE)
        found += [f"heading {name!r} is not one of {', '.join(HEADINGS)}" for name in headings if name not in HEADINGS]
        found += [f"heading {name!r} is there twice" for name in set(headings) if headings.count(name) > 1]
        for block in re.split(r"^### .*$", part, flags=re.MULTILINE)[1:]:
            found += [f"neither an entry nor its second line: {line!r}" for line in block.splitlines() if stray(line)]
    marks = ("<<<<", ">>>>", "====")
    found += [f"a merge was left undone: {line!r}" for line in text.splitlines() if line.startswith(marks)]
    return found


def stray(line: str) -> bool:
    """Whether a line of a section is neither empty nor part of a list."""
    return bool(line) and not line.startswith(("- ", "  "))


def test_the_changelog_keeps_its_form() -> None:
    assert not problems(TEXT, neml2_aoti_plugin.__version__)


GOOD = (
    "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-02\n\n### Fixed\n\n- Another.\n"
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("## [Unreleased]\n\n", "", "the first section is not"),
        ("### Fixed", "### Mended", "heading 'Mended'"),
        ("[0.1.0] - 2026-01-02", "0.1.0", "is not '\\[VERSION"),
        ("[0.1.0]", "[0.2.0]", "the last release is"),
        ("- A thing.", "- A thing.\n\n### Added", "is there twice"),
        ("- A thing.", "A thing.", "neither an entry"),
    ],
)
def test_a_bad_one_is_told(old: str, new: str, says: str) -> None:
    assert not problems(GOOD, "0.1.0")
    assert any(re.search(says, problem) for problem in problems(GOOD.replace(old, new), "0.1.0"))
