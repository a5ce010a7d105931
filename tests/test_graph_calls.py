"""Graphs called one by one by their C interface: rows of any number, outputs of all forms, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hand_made_graphs import Function, Handles, HandMadeGraph, expanded, once, strided, transposed
from neml2_aoti_plugin._graphs.caller import GraphCaller
from neml2_aoti_plugin.errors import AOTIError, ArtifactError

ROWS = (1, 2, 15, 16, 17, 40)


def call(caller: GraphCaller, *given: Any) -> list[Tensor]:
    """The outputs of a graph that gives rows of numbers."""
    found = caller(*given)
    assert found is not None
    return found


def caller_of(function: Function, inputs: int, outputs: int) -> tuple[GraphCaller, Handles, HandMadeGraph]:
    handles = Handles()
    graph = HandMadeGraph(function, handles, inputs, outputs)
    return GraphCaller(graph, handles.means), handles, graph


def arguments(rows: int, sites: int = 3) -> list[Tensor]:
    """Strains, a number for all rows, a number for each, and something with sites."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 6), (), (rows,), (rows, sites, 2))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


BATCHED = [True, False, True, True]


def plain(x: Tensor, p: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """A vector, a matrix, a number and something with sites, of each row."""
    return [p * x, x.unsqueeze(-1) * x.unsqueeze(-2) + t[:, None, None], t * t, y * p]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [torch.clone, transposed, strided])
def test_outputs_of_any_form(form: Callable[[Tensor], Tensor], rows: int) -> None:
    caller, handles, graph = caller_of(lambda *given: [form(x) for x in plain(*given)], 4, 4)
    for sites in (3, 3, 5, 1, 3):
        given = arguments(rows, sites)
        kept = [x.clone() for x in given]
        found = call(caller, given, BATCHED, rows)
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(found, plain(*given), strict=True))
        assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))
        assert not handles.alive and not handles.strays
    assert len(graph.users) == 1


def test_outputs_go_where_the_caller_says() -> None:
    caller, handles, _ = caller_of(lambda *given: [strided(x) for x in plain(*given)], 4, 4)
    given = arguments(40)
    whole = [x.fill_(torch.nan) for x in call(caller, given, BATCHED, 40)]
    for start, end in ((0, 16), (16, 33), (33, 40)):
        rows = [x[start:end] if has else x for x, has in zip(given, BATCHED, strict=True)]
        into = [x[start:end] for x in whole]
        found = call(caller, rows, BATCHED, end - start, into)
        assert all(x.data_ptr() == y.data_ptr() for x, y in zip(found, into, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(whole, plain(*given), strict=True))
    assert not handles.alive and not handles.strays


@pytest.mark.parametrize("rows", ROWS)
def test_outputs_that_are_the_same_for_all_rows(rows: int) -> None:
    caller, handles, _ = caller_of(lambda x, p: [once(p.expand(4, 6)), expanded(p.expand(len(x), 2)), x], 2, 3)
    for value in (1.0, 2.0):
        given = [torch.ones(rows, 6, dtype=torch.float64), torch.tensor(value, dtype=torch.float64)]
        first, second, third = call(caller, given, [True, False], rows)
        assert torch.equal(first, torch.full((1, 6), value, dtype=torch.float64))
        assert torch.equal(second, torch.full((rows, 2), value, dtype=torch.float64))
        assert torch.equal(third, given[0])
        assert not handles.alive and not handles.strays


def test_rows_that_fill_a_call_up_are_copies_of_the_first() -> None:
    seen: list[Tensor] = []

    def note(x: Tensor) -> list[Tensor]:
        seen.append(x)
        return [x.clone()]

    caller, *_ = caller_of(note, 1, 1)
    for rows in (40, 5, 16):
        (x, *_) = arguments(rows)
        call(caller, [x], [True], len(x))
        called = seen[-1]
        assert torch.equal(called[:rows], x) and len(called) == -(-rows // 16) * 16
        assert torch.equal(called[rows:], x[:1].expand(len(called) - rows, 6))


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
def test_outputs_that_are_no_rows_of_numbers(other: Callable[[Tensor], Tensor], after: int) -> None:
    calls: list[int] = []

    def wrong(x: Tensor) -> Sequence[Tensor]:
        calls.append(1)
        return [x, other(x) if len(calls) > after else x]

    caller, handles, graph = caller_of(wrong, 1, 2)
    (x, *_) = arguments(17)
    for _ in range(3):
        found = caller([x], [True], len(x))
        assert found is None or (len(calls) <= after and all(torch.equal(y, x) for y in found))
        assert not handles.alive and not handles.strays
    assert caller([x], [True], len(x)) is None
    assert len(graph.users) == 1


@pytest.mark.parametrize("rows", [1, 16, 33, 48])
@pytest.mark.parametrize("shape", [(), (6,), (16,), (48, 6)])
def test_an_output_without_rows_is_not_taken_for_rows(rows: int, shape: tuple[int, ...]) -> None:
    """Also where it is as long as the rows of the call are many."""
    caller, handles, _ = caller_of(lambda x: [x, torch.ones(shape, dtype=torch.float64)], 1, 2)
    for _ in range(2):
        assert caller([torch.ones(rows, 6, dtype=torch.float64)], [True], rows) is None
        assert not handles.alive and not handles.strays


def test_a_graph_that_fails() -> None:
    calls: list[int] = []

    def perhaps(*given: Tensor) -> Sequence[Tensor]:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise RuntimeError("every third time")
        return plain(*given)

    caller, handles, _ = caller_of(perhaps, 4, 4)
    failed = 0
    for _ in range(60):
        given = arguments(17)
        try:
            found = call(caller, given, BATCHED, 17)
            assert all(torch.equal(x, y) for x, y in zip(found, plain(*given), strict=True))
        except AOTIError as error:
            assert str(error) == "graph.pt2: the compiled graph failed: every third time"
            failed += 1
        assert not handles.alive and not handles.strays
    assert failed == len(calls) // 3 > 10


def test_threads_have_containers_of_their_own() -> None:
    """That no container is in two calls at once is looked at in each call."""
    caller, handles, graph = caller_of(plain, 4, 4)

    def work(rows: int) -> None:
        given = arguments(rows)
        for _ in range(100):
            found = call(caller, given, BATCHED, rows)
            assert all(torch.equal(x, y) for x, y in zip(found, plain(*given), strict=True))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, (5, 16, 40)))
    assert len(graph.users) <= 3 and graph.calls >= 300
    assert not handles.alive and not handles.strays


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_arguments_is_refused(given: int) -> None:
    """A compiled graph would end the process."""
    caller, handles, graph = caller_of(lambda x, y: [x, y], 2, 2)
    (x, *_) = arguments(3)
    with pytest.raises(ArtifactError, match=r"^graph\.pt2: takes 2 tensors"):
        call(caller, [x] * given, [True] * given, 3)
    assert graph.calls == handles.made == 0
