"""What only the native solve has: outputs of all forms, graphs that fail or return something else, threads, the log."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import references
from hand_made_graphs import Function, Handles, HandMadeGraph, System, expanded, once, strided, system_of, transposed
from neml2_aoti_plugin._graphs.c_interface import power_executor, tensor_functions
from neml2_aoti_plugin._solve import machine_code
from neml2_aoti_plugin._solve.machine_code import CHOICE
from neml2_aoti_plugin._solve.native import Block, BlockSolver, Means, Prediction, UnfitPredictor
from neml2_aoti_plugin._solve.outcome import Solved
from neml2_aoti_plugin.errors import AOTIError, ArtifactError
from neml2_aoti_plugin.settings import NewtonSettings
from references import caller_of
from test_newton import SQUARES, Equations, by_machine_code, by_tensors, coupled, double_roots, square_roots

N = 5
TIGHT = NewtonSettings(atol=1e-11, rtol=1e-12, ls_max_iters=6)
# From some of these initial guesses, steps on arctan are cut back; on squares, last steps have their own Jacobian.
STARTS = torch.tensor([[3.0], [20.0], [0.8], [-8.0], [1.0], [5.0]], dtype=torch.float64)
KINDS = torch.tensor([[0.0]] * 4 + [[1.0]] * 2, dtype=torch.float64)


def graphs_of_coupled() -> tuple[Function, Function]:
    equations = coupled()
    return lambda u, g: [equations.residual(u, g)], lambda u, g: [equations.jacobian(u, g), equations.residual(u, g)]


def loads(rows: int) -> Tensor:
    return 10.0 * torch.randn(rows, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def zeros(g: Tensor) -> Tensor:
    return torch.zeros(len(g), N, dtype=torch.float64)


class TestOutputs:
    @pytest.mark.parametrize("form", [once, expanded, transposed, strided])
    @pytest.mark.parametrize("which", ["residual", "Jacobian", "residual beside the Jacobian"])
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_of_any_form_are_read_alike(self, form: Callable[[Tensor], Tensor], which: str, rows: int) -> None:
        residual, jacobian = graphs_of_coupled()
        g = loads(rows)
        if form in (once, expanded):
            g = g[:1].expand(rows, N).contiguous()
        right = system_of(residual, jacobian, N, N)[0].solve(zeros(g), g, [], TIGHT)

        def formed(u: Tensor, g: Tensor) -> list[Tensor]:
            a, b = jacobian(u, g)
            return [form(a) if which == "Jacobian" else a, form(b) if which.endswith("beside the Jacobian") else b]

        system, handles, *_ = system_of(
            lambda u, g: [form(b) if which == "residual" else b for b in residual(u, g)], formed, N, N
        )
        found = system.solve(zeros(g), g, [], TIGHT)
        assert right.statistics.all_converged and int(right.statistics.iterations.min()) > 2
        assert_same(found, right)
        assert not handles.alive and not handles.strays

    def test_that_a_graph_owns_are_not_written_to(self) -> None:
        matrix, b = torch.eye(N, dtype=torch.float64).repeat(16, 1, 1), loads(16)
        kept = matrix.clone(), b.clone()
        system, *_ = system_of(lambda u, g: [b], lambda u, g: [matrix, b], N, 1, keeps=True)
        first, g = loads(3), torch.ones(3, 1, dtype=torch.float64)
        given = first.clone(), g.clone()
        system.solve(first, g, [], replace(TIGHT, miters=4))
        assert all(torch.equal(x, y) for x, y in zip((matrix, b, first, g), (*kept, *given), strict=True))

    def test_rows_of_another_batch_are_not_among_those_that_fill_a_call_up(self) -> None:
        residual, jacobian = graphs_of_coupled()
        system, *_ = system_of(residual, jacobian, N, N)
        g = loads(40)
        g[5:] = torch.nan
        system.solve(zeros(g), g, [], TIGHT)
        found = system.solve(zeros(g[:5]), g[:5], [], TIGHT)
        assert found.unknowns[0].shape == (5, N) and found.statistics.all_converged


def assert_same(found: Solved, right: Solved) -> None:
    """The same bits."""
    assert torch.equal(found.unknowns[0], right.unknowns[0])
    assert torch.equal(found.statistics.record, right.statistics.record)
    assert torch.equal(found.statistics.norms, right.statistics.norms)


def test_parameters_of_any_shape_reach_both_graphs() -> None:
    """`p u^2 + sum(q) u = g` with a number and a vector, which change their values and then their shapes."""
    system, handles, *_ = system_of(
        lambda u, g, p, q: [g - p * u * u - q.sum() * u],
        lambda u, g, p, q: [(2.0 * p * u + q.sum()).unsqueeze(-1), g - p * u * u - q.sum() * u],
        1,
        1,
        parameters=2,
    )
    g = SQUARES.unsqueeze(-1)
    for p, q in ((1.0, [1.0, 2.0]), (3.0, [0.5, 0.25]), (2.0, [1.0, 2.0, 3.0])):
        parameters = [torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)]
        found = system.solve(torch.ones_like(g), g, parameters, replace(TIGHT, atol=1e-12, rtol=0.0, miters=60))
        root = (torch.sqrt(sum(q) ** 2 + 4.0 * p * g) - sum(q)) / (2.0 * p)
        torch.testing.assert_close(found.unknowns[0], root, rtol=1e-12, atol=0.0)
    assert not handles.alive and not handles.strays


# What a residual is not, and what a Jacobian is not.
OTHER_RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer rows": lambda x: x[:-1],
    "more rows": lambda x: torch.cat([x, x]),
    "no rows": lambda x: x[:0],
    "more columns": lambda x: torch.cat([x, x[:, :1]], 1),
    "fewer columns": lambda x: x[:, 1:],
    "no axis of rows": lambda x: x[0],
    "an axis more": lambda x: x.unsqueeze(-1),
    "single precision": lambda x: x.float(),
    "whole numbers": lambda x: x.long(),
}
OTHER_JACOBIANS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: other for name, other in OTHER_RESIDUALS.items() if "column" not in name and name != "an axis more"},
    "more columns": lambda x: torch.cat([x, x[:, :, :1]], 2),
    "fewer lines": lambda x: x[:, 1:],
    "one axis for lines and columns": lambda x: x.flatten(1),
    "an axis more": lambda x: x.unsqueeze(1),
}


class TestOfAnotherShape:
    """A package that does not belong to the metadata: nothing is read out of bounds."""

    @pytest.mark.parametrize(
        ("file", "place", "call", "other"),
        [
            # Of a residual at the initial guess, and after two updates; beside the Jacobian; and the Jacobian.
            *(("residual", 0, call, other) for call in (0, 2) for other in OTHER_RESIDUALS),
            *(("jacobian", 1, 0, other) for other in OTHER_RESIDUALS),
            *(("jacobian", 0, 0, other) for other in OTHER_JACOBIANS),
        ],
    )
    def test_is_refused(self, file: str, place: int, call: int, other: str) -> None:
        changed = (OTHER_JACOBIANS if (file, place) == ("jacobian", 0) else OTHER_RESIDUALS)[other]
        calls = {"residual": 0, "jacobian": 0}

        def wrong(name: str, graph: Function) -> Function:
            def run(u: Tensor, g: Tensor) -> Sequence[Tensor]:
                calls[name] += 1
                found = list(graph(u, g))
                if name == file and calls[name] > call:
                    found[place] = changed(found[place])
                return found

            return run

        residual, jacobian = graphs_of_coupled()
        system, handles, *graphs = system_of(wrong("residual", residual), wrong("jacobian", jacobian), N, N)
        g = loads(17)
        for _ in range(3):
            with pytest.raises(ArtifactError, match=rf"^{file}\.pt2: returned .*compile the model again"):
                system.solve(zeros(g), g, [], TIGHT)
            assert not handles.alive and not handles.strays
        # The containers are those of the first time.
        assert all(len(graph.users) <= 1 for graph in graphs)


class TestFailures:
    """A graph that returns an error code."""

    @pytest.mark.parametrize("which", ["residual", "jacobian"])
    def test_at_each_call_of_a_solve(self, which: str) -> None:
        """Of a solve with shorter steps, chord steps and last steps of their own."""
        failing: list[int] = []
        calls = {"residual": 0, "jacobian": 0}

        def perhaps(name: str, outputs: list[Tensor]) -> list[Tensor]:
            calls[name] += 1
            if name == which and calls[name] in failing:
                raise RuntimeError(f"no {name} at call {calls[name]}\nand more")
            return outputs

        def solve() -> Solved:
            calls.update(residual=0, jacobian=0)
            return system.solve(STARTS, KINDS, [], settings)

        equations = arctans_and_squares()
        system, handles, *_ = system_of(
            lambda u, g: perhaps("residual", [equations.residual(u, g)]),
            lambda u, g: perhaps("jacobian", [equations.jacobian(u, g), equations.residual(u, g)]),
            1,
            1,
        )
        settings = NewtonSettings(atol=1e-4, rtol=0.0, miters=60, ls_max_iters=12, ls_cutback=3.0)
        right = solve()
        count, updates = calls[which], int(right.statistics.iterations.max())
        assert right.statistics.all_converged
        assert calls["jacobian"] == updates + 1 and calls["residual"] > 2 * updates
        for call in range(1, count + 1):
            failing[:] = [call]
            with pytest.raises(
                AOTIError, match=rf"^{which}\.pt2: the compiled graph failed: no {which} at call {call}"
            ):
                solve()
            assert not handles.alive and not handles.strays
        failing.clear()
        assert_same(solve(), right)

    @pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.long)])
    def test_memory_stays_as_it_is(self, count: int) -> None:
        """Calls of graphs of which one of a hundred fails."""
        calls: list[None] = []

        def perhaps(outputs: list[Tensor]) -> list[Tensor]:
            calls.append(None)
            if len(calls) % 100 == 0:
                raise RuntimeError("now and then")
            return outputs

        residual, jacobian = graphs_of_coupled()
        system, handles, *_ = system_of(
            lambda u, g: perhaps(list(residual(u, g))), lambda u, g: perhaps(list(jacobian(u, g))), N, N
        )
        g = loads(48)
        right = system_of(residual, jacobian, N, N)[0].solve(zeros(g), g, [], TIGHT)

        def some(count: int) -> int:
            failed, end = 0, len(calls) + count
            while len(calls) < end:
                try:
                    assert_same(system.solve(zeros(g), g, [], TIGHT), right)
                except AOTIError:
                    failed += 1
            return failed

        some(500)
        before = resident()
        assert some(count) >= count // 100
        # A tensor of each call would take 48 times 25 numbers.
        assert resident() - before < max(4e6, 0.2 * count * 48 * 25 * 8)
        assert handles.made > 3 * count and not handles.alive and not handles.strays


def resident() -> int:
    """Memory of this process, in bytes."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


class TestCompiledGraphsThatFail:
    """An operator that gives no result makes them fail themselves, with what torch says of it."""

    @pytest.fixture
    def failing(self) -> Iterator[tuple[list[bool], int]]:
        """Whether the next calls of the power give no result, and the executor that does as it says."""
        words = (ctypes.c_void_p * 8).from_address(ctypes.c_void_p.from_address(power_executor()).value or 0)
        ((entry, power),) = [(k, word) for k, word in enumerate(words) if word]
        kind = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
        )
        method, fails = kind(power), [False]
        table, noting = (ctypes.c_void_p * 8)(), kind(lambda *given: None if fails[0] else method(*given))
        table[entry] = ctypes.cast(noting, ctypes.c_void_p).value
        executor = (ctypes.c_void_p * 2)(ctypes.addressof(table))
        yield fails, ctypes.addressof(executor)

    @pytest.mark.parametrize(
        "count",
        [300, pytest.param(10_000, marks=pytest.mark.wide), pytest.param(100_000, marks=pytest.mark.long)],
    )
    def test_now_and_then(self, count: int, failing: tuple[list[bool], int], capfd: pytest.CaptureFixture[str]) -> None:
        case = references.case("viscoplasticity")
        # What an older torch has compiled says no more.
        says = "(API call failed|see what it printed)" if references.OLD_TORCH else "API call failed"
        state = case.rows()
        segment = caller_of(case.load()).program.implicit[0]
        assert segment.graphs.jacobian is not None
        rows = len(state["t"])
        segment.guess(state, rows)
        u, g = segment.unknowns.pack(state, rows)[0], segment.givens.pack(state, rows)[0]
        residual, jacobian = segment.graphs.residual.library(), segment.graphs.jacobian.library()
        fails, executor = failing
        sizes = u.shape[1], g.shape[1]
        means = Means(machine_code.load(), tensor_functions(), executor)
        system = System(BlockSolver(Block([residual, jacobian, None, None], sizes[:1], sizes[1:]), means, most=1024))
        settings = replace(TIGHT, atol=1e-8, rtol=1e-8)
        right = system.solve(u, g, [], settings)
        before = 0
        for call in range(count):
            if call == 100:
                before = resident()
            fails[0] = call % 100 == 50
            if not fails[0]:
                assert_same(system.solve(u, g, [], settings), right)
                continue
            with pytest.raises(AOTIError, match=rf"_jacobian\.pt2: the compiled graph failed: .*{says}"):
                system.solve(u, g, [], settings)
            # torch prints a line of its own; with where it happened, before 2.13.
            assert len(capfd.readouterr().err.splitlines()) <= (30 if references.OLD_TORCH else 2)
        assert resident() - before < max(2e6, 0.2 * count * u.nbytes)


def test_threads_have_containers_of_their_own() -> None:
    """Each graph is run by all threads at once, as the barrier shows; the containers are used again afterwards."""
    count = 3
    residual, jacobian = graphs_of_coupled()
    together = threading.Barrier(count, timeout=60)
    first = threading.local()

    def meet(name: str) -> None:
        if not hasattr(first, name):
            setattr(first, name, True)
            together.wait()

    def met(name: str, graph: Function) -> Function:
        def run(u: Tensor, g: Tensor) -> Sequence[Tensor]:
            meet(name)
            return graph(u, g)

        return run

    system, handles, *graphs = system_of(met("residual", residual), met("jacobian", jacobian), N, N)
    batches = [loads(rows) for rows in (20, 30, 40)]
    right = [system_of(residual, jacobian, N, N)[0].solve(zeros(g), g, [], TIGHT) for g in batches]

    def work(k: int) -> None:
        for turn in range(20):
            at = (k + turn) % count
            assert_same(system.solve(zeros(batches[at]), batches[at], [], TIGHT), right[at])

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    assert not handles.alive and not handles.strays
    # That no container was in two calls at once is looked at in each call.
    assert all(len(graph.users) == count for graph in graphs)
    assert all(graph.calls > 60 for graph in graphs)


class TestLog:
    """The lines of `newton=debug` are those of the tensors' loop."""

    def lines(self, equations: Equations, u: Tensor, g: Tensor, settings: NewtonSettings, **options: bool) -> list[str]:
        found: list[str] = []
        right: list[str] = []
        by_machine_code(equations, u, g, settings, found.append, **options)
        by_tensors(equations, u, g, settings, right.append, **options)
        if settings.ls_max_iters == 2:
            # Its one trial stands in any case: tensors do not compute what would be accepted.
            found, right = ([line.partition(", min(||Rc||)")[0] for line in lines] for lines in (found, right))
        assert found == right
        return found

    @pytest.mark.parametrize("ls_max_iters", [1, 2, 3, 12])
    @pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
    def test_of_a_line_search(self, ls_max_iters: int, ls_type: Any) -> None:
        settings = NewtonSettings(
            atol=1e-4, rtol=0.0, miters=8, ls_type=ls_type, ls_max_iters=ls_max_iters, ls_cutback=3.0, ls_c=0.2
        )
        lines = self.lines(arctans_and_squares(), STARTS, KINDS, settings)
        trials = [line for line in lines if "LS ITERATION" in line]
        assert len(lines) - len(trials) >= 4
        # More than one trial in some iteration.
        assert bool(trials) == (ls_max_iters > 1)
        assert any("LS ITERATION   2" in line for line in trials) == (ls_max_iters > 2)

    def test_of_rows_that_are_lost_or_done(self) -> None:
        g = torch.cat([SQUARES, torch.tensor([torch.nan, -1.0, 1.0], dtype=torch.float64)]).unsqueeze(-1)
        u = torch.ones_like(g)
        u[0] = 0.0
        lines = self.lines(square_roots(), u, g, NewtonSettings(atol=1e-6, rtol=1e-12, miters=12))
        assert len(lines) >= 12

    @pytest.mark.parametrize("miters", [0, 1, 4])
    def test_of_few_iterations(self, miters: int) -> None:
        g = SQUARES.unsqueeze(-1)
        lines = self.lines(square_roots(), torch.ones_like(g), g, NewtonSettings(miters=miters))
        # Rows that a few updates with chord steps do not solve are solved again without.
        attempts = 1 + sum("solved again" in line for line in lines)
        assert attempts == (2 if miters == 4 else 1)
        assert sum(line.startswith("ITERATION") for line in lines) == attempts * (max(miters - 1, 0) + 1)

    def test_of_no_row_that_moves(self) -> None:
        g = SQUARES.unsqueeze(-1)
        assert len(self.lines(square_roots(), g.sqrt(), g, NewtonSettings())) == 1
        assert len(self.lines(square_roots(), g[:0], g[:0], NewtonSettings())) == 1
        self.lines(square_roots(), torch.zeros_like(g), g, NewtonSettings())

    def test_of_last_steps_and_small_steps(self) -> None:
        g = torch.zeros(3, 1, dtype=torch.float64)
        u = torch.tensor([[1.0], [1e3], [7.0]], dtype=torch.float64)
        self.lines(double_roots(), u, g, NewtonSettings(atol=1e-6, rtol=0.0, miters=60))
        self.lines(square_roots(), u, g, NewtonSettings(atol=1e-8, rtol=1e-3, miters=60), small_steps=True)


def arctans_and_squares() -> Equations:
    """`arctan(u) = 0` where the given is 0, and `u^2 = 0` where it is 1."""
    return Equations(
        lambda u, g: -torch.where(g == 0.0, torch.atan(u), u * u),
        lambda u, g: torch.where(g == 0.0, 1.0 / (1.0 + u * u), 2.0 * u).unsqueeze(-1),
    )


class TestInitialGuess:
    """A predictor that gives the first of two unknowns, `(rows,)` and `(rows, 2)`, from a given and from itself."""

    ROWS = 19

    def guess(
        self, predictor: Function, times: int = 1, kept: Sequence[int] = (), second: Tensor | None = None
    ) -> tuple[Tensor, Handles]:
        """The initial guess: a solve without an update ends there."""
        handles = Handles()
        graphs = [
            HandMadeGraph(lambda u, g: [torch.ones_like(u)], handles, 2, 1),
            HandMadeGraph(lambda u, g: [torch.eye(3).double().repeat(len(u), 1, 1), torch.ones_like(u)], handles, 2, 2),
            None,
            None,
            HandMadeGraph(predictor, handles, 2, 2, "predictor"),
        ]
        # The second output feeds the second argument, and belongs to no unknown.
        prediction = Prediction(((1, 0, -1), (2, -1, 1)), times)
        solver = BlockSolver(Block(graphs, [1, 2], [1], prediction=prediction), handles.means, most=64)
        g = torch.arange(1.0, self.ROWS + 1, dtype=torch.float64)
        found = solver.solve(
            [torch.full_like(g, 7.0), second],
            [g],
            self.ROWS,
            [],
            NewtonSettings(miters=1),
            predicted_from=[g, torch.zeros(self.ROWS, 2, dtype=torch.float64)],
            kept=kept,
        )
        assert torch.equal(found.givens[:, 0], g)
        return found.solved.unknowns[0], handles

    @pytest.mark.parametrize("times", [1, 3])
    @pytest.mark.parametrize("form", [torch.clone, transposed, strided])
    def test_comes_of_what_the_predictor_gave_before(self, times: int, form: Callable[[Tensor], Tensor]) -> None:
        second = torch.randn(self.ROWS, 2, dtype=torch.float64)
        found, handles = self.guess(lambda g, x: [g + 10.0 * x[:, 1], form(x + g[:, None])], times, second=second)
        g = torch.arange(1.0, self.ROWS + 1, dtype=torch.float64)
        assert torch.equal(found[:, 0], g + 10.0 * (times - 1) * g)
        assert torch.equal(found[:, 1:], second)
        assert not handles.alive and not handles.strays

    def test_is_the_callers_where_there_is_one_and_zero_without(self) -> None:
        found, _ = self.guess(lambda g, x: [g, x], kept=[0])
        assert torch.equal(found, torch.tensor([7.0, 0.0, 0.0]).double().expand(self.ROWS, 3))

    @pytest.mark.parametrize("other", [lambda x: x[:, None].expand(-1, 3), lambda x: x[0], lambda x: x.float()])
    def test_of_another_form_is_left_to_others(self, other: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(UnfitPredictor, match=r"^predictor\.pt2: returned tensors of other shapes"):
            self.guess(lambda g, x: [other(g), x])

    def test_of_a_predictor_that_fails(self) -> None:
        def fails(g: Tensor, x: Tensor) -> list[Tensor]:
            raise RuntimeError("no guess")

        with pytest.raises(AOTIError, match=r"^predictor\.pt2: the compiled graph failed: no guess"):
            self.guess(fails)


@pytest.mark.parametrize("name", ["viscoplasticity", "chaboche", "predictor_loop", "composed", "crystal"])
def test_guess_and_derivatives_are_those_of_graphs_called_one_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = references.case(name)
    rows = case.rows()
    found, segment = case.load(), caller_of(case.load()).program.implicit[0]
    kinds: list[object] = [found.solve(rows).outputs, found.jacobian(rows)[1] if segment.sensitivity else {}]
    monkeypatch.setenv(CHOICE, "torch")
    other = case.load()
    for one, two in zip(kinds, [other.solve(rows).outputs, other.jacobian(rows)[1] if kinds[1] else {}], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)
