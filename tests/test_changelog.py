"""CHANGELOG.md keeps its form, and tells the version of the package, as CITATION.cff does."""

from __future__ import annotations

import re

from environments import ROOT
from neml2_aoti_plugin import __version__

TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
HEADINGS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_keeps_its_form() -> None:
    _, unreleased, *rest = re.split(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    releases, parts = rest[1::2], rest[::2]
    assert unreleased == "[Unreleased]" and releases[0].startswith(f"[{__version__}]")
    for release in releases:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release), f"{release!r} is not '[VERSION] - DATE'"
    for part in parts:
        _, *groups = re.split(r"^### (.*)$", part, flags=re.MULTILINE)
        headings, entries = groups[::2], "".join(groups[1::2]).splitlines()
        assert set(headings) <= HEADINGS and len(set(headings)) == len(headings), headings
        # A line is empty, an entry, or its second line.
        wrong = [line for line in entries if line and not line.startswith(("- ", "  "))]
        assert not wrong, f"not part of a list: {wrong}"
    assert not re.search(r"^(?:<|>|=){4}", TEXT, re.MULTILINE), "a merge was left undone"


def test_the_citation_is_of_the_same_release() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    told = dict(re.findall(r"^(version|date-released): (\S+)$", citation, re.MULTILINE))
    assert f"## [{told['version']}] - {told['date-released']}" in TEXT
    assert told["version"] == __version__
