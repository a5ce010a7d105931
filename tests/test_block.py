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
from equations import Equations, by_machine_code, coupled, square_roots
from hand_made_graphs import Function, Handles, HandMadeGraph, System, expanded, once, strided, system_of, transposed
from neml2_aoti_plugin._graphs.c_interface import tensor_functions
from neml2_aoti_plugin._graphs.operators import power_executor
from neml2_aoti_plugin._solve import machine_code
from neml2_aoti_plugin._solve.caller import Means
from neml2_aoti_plugin._solve.native import Block, BlockSolver, Prediction, UnfitPredictor
from neml2_aoti_plugin._solve.outcome import Solved
from neml2_aoti_plugin.errors import AOTIError, ArtifactError
from neml2_aoti_plugin.settings import NewtonSettings
from references import caller_of
from test_newton import SQUARES, column

N = 5
TIGHT = NewtonSettings(atol=1e-11, rtol=1e-12, ls_max_iters=6)
# From some of these initial guesses, steps on arctan are cut back; on squares, last steps have their own Jacobian.
STARTS, KINDS = column(3.0, 20.0, 0.8, -8.0, 1.0, 5.0), column(*[0.0] * 4, *[1.0] * 2)
RESIDUAL, JACOBIAN = coupled().b, coupled().linearised


@pytest.fixture
def handles() -> Iterator[Handles]:
    """Handles, all of which have been deleted at the end of a test."""
    found = Handles()
    yield found
    found.require_none_left()


def loads(rows: int) -> Tensor:
    return 10.0 * torch.randn(rows, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def solved(system: System, g: Tensor) -> Solved:
    return system.solve(torch.zeros(len(g), N, dtype=torch.float64), g, TIGHT)


def right(g: Tensor) -> Solved:
    return solved(system_of(Handles(), RESIDUAL, JACOBIAN, N, N), g)


def assert_same(found: Solved, expected: Solved) -> None:
    """The same bits."""
    assert torch.equal(found.unknowns[0], expected.unknowns[0])
    assert torch.equal(found.statistics.record, expected.statistics.record)
    assert torch.equal(found.statistics.norms, expected.statistics.norms)


def arctans_and_squares() -> Equations:
    """`arctan(u) = 0` where the given is 0, and `u^2 = 0` where it is 1."""
    return Equations(
        lambda u, g: -torch.where(g == 0.0, torch.atan(u), u * u),
        lambda u, g: torch.where(g == 0.0, 1.0 / (1.0 + u * u), 2.0 * u).unsqueeze(-1),
    )


class TestOutputs:
    @pytest.mark.parametrize("form", [once, expanded, transposed, strided])
    @pytest.mark.parametrize("which", ["residual", "Jacobian", "residual beside the Jacobian"])
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_of_any_form_are_read_alike(
        self, form: Callable[[Tensor], Tensor], which: str, rows: int, handles: Handles
    ) -> None:
        g = loads(rows)
        if form in (once, expanded):
            g = g[:1].expand(rows, N).contiguous()

        def residual(u: Tensor, g: Tensor) -> list[Tensor]:
            return [form(b) if which == "residual" else b for b in RESIDUAL(u, g)]

        def jacobian(u: Tensor, g: Tensor) -> list[Tensor]:
            a, b = JACOBIAN(u, g)
            return [form(a) if which == "Jacobian" else a, form(b) if which.endswith("beside the Jacobian") else b]

        expected = right(g)
        assert expected.statistics.all_converged and int(expected.statistics.iterations.min()) > 2
        assert_same(solved(system_of(handles, residual, jacobian, N, N), g), expected)

    def test_that_a_graph_owns_are_not_written_to(self, handles: Handles) -> None:
        matrix, b = torch.eye(N, dtype=torch.float64).repeat(16, 1, 1), loads(16)
        system = system_of(handles, lambda u, g: [b], lambda u, g: [matrix, b], N, 1, keeps=True)
        given = matrix, b, loads(3), torch.ones(3, 1, dtype=torch.float64)
        kept = [x.clone() for x in given]
        system.solve(*given[2:], replace(TIGHT, miters=4))
        assert all(map(torch.equal, given, kept))

    def test_rows_of_another_batch_are_not_among_those_that_fill_a_call_up(self, handles: Handles) -> None:
        system, g = system_of(handles, RESIDUAL, JACOBIAN, N, N), loads(40)
        g[5:] = torch.nan
        solved(system, g)
        found = solved(system, g[:5])
        assert found.unknowns[0].shape == (5, N) and found.statistics.all_converged


def test_parameters_of_any_shape_reach_both_graphs(handles: Handles) -> None:
    """`p u^2 + sum(q) u = g` with a number and a vector, which change their values and then their shapes."""
    system = system_of(
        handles,
        lambda u, g, p, q: [g - p * u * u - q.sum() * u],
        lambda u, g, p, q: [(2.0 * p * u + q.sum()).unsqueeze(-1), g - p * u * u - q.sum() * u],
        1,
        1,
        parameters=2,
    )
    g, settings = SQUARES.unsqueeze(-1), replace(TIGHT, atol=1e-12, rtol=0.0, miters=60)
    for p, q in ((1.0, [1.0, 2.0]), (3.0, [0.5, 0.25]), (2.0, [1.0, 2.0, 3.0])):
        parameters = [torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)]
        found = system.solve(torch.ones_like(g), g, settings, parameters=parameters)
        root = (torch.sqrt(sum(q) ** 2 + 4.0 * p * g) - sum(q)) / (2.0 * p)
        torch.testing.assert_close(found.unknowns[0], root, rtol=1e-12, atol=0.0)


# What neither a residual nor a Jacobian is, and what one of them is not.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer rows": lambda x: x[:-1],
    "more rows": lambda x: torch.cat([x, x]),
    "no rows": lambda x: x[:0],
    "more columns": lambda x: torch.cat([x, x[..., :1]], -1),
    "fewer columns": lambda x: x[:, 1:],
    "no axis of rows": lambda x: x[0],
    "an axis more": lambda x: x.unsqueeze(1),
    "an axis more behind": lambda x: x.unsqueeze(-1),
    "single precision": lambda x: x.float(),
    "whole numbers": lambda x: x.long(),
}
OTHER_JACOBIANS: dict[str, Callable[[Tensor], Tensor]] = {
    **OTHERS,
    "one axis for lines and columns": lambda x: x.flatten(1),
}


@pytest.mark.parametrize(
    ("file", "place", "call", "other"),
    [
        # Of a residual at the initial guess, and after two updates; beside the Jacobian; and the Jacobian.
        *(("residual", 0, call, other) for call in (0, 2) for other in OTHERS),
        *(("jacobian", 1, 0, other) for other in OTHERS),
        *(("jacobian", 0, 0, other) for other in OTHER_JACOBIANS),
    ],
)
def test_outputs_of_another_shape_are_refused(file: str, place: int, call: int, other: str, handles: Handles) -> None:
    """A package that does not belong to the metadata: nothing is read out of bounds."""

    def wrong(number: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        changed = list(outputs)
        if number > call:
            changed[place] = OTHER_JACOBIANS[other](changed[place])
        return changed

    system = system_of(handles, RESIDUAL, JACOBIAN, N, N)
    system.graphs[file == "jacobian"].alter = wrong
    for _ in range(3):
        with pytest.raises(ArtifactError, match=rf"^{file}\.pt2: returned .*compile the model again"):
            solved(system, loads(17))
        handles.require_none_left()
    # The containers are those of the first time.
    assert all(len(graph.users) <= 1 for graph in system.graphs)


# -- graphs that return an error code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["residual", "jacobian"])
def test_a_graph_fails_at_each_call_of_a_solve(which: str, handles: Handles) -> None:
    """Of a solve with shorter steps, chord steps and last steps of their own."""
    failing = 0

    def perhaps(number: int, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if number == failing:
            raise RuntimeError(f"not at call {number}\nand more")
        return outputs

    def solve() -> Solved:
        residual.calls = jacobian.calls = 0
        return system.solve(STARTS, KINDS, settings)

    equations = arctans_and_squares()
    system = system_of(handles, equations.b, equations.linearised, 1, 1)
    residual, jacobian = system.graphs
    graph = jacobian if which == "jacobian" else residual
    graph.alter = perhaps
    settings = NewtonSettings(atol=1e-4, rtol=0.0, miters=60, ls_max_iters=12, ls_cutback=3.0)
    expected = solve()
    count, updates = graph.calls, int(expected.statistics.iterations.max())
    assert expected.statistics.all_converged
    assert jacobian.calls == updates + 1 and residual.calls > 2 * updates
    for failing in range(1, count + 1):
        with pytest.raises(AOTIError, match=rf"^{which}\.pt2: the compiled graph failed: not at call {failing}"):
            solve()
        handles.require_none_left()
    failing = 0
    assert_same(solve(), expected)


def resident() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_memory_stays_as_it_is(count: int, handles: Handles) -> None:
    """Calls of graphs of which one of a hundred fails."""

    def perhaps(number: int, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if number % 100 == 0:
            raise RuntimeError("now and then")
        return outputs

    system, g = system_of(handles, RESIDUAL, JACOBIAN, N, N), loads(48)
    for graph in system.graphs:
        graph.alter = perhaps
    expected = right(g)

    def failed_of(count: int) -> int:
        failed, end = 0, system.graphs[0].calls + count
        while system.graphs[0].calls < end:
            try:
                assert_same(solved(system, g), expected)
            except AOTIError:
                failed += 1
        return failed

    failed_of(500)
    before = resident()
    assert failed_of(count) >= count // 100
    # A tensor of each call would take 48 times 25 numbers.
    assert resident() - before < max(4e6, 0.2 * count * 48 * 25 * 8)
    assert handles.made > 3 * count


@pytest.fixture
def failing() -> Iterator[tuple[list[bool], int]]:
    """Whether the next calls of the power give no result, and the executor that does as it says."""
    right = power_executor(machine_code.load().power)
    words = (ctypes.c_void_p * 8).from_address(ctypes.c_void_p.from_address(right).value or 0)
    ((entry, power),) = [(k, word) for k, word in enumerate(words) if word]
    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
    )
    method, fails = kind(power), [False]
    table, noting = (ctypes.c_void_p * 8)(), kind(lambda _, *given: None if fails[0] else method(right, *given))
    table[entry] = ctypes.cast(noting, ctypes.c_void_p).value
    executor = (ctypes.c_void_p * 2)(ctypes.addressof(table))
    yield fails, ctypes.addressof(executor)


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=pytest.mark.wide), pytest.param(100_000, marks=pytest.mark.long)]
)
def test_compiled_graphs_fail_now_and_then(
    count: int, failing: tuple[list[bool], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """An operator that gives no result makes them fail themselves, with what torch says of it."""
    case = references.case("viscoplasticity")
    # What an older torch has compiled says no more.
    says = "(API call failed|see what it printed)" if references.OLD_TORCH else "API call failed"
    state, rows = case.rows(), len(case.rows()["t"])
    segment = caller_of(case.load()).program.implicit[0]
    segment.guess(state, rows)
    u, g = segment.unknowns.pack(state, rows)[0], segment.givens.pack(state, rows)[0]
    files = segment.spec.residual, segment.spec.step.jacobian
    graphs = [*(segment.graphs[file].library() for file in files), None, None]
    fails, executor = failing
    means = Means(machine_code.load(), tensor_functions(), executor)
    solver = BlockSolver(Block(graphs, [u.shape[1]], [g.shape[1]]), means, most=1024)
    settings = replace(TIGHT, atol=1e-8, rtol=1e-8)
    expected = solver.solve([u], [g], rows, [], settings).solved
    before = 0
    for call in range(count):
        before = resident() if call == 100 else before
        fails[0] = call % 100 == 50
        if not fails[0]:
            assert_same(solver.solve([u], [g], rows, [], settings).solved, expected)
            continue
        with pytest.raises(AOTIError, match=rf"_jacobian\.pt2: the compiled graph failed: .*{says}"):
            solver.solve([u], [g], rows, [], settings)
        # torch prints a line of its own; with where it happened, before 2.13.
        assert len(capfd.readouterr().err.splitlines()) <= (30 if references.OLD_TORCH else 2)
    assert resident() - before < max(2e6, 0.2 * count * u.nbytes)


def test_threads_have_containers_of_their_own(handles: Handles) -> None:
    """Each graph is run by all threads at once, as the barrier shows; the containers are used again afterwards."""
    count = 3
    together, seen = threading.Barrier(count, timeout=60), threading.local()

    def met(name: str, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not hasattr(seen, name):
            setattr(seen, name, True)
            together.wait()
        return outputs

    system = system_of(handles, RESIDUAL, JACOBIAN, N, N)
    for graph in system.graphs:
        graph.alter = lambda number, outputs, name=graph.file.stem: met(name, outputs)  # type: ignore[misc]
    batches = [loads(rows) for rows in (20, 30, 40)]
    expected = [right(g) for g in batches]

    def work(k: int) -> None:
        for turn in range(20):
            at = (k + turn) % count
            assert_same(solved(system, batches[at]), expected[at])

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    # That no container was in two calls at once is looked at in each call.
    assert all(len(graph.users) == count and graph.calls > 60 for graph in system.graphs)


# -- the log; that its lines are those of the tensors' loop, equations.py sees in each solve ---------------------------


@pytest.mark.parametrize("ls_max_iters", [1, 2, 3, 12])
@pytest.mark.parametrize("ls_type", ["BACKTRACKING", "STRONG_WOLFE"])
def test_log_of_a_line_search(ls_max_iters: int, ls_type: Any) -> None:
    settings = NewtonSettings(1e-4, 0.0, 8, ls_type, ls_max_iters, ls_cutback=3.0, ls_c=0.2)
    lines: list[str] = []
    by_machine_code(arctans_and_squares(), STARTS, KINDS, settings, listener=lines.append)
    trials = [line for line in lines if "LS ITERATION" in line]
    assert len(lines) - len(trials) >= 4
    # More than one trial in some iteration.
    assert bool(trials) == (ls_max_iters > 1)
    assert any("LS ITERATION   2" in line for line in trials) == (ls_max_iters > 2)


@pytest.mark.parametrize("miters", [0, 1, 4])
def test_log_of_few_iterations(miters: int) -> None:
    lines: list[str] = []
    g = column(*SQUARES.tolist())
    by_machine_code(square_roots(), torch.ones_like(g), g, NewtonSettings(miters=miters), listener=lines.append)
    # Rows that a few updates with chord steps do not solve are solved again without.
    attempts = 1 + sum("solved again" in line for line in lines)
    assert attempts == (2 if miters == 4 else 1)
    assert sum(line.startswith("ITERATION") for line in lines) == attempts * (max(miters - 1, 0) + 1)


# -- the initial guess ------------------------------------------------------------------------------------------------


class TestInitialGuess:
    """A predictor that gives the first of two unknowns, `(rows,)` and `(rows, 2)`, from a given and from itself."""

    G = torch.arange(1.0, 20.0, dtype=torch.float64)

    def guess(
        self, handles: Handles, predictor: Function, times: int = 1, kept: Sequence[int] = (), second: Any = None
    ) -> Tensor:
        """The initial guess: a solve without an update ends there."""

        def jacobian(u: Tensor, g: Tensor) -> list[Tensor]:
            return [torch.eye(3, dtype=torch.float64).repeat(len(u), 1, 1), torch.ones_like(u)]

        graphs = [
            HandMadeGraph(lambda u, g: [torch.ones_like(u)], handles, 2, 1),
            HandMadeGraph(jacobian, handles, 2, 2),
            *(None, None),
        ]
        fed = HandMadeGraph(predictor, handles, 2, 2, "predictor")
        # The second output feeds the second argument, and belongs to no unknown.
        block = Block(graphs, [1, 2], [1], prediction=Prediction(fed, ((0, -1), (-1, 1)), times))
        rows = len(self.G)
        found = BlockSolver(block, handles.means, most=64).solve(
            [torch.full_like(self.G, 7.0), second],
            [self.G],
            rows,
            [],
            NewtonSettings(miters=1),
            predicted_from=[self.G, torch.zeros(rows, 2, dtype=torch.float64)],
            kept=kept,
        )
        assert torch.equal(found.givens[:, 0], self.G)
        return found.solved.unknowns[0]

    @pytest.mark.parametrize("times", [1, 3])
    @pytest.mark.parametrize("form", [torch.clone, transposed, strided])
    def test_comes_of_what_the_predictor_gave_before(
        self, times: int, form: Callable[[Tensor], Tensor], handles: Handles
    ) -> None:
        second = torch.randn(len(self.G), 2, dtype=torch.float64)
        found = self.guess(handles, lambda g, x: [g + 10.0 * x[:, 1], form(x + g[:, None])], times, second=second)
        assert torch.equal(found, torch.cat([(self.G * (1 + 10.0 * (times - 1)))[:, None], second], 1))

    def test_is_the_callers_where_there_is_one_and_zero_without(self, handles: Handles) -> None:
        found = self.guess(handles, lambda g, x: [g, x], kept=[0])
        assert torch.equal(found, torch.tensor([7.0, 0.0, 0.0]).double().expand(len(self.G), 3))

    @pytest.mark.parametrize("other", [lambda x: x[:, None].expand(-1, 3), lambda x: x[0], lambda x: x.float()])
    def test_of_another_form_is_left_to_others(self, other: Callable[[Tensor], Tensor], handles: Handles) -> None:
        with pytest.raises(UnfitPredictor, match=r"^predictor\.pt2: returned tensors of other shapes"):
            self.guess(handles, lambda g, x: [other(g), x])

    def test_of_a_predictor_that_fails(self, handles: Handles) -> None:
        with pytest.raises(AOTIError, match=r"^predictor\.pt2: the compiled graph failed: "):
            self.guess(handles, lambda g, x: [g / {}, x])
