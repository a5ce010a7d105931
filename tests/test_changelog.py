"""CHANGELOG.md keeps its form, and tells the version of the package, as CITATION.cff does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import neml2_aoti_plugin

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
HEADINGS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def problems(text: str, version: str) -> list[str]:
    """What is wrong with a changelog."""
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    found = [] if sections[:1] == ["[Unreleased]"] else ["the first section is not [Unreleased]"]
    form = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d")
    found += [f"{section!r} is not '[VERSION] - DATE'" for section in sections[1:] if not form.fullmatch(section)]
    # Nothing has been released yet, or this version is the last one that was.
    if sections[1:] and not sections[1].startswith(f"[{version}]"):
        found.append(f"the last release is {sections[1]}, the package is {version}")
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.*)$", part, re.MULTILINE)
        found += [f"heading {name!r} is not one of {', '.join(HEADINGS)}" for name in headings if name not in HEADINGS]
        found += [f"heading {name!r} is there twice" for name in set(headings) if headings.count(name) > 1]
        entries = "".join(re.split(r"^### .*$", part, flags=re.MULTILINE)[1:]).splitlines()
        # A line is empty, an entry, or its second line.
        found += [f"not part of a list: {line!r}" for line in entries if line and not line.startswith(("- ", "  "))]
    return found + [f"a merge was left undone: {mark}" for mark in re.findall(r"^(?:<|>|=){4}", text, re.MULTILINE)]


def test_the_changelog_keeps_its_form() -> None:
    assert not problems(TEXT, neml2_aoti_plugin.__version__)


def test_the_citation_is_of_the_same_release() -> None:
    told = dict(
        re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    )
    assert f"## [{told['version']}] - {told['date-released']}" in TEXT
    assert told["version"] == neml2_aoti_plugin.__version__


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
        ("- A thing.", "A thing.", "not part of a list"),
    ],
)
def test_a_bad_one_is_told(old: str, new: str, says: str) -> None:
    assert not problems(GOOD, "0.1.0")
    assert any(re.search(says, problem) for problem in problems(GOOD.replace(old, new), "0.1.0"))
