"""`Points`: steps and their state, against neml2's driver, a law by hand, and calls of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import radial_return
import references
from neml2_aoti_plugin import AOTIError, InputError, Model, Points, UnknownNameError
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.points import PointsResult
from neml2_aoti_plugin.points._evaluation import step_factor
from point_cases import Array, N, begun, close, require_state, strains, unchanged

NO_UPDATE = "no update since the last commit or revert"


def by_hand(size: float, *times: float) -> Array:
    """Stresses by hand after steps to these times, at strains of a size times the time."""
    hand = radial_return.RadialReturn(N)
    for time in times:
        found = hand.update(strain=strains(size * time), t=time)
        hand.commit()
    stress: Array = found.outputs["stress"]
    return stress


def renamed(folder: Path, **inputs: str) -> Model:
    """The viscoplastic model with other names at its boundary for values of the step before."""
    names = {f"{name}~1": other for name, other in inputs.items()}
    return references.altered("viscoplasticity", folder, boundary_aliases={"inputs": names})


class TestRoles:
    @pytest.mark.parametrize(
        ("name", "driven", "kept", "pairs"),
        [
            (
                *("viscoplasticity", ("strain", "t")),
                ("strain~1", "t~1", "equivalent_plastic_strain~1", "stress~1"),
                (("stress", "strain"),),
            ),
            ("elasticity", ("strain",), (), (("stress", "strain"),)),
            # Inputs that are initial guesses are kept and given.
            ("cross_group", ("stress", "t"), ("branch_strain~1", "t~1", "strain~1"), (("strain", "stress"),)),
        ],
    )
    def test_follow_from_names(self, name: str, driven: Any, kept: Any, pairs: Any) -> None:
        points = Points(references.case(name).artifact, np.int64(3))
        assert (points.n, points.driven, points.kept, points.pairs) == (3, driven, kept, pairs)
        assert "3, notation='mandel', dimension=3" in repr(points)

    def test_history_under_another_name_is_told(self, tmp_path: Path) -> None:
        model = renamed(tmp_path, stress="old_stress")
        assert Points(model, 1).driven == ("strain", "t", "old_stress")
        points, plain = Points(model, N, history={"old_stress": "stress~1"}), begun()
        assert points.driven == ("strain", "t") and "stress~1" in points.kept
        for one in (points, plain):
            one.initial(stress=np.array([10.0, 0, 0, 0, 0, 0]))
        close(*(one.update(strain=strains(1e-2), t=1.0) for one in (points, plain)))

    def test_what_cannot_be_derived_is_said(self, tmp_path: Path) -> None:
        model = renamed(tmp_path, stress="sigma~1")
        assert Points(model, 1, driven=["sigma~1"]).driven == ("strain", "t", "sigma~1")
        assert "stress~1" in Points(model, 1, history={"sigma~1": "stress~1"}).kept
        told: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({}, InputError, r"where 'sigma~1' come from.*history=\{'sigma~1': 'VARIABLE~1'\}.*driven="),
            ({"history": {"sigma~1": "stress"}}, InputError, "'sigma~1' is 'stress', expected a name such as"),
            ({"history": {"sigma~1": "t~1"}}, InputError, r"'sigma~1' has the base shape \(6,\) and 't' \(\)"),
            ({"driven": ["sigma"]}, UnknownNameError, r"history= and driven= .* unknown 'sigma'"),
        ]
        for options, error, words in told:
            with pytest.raises(error, match=words):
                Points(model, 1, **options)


class TestSteps:
    @pytest.mark.parametrize(
        ("name", "n", "steps"),
        [
            ("viscoplasticity", 3, 40),
            ("calibration", 3, 40),
            ("cross_group", 2, None),
            # Without a predictor.
            pytest.param("krylov", 2, None, marks=pytest.mark.wide),
            # With histories of two steps.
            pytest.param("chaboche", 2, None, marks=pytest.mark.wide),
        ],
    )
    def test_agree_with_neml2s_driver(self, name: str, n: int, steps: int | None) -> None:
        case = references.case(name)
        points = begun(case.model, n)
        for step in range(1, steps or case.driver.nsteps):
            given = case.driver.result_in[step]
            found = points.update({name: given[name].data.numpy() for name in points.driven})
            assert bool(found.converged.all())
            for output, value in found.outputs.items():
                expected = case.driver.result_out[step][output].data
                assert references.difference(torch.from_numpy(value), expected, 1e-6) < 1e-7
            points.commit()

    def test_histories_of_two_steps(self, tmp_path: Path) -> None:
        # What the model takes for the strain before the step comes from two steps back.
        model = renamed(tmp_path, strain="strain~2")
        points, first = Points(model, N), strains(1e-3)
        assert set(points.kept) == {"strain~1", "strain~2", "t~1", "equivalent_plastic_strain~1", "stress~1"}
        points.initial({"strain~2": first}, strain=2 * first)
        state = {name: torch.zeros(N, *model.inputs[name].base_shape).double() for name in model.input_names}
        for step in range(1, 5):
            now, before, last = (torch.from_numpy((2.0 + step - back) * first) for back in (0, 2, 1))
            state |= {"strain": now, "strain~2": before, "t": torch.full((N,), float(step)).double()}
            expected = model.forward(state)
            found = points.update(strain=now.numpy(), t=float(step))
            assert np.allclose(found.outputs["stress"], expected["stress"], rtol=1e-12)
            points.commit()
            assert np.array_equal(points.committed("strain", 2), last)
            state |= {f"{name}~1": value for name, value in {**expected, "t": state["t"]}.items()}

    def test_many_updates_of_a_step_leave_the_state(self) -> None:
        points, once = begun(), begun()
        for one in (points, once):
            one.update(strain=strains(3e-3), t=1.0)
            one.commit()
        with unchanged(points):
            for factor in (4.0, 2.0, -1.0, 2.00001):
                points.update(strain=factor * strains(3e-3), t=2.0)
        close(*(one.update(strain=2 * strains(3e-3), t=2.0) for one in (points, once)))

    def test_revert_forgets(self) -> None:
        points, found = begun(), list[PointsResult]()
        for _ in range(2):
            found.append(points.update(strain=strains(), t=1.0))
            points.revert()
        cold, again = found
        assert np.array_equal(cold.iterations, again.iterations)
        assert np.array_equal(cold.outputs["stress"], again.outputs["stress"])
        for call in (points.commit, lambda: points.trial("stress")):
            with pytest.raises(AOTIError, match=NO_UPDATE):
                call()

    def test_tangent_on_request(self) -> None:
        points = begun("calibration", pairs=[("equivalent_plastic_strain", "strain"), ("stress", "t")])
        found = points.update(strain=strains(), t=1.0).tangent
        assert {out: list(row) for out, row in found.items()} == {
            "stress": ["t"],
            "equivalent_plastic_strain": ["strain"],
        }
        assert found["equivalent_plastic_strain"]["strain"].shape == found["stress"]["t"].shape == (N, 6)
        assert points.update(strain=strains(), t=1.0, tangent=False).tangent == {}

    @pytest.mark.parametrize(("dimension", "entries"), [(3, 6), ("plane stress", 3)])
    def test_no_points(self, dimension: Any, entries: int) -> None:
        points = begun(n=0, dimension=dimension)
        found = points.update(strain=np.zeros((0, entries)), t=1.0)
        assert found.outputs["stress"].shape == (0, entries)
        assert found.tangent["stress"]["strain"].shape == (0, entries, entries)
        points.commit()


class TestWarmStart:
    def test_saves_updates(self) -> None:
        points = begun()
        cold, warm = (points.update(strain=factor * strains(2e-2), t=1.0) for factor in (1.0, 1 + 1e-6))
        assert int(cold.iterations.max()) >= 5 and int(warm.iterations.max()) <= 2

    def test_makes_no_point_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = references.case("viscoplasticity")
        model = case.load()
        # It is easily lost.
        model.set_solver_config(**{**case.newton, "ls_max_iters": 1})
        points = begun(model)
        enough = int(points.update(strain=strains(4e-3), t=1.0).iterations.max())
        points.update(strain=-strains(4e-2), t=1.0)
        # As many updates as the model needs from its own start, and no more.
        model.set_solver(miters=enough + 1)
        solve, solved = model.solve, list[bool]()

        def noted(*arguments: Any, **options: Any) -> Any:
            found = solve(*arguments, **options)
            solved.append(bool(found.converged.all()))
            return found

        monkeypatch.setattr(model, "solve", noted)
        found = points.update(strain=strains(4e-3), t=1.0)
        assert solved == [False, True], "the start is meant to be a bad one"
        assert bool(found.converged.all())
        assert np.allclose(found.outputs["stress"], by_hand(4e-3, 1.0), atol=1e-6)


class TestFailedPoints:
    @pytest.fixture
    def points(self) -> Points:
        points = begun()
        points.update(strain=strains(), t=1.0)
        points.commit()
        return points

    @pytest.fixture
    def found(self, points: Points) -> PointsResult:
        strain = strains(1e-2)
        strain[[1, 3]] = np.nan
        return points.update(strain=strain, t=2.0)

    def test_are_told_and_raise_nothing(self, found: PointsResult) -> None:
        assert found.failed == [1, 3] and found.converged.tolist() == [True, False] * 2
        assert list(found.outcome) == [Outcome.CONVERGED, Outcome.DIVERGED] * 2
        assert np.isnan(found.outputs["stress"][[1, 3]]).all()
        assert np.isnan(found.tangent["stress"]["strain"][[1, 3]]).all()
        assert np.allclose(found.outputs["stress"][[0, 2]], by_hand(5e-3, 1.0, 2.0)[[0, 2]], atol=1e-6)
        assert found.step_factor == 0.5

    def test_are_not_committed(self, points: Points, found: PointsResult) -> None:
        said = r"2 of 4 points failed.*: 1, 3. Call revert\(\) and give finite values of 'strain', or commit"
        with unchanged(points):
            with pytest.raises(AOTIError, match=said):
                points.commit()
            with pytest.raises(AOTIError, match="1 of 4 points failed"):
                points.commit([0, 1])
        # It can still be committed.
        points.commit(found.converged)

    def test_those_of_a_model_that_solves_nothing_too(self) -> None:
        # Which has no state that must be given first.
        points, strain = Points(references.case("elasticity").model, 3), strains(1e-3, 3)
        strain[1, 4] = np.nan
        found = points.update(strain=strain)
        assert found.failed == [1] and found.step_factor == 0.5
        assert list(found.outcome) == [Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.CONVERGED]
        with pytest.raises(AOTIError, match="1 of 3 points failed in the last update and can't be committed: 1"):
            points.commit()
        points.commit(found.converged)

    @pytest.mark.parametrize("kind", ["mask", "indices", "torch"])
    def test_others_may_be_committed(self, points: Points, found: PointsResult, kind: str) -> None:
        before, mask = points.state().values, torch.from_numpy(found.converged)
        points.commit({"mask": found.converged, "indices": np.array([0, 2]), "torch": mask}[kind])
        assert np.array_equal(points.committed("stress")[[0, 2]], found.outputs["stress"][[0, 2]])
        assert points.committed("t").tolist() == [2.0, 1.0, 2.0, 1.0]
        assert all(torch.equal(x[[1, 3]], before[name][[1, 3]]) for name, x in points.state().values.items())

    def test_those_behind_can_be_taken_along_in_smaller_steps(self, points: Points, found: PointsResult) -> None:
        points.commit(found.converged)
        for time in (1.5, 2.0):
            behind = points.update(strain=strains(5e-3 * time), t=time)
            # The others have no time left, and are not asked.
            assert bool(behind.converged[[1, 3]].all())
            points.commit([1, 3])
        assert np.allclose(points.committed("stress")[[1, 3]], by_hand(5e-3, 1.0, 1.5, 2.0)[[1, 3]], atol=1e-6)


class TestParts:
    """Updates of a part of the points."""

    @pytest.mark.parametrize("dimension", [3, "plane stress"])
    def test_are_the_update_of_the_whole(self, dimension: Any) -> None:
        whole, parts = (begun(dimension=dimension) for _ in range(2))
        chosen = {"list": [3, 0], "slice": slice(2, None, 3), "mask": torch.tensor([False, True, False, False])}
        for step in (1, 2):
            # Two updates of the step, of which the second starts from the first.
            for factor in (1.0, 1.1):
                strain, time = strains(factor * step * 4e-3, dimension=dimension), np.linspace(0.5, 1.0, N) * step
                expected = whole.update(strain=strain, t=time)
                for (kind, part), rows in zip(chosen.items(), ([3, 0], [2], [1]), strict=True):
                    found = parts.update(strain=strain[rows], t=time[rows], points=part)
                    assert np.array_equal(found.iterations, expected.iterations[rows]), kind
                    close(found, expected, rows)
                # That of the last part is that of the step.
                assert found.step_factor == expected.step_factor
            for one in (whole, parts):
                one.commit()
            for name, value in whole.state().values.items():
                assert torch.allclose(parts.state().values[name], value, rtol=1e-11, atol=1e-12)

    def test_points_that_were_not_updated_stay_where_they_are(self) -> None:
        points = begun()
        points.update(strain=strains()[:3], t=1.0, points=[0, 1, 2])
        assert np.isnan(points.trial("stress")[3:]).all() and np.isfinite(points.trial("stress")[:3]).all()
        with pytest.raises(AOTIError, match="1 of 4 points were not updated"):
            points.commit()
        points.commit(slice(3))
        assert points.committed("t").tolist() == [1, 1, 1, 0] and not points.committed("stress")[3:].any()
        assert np.allclose(points.committed("stress")[:3], by_hand(5e-3, 1.0)[:3], atol=1e-6)

    def test_whole_and_parts_in_one_step(self) -> None:
        points, expected, strain = begun(), begun(), strains()
        points.update(strain=strains(9e-3)[:2], t=1.0, points=[0, 1])
        with torch.inference_mode():
            points.update(strain=strain, t=1.0)
        bad = points.update(strain=np.full((2, 6), np.nan), t=1.0, points=[2, 3])
        assert bad.failed == [0, 1] and bad.step_factor == 0.5
        # A part that is fine does not hide that another one failed.
        assert points.update(strain=strain[:1], t=1.0, points=[0]).step_factor == 0.5
        with pytest.raises(AOTIError, match=r"2 of 4 points failed in the last update .*: 2, 3"):
            points.commit()
        strain[2:] *= 2.0
        points.update(strain=strain[2:], t=1.0, points=[2, 3])
        points.commit()
        assert np.allclose(points.committed("stress"), expected.update(strain=strain, t=1.0).outputs["stress"])

    @pytest.mark.parametrize("dimension", [3, "plane stress"])
    def test_parameters_of_each_point(self, dimension: Any) -> None:
        model, young = references.case("promoted").load(), torch.tensor([70e3, 80e3, 210e3, 1e5]).double()
        model.set_parameter("promoted.E", young)
        points, strain, part = Points(model, N, dimension=dimension), strains(1e-3, dimension=dimension), [2, 0]
        expected = points.update(strain=strain)
        close(points.update(strain=strain[part], points=part), expected, part)
        # The stress is proportional to the modulus.
        modulus, wanted = model.get_parameter("promoted.E").requires_grad_(), torch.zeros(N).double()
        stress = points.update(strain=torch.from_numpy(strain[part]), points=part).outputs["stress"]
        stress.sum().backward()
        wanted[part] = stress.detach().sum(-1) / young[part]
        assert modulus.grad is not None and torch.allclose(modulus.grad, wanted, rtol=1e-10)
        model.set_parameter("promoted.E", 1.0)
        with torch.no_grad():
            given = {"promoted.E": young[part]}
            close(points.update(strain=strain[part], points=part, param_overrides=given), expected, part)

    def test_out_is_of_the_part(self) -> None:
        points, stress = begun(), np.zeros((N, 6))
        for part in (slice(0, 3), slice(3, 4)):
            points.update(strain=strains()[part], t=1.0, points=part, out={"stress": stress[part]})
        assert np.array_equal(stress, begun().update(strain=strains(), t=1.0).outputs["stress"])


class TestStepFactor:
    def test_rule(self) -> None:
        assert step_factor(3, failed=True) == step_factor(0, failed=True) == 0.5
        assert step_factor(0, failed=False) == step_factor(1, failed=False) == 2.0
        assert step_factor(8, failed=False) == 1.0
        assert step_factor(1000, failed=False) == 0.5
        assert step_factor(6, failed=False) > step_factor(7, failed=False) > step_factor(9, failed=False)

    def test_the_hardest_update_of_a_step_counts(self) -> None:
        points = begun()
        first, again = (points.update(strain=strains(2e-2), t=1.0) for _ in range(2))
        assert int(again.iterations.max()) == 0 and again.step_factor == first.step_factor < 2.0
        points.commit()
        assert points.update(strain=strains(2e-2), t=1.001).step_factor > first.step_factor


def test_a_state_restores_at_any_time() -> None:
    points = begun()
    before = points.state()
    points.update(strain=strains(), t=1.0)
    points.commit()
    points.restore(before)
    with pytest.raises(AOTIError, match=NO_UPDATE):
        points.commit()
    require_state(points, before)
