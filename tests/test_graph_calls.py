"""Graphs called one by one by their C interface: rows of any number, outputs of all forms, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hand_made_graphs import Function, Handles, HandMadeGraph, expanded, once, strided, transposed
from neml2_aoti_plugin._solve.caller import GraphCaller
from neml2_aoti_plugin.errors import AOTIError, ArtifactError
from test_block import handles as handles  # the fixture

every_number_of_rows = pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40])
Make = Callable[[Function, int, int], tuple[GraphCaller, HandMadeGraph]]


@pytest.fixture
def make(handles: Handles) -> Iterator[Make]:
    """Makes a caller of a function with so many inputs and outputs."""

    def caller(function: Function, inputs: int, outputs: int) -> tuple[GraphCaller, HandMadeGraph]:
        graph = HandMadeGraph(function, handles, inputs, outputs)
        return GraphCaller(graph, handles.means), graph

    yield caller


def arguments(rows: int, sites: int = 3) -> list[Tensor]:
    """Strains, a number for all rows, a number for each, and something with sites."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 6), (), (rows,), (rows, sites, 2))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


BATCHED = [True, False, True, True]


def plain(x: Tensor, p: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """A vector, a matrix, a number and something with sites, of each row."""
    return [p * x, x.unsqueeze(-1) * x.unsqueeze(-2) + t[:, None, None], t * t, y * p]


def assert_plain(found: list[Tensor] | None, given: list[Tensor]) -> None:
    """The outputs of the function, to the last bit."""
    assert found is not None and all(map(torch.equal, found, plain(*given)))
    assert all(x.is_contiguous() for x in found)


@every_number_of_rows
@pytest.mark.parametrize("form", [torch.clone, transposed, strided])
def test_outputs_of_any_form(form: Callable[[Tensor], Tensor], rows: int, make: Make) -> None:
    caller, graph = make(lambda *given: [form(x) for x in plain(*given)], 4, 4)
    for sites in (3, 3, 5, 1, 3):
        given = arguments(rows, sites)
        assert_plain(caller(given, BATCHED, rows), arguments(rows, sites))
        assert all(map(torch.equal, given, arguments(rows, sites)))
    assert len(graph.users) == 1


def test_outputs_go_where_the_caller_says(make: Make) -> None:
    caller, _ = make(lambda *given: [strided(x) for x in plain(*given)], 4, 4)
    given = arguments(40)
    whole = caller(given, BATCHED, 40)
    assert whole is not None
    for x in whole:
        x.fill_(torch.nan)
    for start, end in ((0, 16), (16, 33), (33, 40)):
        rows = [x[start:end] if has else x for x, has in zip(given, BATCHED, strict=True)]
        into = [x[start:end] for x in whole]
        found = caller(rows, BATCHED, end - start, into)
        assert found is not None and [x.data_ptr() for x in found] == [x.data_ptr() for x in into]
    assert_plain(whole, given)


@every_number_of_rows
def test_outputs_that_are_the_same_for_all_rows(rows: int, make: Make) -> None:
    caller, _ = make(lambda x, p: [once(p.expand(4, 6)), expanded(p.expand(len(x), 2)), x], 2, 3)
    x = torch.ones(rows, 6, dtype=torch.float64)
    for value in (1.0, 2.0):
        found = caller([x, torch.tensor(value, dtype=torch.float64)], [True, False], rows)
        expected = [torch.full((k, n), value, dtype=torch.float64) for k, n in ((1, 6), (rows, 2))]
        assert found is not None and all(map(torch.equal, found, [*expected, x]))


def test_rows_that_fill_a_call_up_are_copies_of_the_first(make: Make) -> None:
    seen: list[Tensor] = []

    def note(x: Tensor) -> list[Tensor]:
        seen.append(x)
        return [x.clone()]

    caller, _ = make(note, 1, 1)
    for rows in (40, 5, 16):
        (x, *_) = arguments(rows)
        caller([x], [True], rows)
        filled = -(-rows // 16) * 16
        assert torch.equal(seen[-1], torch.cat([x, x[:1].expand(filled - rows, 6)]))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:-1],
        lambda x: x[:0],
        lambda x: torch.cat([x, x]),
        lambda x: x[0, 0],
        lambda x: x.float(),
        lambda x: x.to(torch.complex128),
        lambda x: x.reshape(len(x), *(1,) * 11, -1),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_outputs_that_are_no_rows_of_numbers(
    other: Callable[[Tensor], Tensor], after: int, make: Make, handles: Handles
) -> None:
    caller, graph = make(lambda x: [x, x], 1, 2)
    graph.alter = lambda call, outputs: [outputs[0], other(outputs[0]) if call > after else outputs[1]]
    (x, *_) = arguments(17)
    for _ in range(3):
        found = caller([x], [True], len(x))
        assert found is None or (graph.calls <= after and all(torch.equal(y, x) for y in found))
        handles.require_none_left()
    assert caller([x], [True], len(x)) is None
    assert len(graph.users) == 1


@pytest.mark.parametrize("rows", [1, 16, 33, 48])
@pytest.mark.parametrize("shape", [(), (6,), (16,), (48, 6)])
def test_an_output_without_rows_is_not_taken_for_rows(rows: int, shape: tuple[int, ...], make: Make) -> None:
    """Also where it is as long as the rows of the call are many."""
    caller, _ = make(lambda x: [x, torch.ones(shape, dtype=torch.float64)], 1, 2)
    for _ in range(2):
        assert caller([torch.ones(rows, 6, dtype=torch.float64)], [True], rows) is None


def test_a_graph_that_fails(make: Make, handles: Handles) -> None:
    def perhaps(call: int, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if call % 3 == 0:
            raise RuntimeError("every third time")
        return outputs

    caller, graph = make(plain, 4, 4)
    graph.alter = perhaps
    failed, given = 0, arguments(17)
    for _ in range(60):
        try:
            assert_plain(caller(given, BATCHED, 17), given)
        except AOTIError as error:
            assert str(error) == "graph.pt2: the compiled graph failed: every third time"
            failed += 1
        handles.require_none_left()
    assert failed == graph.calls // 3 > 10


def test_threads_have_containers_of_their_own(make: Make) -> None:
    """That no container is in two calls at once is looked at in each call."""
    caller, graph = make(plain, 4, 4)

    def work(rows: int) -> None:
        given = arguments(rows)
        for _ in range(100):
            assert_plain(caller(given, BATCHED, rows), given)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, (5, 16, 40)))
    assert len(graph.users) <= 3 and graph.calls >= 300


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_arguments_is_refused(given: int, make: Make) -> None:
    """A compiled graph would end the process."""
    caller, graph = make(lambda x, y: [x, y], 2, 2)
    with pytest.raises(ArtifactError, match=r"^graph\.pt2: takes 2 tensors"):
        caller([arguments(3)[0]] * given, [True] * given, 3)
    assert graph.calls == 0
