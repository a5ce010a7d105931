"""The benchmark's own arithmetic: targets, what is undecided, what has become slower, and what the page shows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import check, report, timing
from benchmarks.cases import COPY, HETEROGENEOUS, NATIVE, PLUGIN, QUICK_ROWS, ROWS, SUBJECTS, TWO_THREADS, Case
from benchmarks.results import Found, Ratios, Store
from benchmarks.run import all_cases
from benchmarks.targets import MET, MISSED, MISSING, UNDECIDED, Target, judge, targets

ONE = Case("viscoplasticity", HETEROGENEOUS, "forward", 1000)
THREADS = Case("viscoplasticity", HETEROGENEOUS, "threads", 100_000)


def ratios(median: float, spread: float = 0.0) -> Ratios:
    return Ratios(median, median - spread, median - spread / 2, median + spread / 2)


def store_of(folder: Path, *rounds: float, peers: tuple[str, str] = (PLUGIN, NATIVE), case: Case = ONE) -> Store:
    """A store with one case, whose first peer took so many seconds in each round, and the other one second."""
    store = Store(folder / "results.json")
    store.put(Found(case.key, {peers[0]: list(rounds), peers[1]: [1.0] * len(rounds)}))
    return store


def target_of(case: Case, peers: tuple[str, str]) -> Target:
    wanted = (case.model, case.batch, case.quantity, peers)
    (found,) = (t for t in targets() if (t.model, t.batch, t.quantity, t.peers) == wanted and case.rows in t.limits)
    return found


@pytest.mark.parametrize(
    ("case", "peers", "rounds", "verdict"),
    [
        (ONE, (PLUGIN, NATIVE), (0.35, 0.36, 0.37), MET),
        (ONE, (PLUGIN, NATIVE), (0.60, 0.61, 0.62), MISSED),
        # The limit is 0.40: quartiles that are further apart than the median is from it decide nothing.
        (ONE, (PLUGIN, NATIVE), (0.35, 0.39, 0.43), UNDECIDED),
        (ONE, (PLUGIN, NATIVE), (0.35, 0.41, 0.43), UNDECIDED),
        # Two threads are held against one.
        (THREADS, (TWO_THREADS, PLUGIN), (6.0, 6.1, 6.2), MISSED),
        (THREADS, (TWO_THREADS, PLUGIN), (0.5, 0.5, 0.5), MET),
    ],
)
def test_a_target_is_met_or_missed_or_left_open_by_the_noise(
    tmp_path: Path, case: Case, peers: tuple[str, str], rounds: tuple[float, ...], verdict: str
) -> None:
    found = judge(store_of(tmp_path, *rounds, peers=peers, case=case), target_of(case, peers))
    assert [one.verdict for one in found if one.rows == case.rows] == [verdict]


def test_what_was_not_measured_says_why(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.json")
    store.put(Found(ONE.key, {PLUGIN: [1.0, 1.0]}, skipped={NATIVE: "too slow"}))
    found = {one.rows: (one.verdict, one.reason) for one in judge(store, target_of(ONE, (PLUGIN, NATIVE)))}
    assert found[1000] == (MISSING, "too slow") and found[10] == (MISSING, "not part of this run")


def test_each_target_has_a_case_that_measures_it() -> None:
    cases = {case.key: case for case in all_cases(SUBJECTS, ROWS)}
    for target in targets():
        keys = [Case(target.model, target.batch, target.quantity, rows).key for rows in target.limits]
        assert keys and all(set(target.peers) <= set(cases[key].peers) for key in keys)


def test_the_page_begins_with_what_is_gained_and_ends_with_the_targets(tmp_path: Path) -> None:
    lines = report.page(store_of(tmp_path, 0.30, 0.31, 0.32), "performance.png").splitlines()
    begin = "| outputs, to the C++ runtime | viscoplasticity | 1,000 | 0.40 | 0.31 | 0.30 |"
    gain = next(i for i, line in enumerate(lines) if line.startswith("| viscoplasticity") and line.endswith("| 3.2 |"))
    picture = next(i for i, line in enumerate(lines) if "performance.png" in line)
    target = next(i for i, line in enumerate(lines) if line.startswith(begin) and line.endswith("| met |"))
    assert gain < picture < 40 < target


def test_quartiles_and_minimum_are_those_of_ratios_in_the_same_round() -> None:
    found = Found("", {PLUGIN: [1.0, 4.0, 3.0, 8.0, 5.0], NATIVE: [1.0, 2.0, 1.0, 2.0, 1.0]})
    assert found.ratios(PLUGIN, NATIVE) == Ratios(median=3.0, least=1.0, low=2.0, high=4.0)
    assert found.ratios(PLUGIN, COPY) is None


def test_each_call_is_made_before_the_one_that_is_timed() -> None:
    made: list[str] = []
    calls = {name: partial(made.append, name) for name in ("a", "b")}
    found = timing.measure(calls, 0.0, {"a": 60.0, "b": 60.0})
    assert made == ["a", "a", "b", "b"] * timing.LEAST_ROUNDS
    assert len(found["a"]) == len(found["b"]) == timing.LEAST_ROUNDS


def test_only_what_has_grown_beyond_the_spread_of_both_is_worse() -> None:
    before = {name: ratios(0.40, 0.02) for name in ("same", "noisy", "slower", "faster", "gone")}
    now = {"same": ratios(0.41, 0.002), "noisy": ratios(0.50, 0.09), "slower": ratios(0.50, 0.05)}
    now |= {"faster": ratios(0.20, 0.01), "new": ratios(2.0)}
    (found,) = check.worse(before, now)
    assert found.key == "slower" and "slower: 0.500" in str(found)
    noisy = {"a": ratios(0.4, 0.1), "b": ratios(0.4)}
    assert check.blind(noisy, {"a": ratios(0.4, 0.03), "b": ratios(0.6, 0.1)}) == ["a"]
    # Without any spread, two runs of the same sources still differ a little.
    assert not check.worse({"a": ratios(0.40)}, {"a": ratios(0.41)})


def test_reference_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store, file = store_of(tmp_path, 0.25, 0.5, 0.75), tmp_path / "reference.json"
    store.put(Found(Case("viscoplasticity", HETEROGENEOUS, "forward", 1_000_000).key, {PLUGIN: [1.0], NATIVE: [1.0]}))
    store.header = {"commit": "abc", "machine": {"cores": "2"}, "rows": [1]}
    assert check.write(store, file) == 1
    found = check.read(file)
    assert found.ratios == {ONE.key: Ratios(0.5, 0.25, 0.375, 0.625)}
    assert (found.header["commit"], found.header["machine"]) == ("abc", {"cores": "2"})
    assert not check.worse(found.ratios, check.ratios_in(store))


def test_check_tells_what_is_unlike_the_reference() -> None:
    like = {"machine": "a", "versions": {"torch": "2"}, "threads": 1, "optimised": True, "stubs": {"crystal": "c-1"}}
    reference = check.Reference({**like, "stubs": {"crystal": "c-1", "chaboche": "c-2"}}, {})
    assert check.unlike(reference, like) == []
    told = check.unlike(reference, {**like, "threads": 2, "stubs": {"crystal": "c-3"}})
    assert told == ["threads 2, of the reference 1", "other stubs of crystal"]


@pytest.mark.skipif(not check.FILE.exists(), reason="no reference is stored")
def test_stored_reference_covers_the_quick_run() -> None:
    known = {case.key for case in all_cases(SUBJECTS, QUICK_ROWS, memory=False)}
    assert set(json.loads(check.FILE.read_text(encoding="utf-8"))["ratios"]) <= known
