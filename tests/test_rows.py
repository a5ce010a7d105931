"""Each row of a batch is its own problem: neighbours do not matter, and a failing row does not stop the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from neml2.solvers import ConvergenceError
from torch import Tensor

import references
from neml2_aoti_plugin import Model
from neml2_aoti_plugin.errors import InputError
from references import Case, Tensors, difference
from stubs.catalogue import CATALOGUE, EXPLICIT

IMPLICIT = [name for name, stub in CATALOGUE.items() if stub.model not in EXPLICIT]
# Solves by matrix products of other sizes differ in the last bits; the iterations damp that.
SOLO = 1e-10
CAPTURE = "NEML2_CAPTURE_SOLVE_FAILURE"


def with_row(rows: Tensors, name: str, k: int, value: float | Tensor) -> Tensors:
    """The rows, with one input of one row replaced."""
    changed = {n: x.clone() for n, x in rows.items()}
    changed[name][k] = value
    return changed


def not_a_number(case: Case, k: int = 1) -> tuple[Tensors, Tensors]:
    """Rows of a case, and the same with one that is NaN in the first input."""
    rows = case.rows()
    return rows, with_row(rows, case.driven, k, torch.nan)


@pytest.mark.parametrize("name", CATALOGUE)
def test_row_is_the_same_alone_and_in_a_batch(name: str) -> None:
    case = references.case(name)
    rows = case.rows()
    together = case.model.forward(rows)
    for k in range(next(iter(rows.values())).shape[0]):
        alone = case.model.forward({n: x[k] for n, x in rows.items()})
        for out, value in alone.items():
            scale = float(together[out].abs().max())
            tolerance = SOLO if case.dtype == torch.float64 else 1e-6
            assert difference(together[out][k], value, scale) < tolerance, (out, k)


@pytest.mark.parametrize("name", ["viscoplasticity", "composed", "chaboche", "krylov"])
def test_order_of_rows_does_not_matter(name: str) -> None:
    case = references.case(name)
    rows = case.rows()
    order = torch.randperm(next(iter(rows.values())).shape[0], generator=torch.Generator().manual_seed(1))
    together = case.model.forward(rows)
    for out, value in case.model.forward({n: x[order] for n, x in rows.items()}).items():
        assert difference(value, together[out][order]) < SOLO, out


def test_many_rows_give_what_few_give() -> None:
    # More rows than are evaluated at a time.
    case = references.case("viscoplasticity")
    rows = case.rows()
    few = case.model.forward(rows)
    many = case.model.forward({n: x.repeat(300, *(1,) * (x.ndim - 1)) for n, x in rows.items()})
    for out, value in many.items():
        count = few[out].shape[0]
        assert difference(value.reshape(300, count, *few[out].shape[1:]), few[out].expand(300, *few[out].shape)) < SOLO


@pytest.mark.parametrize("name", IMPLICIT)
def test_failing_row_does_not_stop_the_others(name: str) -> None:
    case = references.case(name)
    rows, broken = not_a_number(case)
    expected = case.model.solve(rows)
    found = case.model.solve(broken)
    others = torch.arange(len(found.converged)) != 1
    assert found.converged.tolist() == others.tolist()
    assert found.iterations[others].tolist() == expected.iterations[others].tolist()
    for out, value in found.outputs.items():
        scale = float(expected.outputs[out].abs().max())
        assert bool(value[1].isnan().all()), out
        assert difference(value[others], expected.outputs[out][others], scale) < SOLO, out


@pytest.mark.wide
def test_step_that_cannot_be_solved_fails_alone() -> None:
    case = references.case("chaboche")
    rows = case.rows()
    # Twenty per cent strain in one step.
    broken = with_row(rows, "strain", 2, rows["strain"][2] + 0.2)
    model = case.load()
    model.set_solver_config(**{**case.newton, "miters": 8})
    found = model.solve(broken)
    assert found.converged.tolist() == [True, True, False, True, True, True]
    # Seven, and seven more without chord steps.
    assert int(found.iterations[2]) == 14


class TestError:
    @pytest.mark.parametrize("name", IMPLICIT)
    def test_forward_tells_how_many_and_which(self, name: str) -> None:
        case = references.case(name)
        _, broken = not_a_number(case)
        with pytest.raises(ConvergenceError) as raised:
            case.model.forward(broken)
        text = str(raised.value)
        total = next(iter(broken.values())).shape[0]
        assert f"1 of {total} row" in text
        assert "row 1:" in text
        assert f"{case.newton['atol']:.1e}" in text and f"miters={case.newton['miters']}" in text

    @pytest.mark.parametrize("operation", ["jacobian", "jvp", "param_jacobian", "param_vjp"])
    def test_every_operation_raises(self, operation: str) -> None:
        case = references.case("calibration")
        rows, broken = not_a_number(case)
        ones = {n: torch.ones_like(x) for n, x in case.model.forward(rows).items()}
        more = {"jvp": ({"strain": rows["strain"]},), "param_vjp": (ones,)}.get(operation, ())
        with pytest.raises(ConvergenceError, match="1 of 9 row"):
            getattr(case.model, operation)(broken, *more)

    @pytest.mark.wide
    def test_tells_norms_iterations_and_tolerances_of_the_first_few(self) -> None:
        case = references.case("chaboche")
        model = case.load()
        model.set_solver_config(**{**case.newton, "atol": 3e-11, "rtol": 2e-13, "miters": 2})
        rows = {n: x.repeat(2, *(1,) * (x.ndim - 1)) for n, x in case.rows().items()}
        with pytest.raises(ConvergenceError) as raised:
            model.forward(rows)
        text = str(raised.value)
        assert "of 12 row" in text and "... and" in text
        assert "miters=2" in text and "atol=3.0e-11" in text and "rtol=2.0e-13" in text
        listed = re.findall(r"row (\d+): .*iteration 2, \|R\| = (\S+), \|R0\| = (\S+)", text)
        assert len(listed) == 5
        assert [int(row) for row, _, _ in listed] == sorted(int(row) for row, _, _ in listed)
        assert all(float(norm) > 3e-11 and float(norm0) > 0 for _, norm, norm0 in listed)

    def test_names_places_in_a_batch_of_two_axes(self) -> None:
        case = references.case("viscoplasticity")
        states = {n: x.clone() for n, x in case.states.items()}
        states["strain"][2, 1, 0] = torch.nan
        with pytest.raises(ConvergenceError, match=r"row \[2, 1\]: diverged"):
            case.model.forward(states)

    def test_class_is_neml2s_own(self) -> None:
        import neml2.solvers
        from neml2.aoti import _aoti

        import neml2_aoti_plugin

        assert neml2_aoti_plugin.ConvergenceError is neml2.solvers.ConvergenceError is _aoti.ConvergenceError
        assert issubclass(ConvergenceError, RuntimeError)


class TestCapture:
    def failure(self, case: Case, model: Model | None = None) -> Exception:
        states = {n: x.clone() for n, x in case.states.items()}
        states[case.driven][0, 1] = torch.nan
        with pytest.raises(ConvergenceError) as raised:
            (model or case.model).forward(states)
        error: Exception = raised.value
        return error

    @pytest.mark.parametrize("value", ["", "0", "false", " No ", "OFF", None])
    def test_is_off_unless_asked_for(self, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(CAPTURE, raising=False)
        if value is not None:
            monkeypatch.setenv(CAPTURE, value)
        error = self.failure(references.case("viscoplasticity"))
        assert not hasattr(error, "unknowns")

    @pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
    @pytest.mark.parametrize("name", ["viscoplasticity", "composed", "krylov", "cross_group", "substepping"])
    def test_attaches_mask_and_iterates(self, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(CAPTURE, "1")
        case = references.case(name)
        error = self.failure(case, case.load(mode=mode))
        batch = tuple(next(iter(case.states.values())).shape[:2])
        mask: Tensor = error.converged_mask  # type: ignore[attr-defined]
        unknowns: Tensors = error.unknowns  # type: ignore[attr-defined]
        assert mask.dtype == torch.bool and mask.shape == batch
        assert not bool(mask[0, 1])
        assert set(unknowns) == set(case.implicit.system.unknown_names)
        outputs = case.model.solve(case.states).outputs
        for unknown, value in unknowns.items():
            assert value.shape == outputs[unknown].shape, unknown
            scale = float(outputs[unknown].abs().max())
            assert difference(value[mask], outputs[unknown][mask], scale) < 1e-8, unknown
        if name == "substepping":
            # The mask is that of the first try, before the step was cut.
            assert mask.sum() < mask.numel() - 1
        else:
            assert int(mask.sum()) == mask.numel() - 1


class TestLockstep:
    @pytest.mark.parametrize("name", IMPLICIT)
    def test_agrees_with_rowwise(self, name: str) -> None:
        case = references.case(name)
        rows = case.rows()
        expected = case.model.forward(rows)
        for out, value in case.load(mode="lockstep").forward(rows).items():
            tolerance = 1e-6 if name == "bicgstab" else 1e-9
            assert difference(value, expected[out]) < tolerance, out

    @pytest.mark.wide
    def test_rows_share_the_number_of_iterations(self) -> None:
        case = references.case("chaboche")
        rowwise, lockstep = (case.load(mode=mode).solve(case.rows()).iterations for mode in ("rowwise", "lockstep"))
        assert len(set(rowwise.tolist())) > 1
        assert len(set(lockstep.tolist())) == 1

    def test_can_be_chosen_by_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_MODE", "lockstep")
        case = references.case("viscoplasticity")
        assert case.load().mode == "lockstep"
        assert case.load(mode="rowwise").mode == "rowwise"

    def test_failing_row_is_told(self) -> None:
        case = references.case("viscoplasticity")
        _, broken = not_a_number(case)
        model = case.load(mode="lockstep")
        with pytest.raises(ConvergenceError, match="1 of 9 row"):
            model.forward(broken)
        assert model.solve(broken).converged.tolist() == [k != 1 for k in range(9)]


def test_rows_of_a_block_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = references.case("viscoplasticity")
    rows = {name: torch.cat([x] * 3) for name, x in case.rows().items()}
    whole = case.load().forward(rows)
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "2")
    model = case.load()
    sizes: list[int] = []
    segment = model._caller.program.implicit[0]
    solve = segment.solve

    def seen(state: Tensors, values: Any, rows: int, *rest: Any, **options: Any) -> Any:
        sizes.append(rows)
        return solve(state, values, rows, *rest, **options)

    monkeypatch.setattr(segment, "solve", seen)
    cut = model.forward(rows)
    # Of whole vectors.
    assert sum(sizes) == len(rows["t"]) and max(sizes) == 16 and len(sizes) > 1
    for out, value in whole.items():
        assert difference(cut[out], value) < SOLO
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", wrong)
        with pytest.raises(InputError, match=f"NEML2_AOTI_PLUGIN_BLOCK_ROWS is '{wrong}'"):
            case.load()
