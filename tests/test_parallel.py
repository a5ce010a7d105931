"""A pool of worker processes gives what one model gives, and refuses what it refuses."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import (
    AOTIError,
    ArtifactError,
    ConvergenceError,
    DerivativeNotCompiledError,
    InputError,
    InputTypeError,
    Model,
    Pool,
    UnknownNameError,
)
from neml2_aoti_plugin.parallel import chunks
from neml2_aoti_plugin.parallel.workers import Workers
from references import Case, Tensors, difference
from stubs.catalogue import CATALOGUE

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")

SAME = 1e-12
DERIVED = [name for name, stub in CATALOGUE.items() if "-d" in stub.flags]
PROMOTED = [name for name, stub in CATALOGUE.items() if stub.by_parameters]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes for all tests that do no harm to them."""
    found = Workers(2)
    yield found
    found.close()


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return references.case(request.param)


@pytest.fixture
def pool(case: Case, workers: Workers) -> Pool:
    """The case's model over these processes, in chunks of a few rows."""
    return Pool.over(case.model, workers, chunk=2)


def viscoplasticity(rows: int, seed: int = 3) -> Tensors:
    """Inputs of viscoplasticity, in which rows are strained by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "strain": 3e-3 * torch.randn(rows, 6, dtype=torch.float64, generator=generator),
        "strain~1": torch.zeros(6, dtype=torch.float64),
        "t": torch.rand(rows, dtype=torch.float64, generator=generator) + 0.5,
        "t~1": zero,
        "equivalent_plastic_strain~1": zero,
        "stress~1": torch.zeros(6, dtype=torch.float64),
    }


def assert_same(found: Any, expected: Any, tolerance: float = SAME) -> None:
    """Compare results: tensors, and dicts and tuples of them."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        if expected.is_floating_point():
            assert difference(found, expected) <= tolerance
        else:
            assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value, tolerance)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs, tolerance)
    else:
        assert found == expected


def tolerance_of(case: Case) -> float:
    return SAME if case.dtype == torch.float64 else 1e-6


class TestSameAsModel:
    """Each operation, on states `(steps, points)` of the stub's driver: two batch axes, in chunks of two rows."""

    @pytest.mark.parametrize("case", CATALOGUE, indirect=True)
    def test_forward_and_solve(self, case: Case, pool: Pool) -> None:
        inputs = case.states
        assert_same(pool.forward(inputs), case.model.forward(inputs), tolerance_of(case))
        mine, theirs = pool.solve(inputs), case.model.solve(inputs)
        assert_same(mine.outputs, theirs.outputs, tolerance_of(case))
        for name in ("converged", "iterations", "outcome"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        assert pool.processes.processes, "no process was started"

    @pytest.mark.parametrize("case", DERIVED, indirect=True)
    def test_jacobian(self, case: Case, pool: Pool) -> None:
        inputs, tolerance = case.states, tolerance_of(case)
        for options in ({}, {"expand": True}, {"pairs": case.model.derivative_pairs[:1]}):
            assert_same(pool.jacobian(inputs, **options), case.model.jacobian(inputs, **options), tolerance)
        assert_same(
            pool.solve(inputs, jacobian=True, expand=False).blocks,
            case.model.solve(inputs, jacobian=True, expand=False).blocks,
            tolerance,
        )

    @pytest.mark.parametrize("case", DERIVED, indirect=True)
    def test_jvp_and_linearise(self, case: Case, pool: Pool) -> None:
        inputs, tolerance = case.states, tolerance_of(case)
        pairs = case.model.derivative_pairs
        wanted = {out for out, _ in pairs}
        # Of one row, broadcast to all: of those along which each output has a derivative.
        names = [name for name in inputs if {o for o, i in pairs if i == name} == wanted]
        tangents = {n: torch.ones(inputs[n].shape[2:], dtype=case.dtype) * references.size(inputs[n]) for n in names}
        assert_same(pool.jvp(inputs, tangents), case.model.jvp(inputs, tangents), tolerance)
        assert_same(pool.linearise(inputs, pairs), case.model.linearise(inputs, pairs), tolerance)

    @pytest.mark.parametrize("case", PROMOTED, indirect=True)
    def test_by_parameters(self, case: Case, pool: Pool) -> None:
        inputs = case.states
        model = case.model
        name = next(p for _, p in model.parameter_derivative_pairs)
        value = model.named_parameters()[name].detach()
        batch = next(iter(inputs.values())).shape[:2]
        factors = torch.linspace(0.9, 1.1, batch[0] * batch[1], dtype=torch.float64).reshape(batch)
        cotangents = {o: torch.ones(model.outputs[o].base_shape, dtype=torch.float64) for o in model.output_names}
        for overrides in (None, {name: 1.05 * value}, {name: value * factors}, {name: value * factors[:, :1]}):
            assert_same(pool.forward(inputs, overrides), model.forward(inputs, overrides))
            assert_same(pool.param_jacobian(inputs, overrides), model.param_jacobian(inputs, overrides))
            assert_same(pool.param_vjp(inputs, cotangents, overrides), model.param_vjp(inputs, cotangents, overrides))

    @pytest.mark.parametrize("case", PROMOTED, indirect=True)
    def test_parameters_and_settings_that_are_set_later(self, case: Case, workers: Workers) -> None:
        model = case.load()
        pool = Pool.over(model, workers, chunk=2)
        before = pool.forward(case.states)
        name = next(iter(model.named_parameters()))
        model.set_parameter(name, 1.1 * float(model.named_parameters()[name]))
        if model.solver is not None:
            model.set_solver(miters=model.solver.miters + 1)
        after = pool.forward(case.states)
        assert_same(after, model.forward(case.states))
        assert any(difference(after[out], before[out]) > 1e-6 for out in after)

    def test_batches_that_broadcast(self, workers: Workers) -> None:
        case = references.case("viscoplasticity")
        pool = Pool.over(case.model, workers, chunk=5)
        inputs = viscoplasticity(7)
        inputs["t"] = torch.linspace(0.5, 1.0, 3, dtype=torch.float64)[:, None]
        assert_same(pool.forward(inputs), case.model.forward(inputs))
        # All rows alike, by a tensor without memory of its own for each.
        alike = {name: value[:1].expand(9, *value.shape[1:]) for name, value in case.rows().items()}
        assert_same(pool.forward(alike), case.model.forward(alike))

    def test_first_iterates(self, workers: Workers) -> None:
        case = references.case("viscoplasticity")
        pool = Pool.over(case.model, workers, chunk=5)
        inputs = viscoplasticity(12)
        known = case.model.forward(inputs)
        mine, theirs = pool.solve({**inputs, **known}), case.model.solve({**inputs, **known})
        assert_same(mine.outputs, theirs.outputs)
        assert torch.equal(mine.iterations, theirs.iterations) and int(mine.iterations.max()) == 0

    def test_autograd_follows(self, workers: Workers) -> None:
        case = references.case("viscoplasticity")
        pool = Pool.over(case.model, workers, chunk=2)
        gradients = []
        for target in (pool, case.model):
            inputs = viscoplasticity(6)
            inputs["strain"].requires_grad_()
            target.forward(inputs)["stress"].square().sum().backward()
            gradients.append(inputs["strain"].grad)
        assert_same(gradients[0], gradients[1])


class TestChunks:
    def test_results_do_not_depend_on_them(self, workers: Workers) -> None:
        model = references.case("viscoplasticity").model
        inputs = viscoplasticity(300)
        expected = model.forward(inputs)
        for chunk in (1, 7, 64, 299):
            assert_same(Pool.over(model, workers, chunk=chunk).forward(inputs), expected)

    @pytest.mark.parametrize("count", [1, 2, 3, 16])
    @pytest.mark.parametrize("rows", [1, 63, 4096, 100_000, 1_000_001])
    def test_all_rows_once_and_small_at_the_end(self, rows: int, count: int) -> None:
        found = chunks.cut(rows, count, chunks.Sizes(1024, 5440, 4096))
        assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])] and found[-1].stop == rows
        sizes = [part.stop - part.start for part in found]
        assert max(sizes) <= 5440 and sizes[:-1] == sorted(sizes[:-1], reverse=True)
        assert all(size % chunks.MULTIPLE == 0 for size in sizes[:-1])

    def test_small_batches_start_no_process(self) -> None:
        with Pool(references.case("viscoplasticity").model, 2) as pool:
            assert_same(pool.forward(viscoplasticity(100)), pool.model.forward(viscoplasticity(100)))
            assert pool.processes.processes == []

    def test_models_that_solve_nothing_start_no_process(self) -> None:
        with Pool(references.case("elasticity").model, 2) as pool:
            strain = torch.ones(200_000, 6, dtype=torch.float64)
            assert pool.forward({"strain": strain})["stress"].shape == (200_000, 6)
            assert pool.processes.processes == []


class TestFailures:
    def inputs(self) -> Tensors:
        inputs = viscoplasticity(40)
        inputs["strain"][[3, 17, 38], 0] = torch.nan
        return inputs

    @pytest.mark.parametrize("operation", ["forward", "jacobian"])
    def test_one_error_for_the_whole_batch(self, operation: str, workers: Workers) -> None:
        model = references.case("viscoplasticity").model
        pool = Pool.over(model, workers, chunk=6)
        errors = []
        for target in (pool, model):
            with pytest.raises(ConvergenceError) as raised:
                getattr(target, operation)(self.inputs())
            errors.append(raised.value)
        mine, theirs = errors
        assert str(mine) == str(theirs)
        assert mine.rows.tolist() == [3, 17, 38] == theirs.rows.tolist()  # type: ignore[attr-defined]
        assert torch.equal(mine.converged_mask, theirs.converged_mask)  # type: ignore[attr-defined]

    def test_a_batch_of_two_axes(self, workers: Workers) -> None:
        model = references.case("viscoplasticity").model
        inputs = self.inputs()
        grid = {n: x.reshape(8, 5, *x.shape[1:]) if len(x) == 40 and x.ndim else x for n, x in inputs.items() if x.ndim}
        grid.update({n: x for n, x in inputs.items() if not x.ndim})
        with pytest.raises(ConvergenceError) as mine:
            Pool.over(model, workers, chunk=6).forward(grid)
        with pytest.raises(ConvergenceError) as theirs:
            model.forward(grid)
        assert str(mine.value) == str(theirs.value) and "row [0, 3]" in str(mine.value)

    def test_captured_iterates(self, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEML2_CAPTURE_SOLVE_FAILURE", "1")
        model = references.case("viscoplasticity").model
        with pytest.raises(ConvergenceError) as raised:
            Pool.over(model, workers, chunk=6).forward(self.inputs())
        assert raised.value.unknowns["stress"].shape == (40, 6)  # type: ignore[attr-defined]

    def test_solve_gives_the_mask_of_the_whole_batch(self, workers: Workers) -> None:
        model = references.case("viscoplasticity").model
        mine = Pool.over(model, workers, chunk=6).solve(self.inputs(), jacobian=True)
        theirs = model.solve(self.inputs(), jacobian=True)
        assert torch.equal(mine.converged, theirs.converged)
        assert (~mine.converged).nonzero().flatten().tolist() == [3, 17, 38]
        assert mine.outputs["stress"][3].isnan().all() and mine.blocks["stress"]["strain"][17].isnan().all()
        good = mine.converged
        assert_same(mine.outputs["stress"][good], theirs.outputs["stress"][good])


class TestBadInput:
    @pytest.mark.parametrize("count", [0, -1, 10_000])
    def test_numbers_of_workers(self, count: int) -> None:
        with pytest.raises(InputError, match=r"workers is .*expected 1 to \d+.*core"):
            Pool(references.case("viscoplasticity").model, count)

    @pytest.mark.parametrize("count", [1.5, "2", True])
    def test_what_is_no_number(self, count: Any) -> None:
        with pytest.raises(InputTypeError, match="whole number"):
            Pool(references.case("viscoplasticity").model, count)
        with pytest.raises(InputTypeError, match="whole number"):
            Pool(references.case("viscoplasticity").model, 2, chunk=count)

    def test_chunks(self) -> None:
        with pytest.raises(InputError, match="chunk is 0"):
            Pool(references.case("viscoplasticity").model, 2, chunk=0)

    def test_what_is_no_model(self) -> None:
        with pytest.raises(InputTypeError, match=r"expected a neml2_aoti_plugin\.Model or the path"):
            Pool(3)  # type: ignore[arg-type]
        with pytest.raises(InputTypeError, match="loaded already"):
            Pool(references.case("viscoplasticity").model, mode="rowwise")

    def test_lockstep(self) -> None:
        with pytest.raises(InputError, match="lockstep"):
            Pool(references.case("viscoplasticity").artifact, 2, mode="lockstep")

    def test_inputs_are_checked_before_any_process_starts(self) -> None:
        model = references.case("viscoplasticity").model
        inputs = viscoplasticity(30)
        with Pool(model, 2, chunk=5) as pool:
            with pytest.raises(UnknownNameError, match="missing 'strain'"):
                pool.forward({name: value for name, value in inputs.items() if name != "strain"})
            with pytest.raises(InputTypeError, match="float32"):
                pool.forward({**inputs, "strain": inputs["strain"].float()})
            with pytest.raises(InputError, match="do not broadcast"):
                pool.forward({**inputs, "t": torch.zeros(7, dtype=torch.float64)})
            with pytest.raises(DerivativeNotCompiledError):
                pool.param_jacobian(inputs)
            with pytest.raises(DerivativeNotCompiledError, match=r"t.* was not compiled"):
                pool.jacobian(inputs, pairs=[("stress", "t")])
            with pytest.raises(InputError, match="does not broadcast"):
                pool.jvp(inputs, {"strain": torch.zeros(7, 6, dtype=torch.float64)})
            assert pool.processes.processes == []

    def test_an_artifact_that_has_changed(self, tmp_path: Path) -> None:
        artifact = references.edited(references.case("viscoplasticity"), tmp_path, lambda _: None)
        model = Model(artifact)
        with (artifact / "metadata.json").open("a") as file:
            file.write("\n")
        with Pool(model, 2, chunk=5) as pool, pytest.raises(ArtifactError, match="changed or removed"):
            pool.forward(viscoplasticity(30))

    @pytest.mark.long
    def test_an_artifact_that_the_workers_do_not_see(self, tmp_path: Path) -> None:
        """It goes away between the recipe and the moment at which a worker loads it."""
        artifact = references.edited(references.case("viscoplasticity"), tmp_path, lambda _: None)
        with Pool(artifact, 1, chunk=5) as pool:
            assert_same(pool.forward(viscoplasticity(30)), pool.model.forward(viscoplasticity(30)))
            artifact.rename(tmp_path / "gone")
            os.kill(pool.processes.processes[0], signal.SIGKILL)
            with pytest.raises(ArtifactError, match="viscoplasticity"):
                pool.forward(viscoplasticity(30))

    def test_after_close(self) -> None:
        pool = Pool(references.case("viscoplasticity").model, 2)
        pool.close()
        pool.close()
        with pytest.raises(AOTIError, match="closed"):
            pool.forward(viscoplasticity(3))


class TestFork:
    # Python's own from 3.12 on.
    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
    def test_a_forked_process_is_told_to_make_its_own(self, workers: Workers) -> None:
        pool = Pool.over(references.case("viscoplasticity").model, workers, chunk=5)
        pool.forward(viscoplasticity(10))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            try:
                pool.forward(viscoplasticity(10))
            except AOTIError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            assert "forked" in told.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert_same(pool.forward(viscoplasticity(10)), pool.model.forward(viscoplasticity(10)))
