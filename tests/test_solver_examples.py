"""The finite-element programs of examples/, against the same programs around a law that was written by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radial_return
import references
from examples import bar, plate
from neml2_aoti_plugin import Points

ROOT = Path(__file__).resolve().parent.parent


class Steady:
    """Points that suggest to keep the step, so that two laws take the same steps."""

    def __init__(self, points: Any) -> None:
        self.initial, self.commit, self.revert, self._points = points.initial, points.commit, points.revert, points

    def update(self, **driven: Any) -> Any:
        return replace(self._points.update(**driven), step_factor=1.0)


def test_bar() -> None:
    points = Points(references.case("viscoplasticity").model, bar.ELEMENTS)
    u, stress, residuals = bar.run(points)
    by_hand = bar.run(radial_return.RadialReturn(bar.ELEMENTS))
    assert np.allclose(u, by_hand[0], rtol=1e-9, atol=1e-12)
    assert np.allclose(stress, by_hand[1], rtol=1e-9)
    assert all(map(plate.is_quadratic, residuals)) and all(map(plate.is_quadratic, by_hand[2]))
    # The thin end flows more.
    strain = np.diff(u)
    assert strain[-1] > 1.5 * strain[0]


def test_bar_is_short_and_needs_numpy_and_scipy_alone() -> None:
    lines = (ROOT / "examples" / "bar.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    assert {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))} == {
        *("__future__", "sys", "pathlib", "typing", "numpy", "scipy", "neml2_aoti_plugin", "stubs"),
    }


@pytest.fixture(scope="module")
def small() -> plate.Plate:
    return plate.Plate(4, 6)


def test_plate(small: plate.Plate) -> None:
    model = references.case("viscoplasticity").model
    points = Points(model, small.points, notation="voigt", dimension="plane strain")
    found = plate.run(small, Steady(points), end=2.0, first_step=0.5)
    hand = radial_return.RadialReturn(small.points, "plane strain")
    by_hand = plate.run(small, Steady(hand), end=2.0, first_step=0.5)
    assert found.times == by_hand.times and found.reverted == by_hand.reverted == 0
    assert float(found.plastic.max()) > 1e-3
    assert np.allclose(found.displacement, by_hand.displacement, rtol=1e-7, atol=1e-11)
    assert np.allclose(found.plastic, by_hand.plastic, rtol=1e-6, atol=1e-11)
    assert np.allclose(found.force, by_hand.force, rtol=1e-9)
    for residuals in (*found.residuals, *by_hand.residuals):
        assert residuals[-1] < plate.TOLERANCE and plate.is_quadratic(residuals)
    assert set(found.seconds) == {"material", "assembly", "solver"}


def test_plate_takes_steps_back_in_which_points_fail(small: plate.Plate) -> None:
    case = references.case("viscoplasticity")
    model = case.load()
    # So few updates that points fail in steps that are far from long.
    model.set_solver_config(**{**case.newton, "miters": 6, "ls_max_iters": 1})
    points = Points(model, small.points, notation="voigt", dimension="plane strain")
    found = plate.run(small, points, end=1.0, first_step=1.0)
    assert found.reverted > 0 and found.times[-1] == pytest.approx(1.0)
    expected = plate.run(
        small, Steady(radial_return.RadialReturn(small.points, "plane strain")), end=1.0, first_step=found.times[0]
    )
    assert found.force[-1] == pytest.approx(expected.force[-1], rel=2e-2)


@pytest.mark.wide
def test_plate_is_drawn_with_its_time_split(tmp_path: Path) -> None:
    picture = tmp_path / "plate.png"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "plate.py", "--output", picture],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taken back" in done.stdout and all(f"{name} " in done.stdout for name in ("material", "assembly", "solver"))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_residuals_that_are_not_quadratic_are_seen() -> None:
    assert plate.is_quadratic([1e-1, 1e-2, 1e-4, 1e-8, 1e-15])
    assert not plate.is_quadratic([1e-2, 1e-4, 1e-5, 1e-6])
