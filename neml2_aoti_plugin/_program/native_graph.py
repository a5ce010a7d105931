"""A graph that is called by its C interface, where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.package import Package
from .._graphs.c_interface import Unavailable, tensor_functions
from .._graphs.graph import Graph
from .._graphs.power import power_executor
from .._solve import machine_code
from .._solve.native import GraphCaller, Means
from ..errors import AOTIError
from .blocks import cut
from .packing import put
from .threads import run_all

# Rows that a graph is called for at a time. Blocks of an implicit segment have fewer.
GRAPH_ROWS = 1 << 14


def means() -> tuple[Means | None, str]:
    """What graphs are called with by their C interface, and the reason; None where torch's runner runs all of them."""
    code, reason = machine_code.machine_code()
    if code is None:
        return None, reason
    try:
        return Means(code, tensor_functions(), power_executor()), reason
    except Unavailable as error:
        machine_code.give_up(f"torch {torch.__version__} cannot be called by C functions: {error}")
    return None, machine_code.chosen()[1]


class NativeGraph(Graph):
    """A graph on a CPU with one free batch axis.

    Where it cannot be called by its C interface, it is run by torch's runner.
    """

    def __init__(self, package: Package, device: torch.device) -> None:
        super().__init__(package, device)
        # What calls it, once it has been looked for; None where there is nothing.
        self._caller: GraphCaller | None = None
        self._looked_for = False

    def __call__(
        self,
        batched: Sequence[Tensor],
        common: Sequence[Tensor] = (),
        behind: Sequence[Tensor] = (),
        order: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Run the graph; see `Graph.__call__`."""
        if not self._looked_for:
            self._caller, self._looked_for = self._find_caller(), True
        arguments = [*batched, *common, *behind]
        rows = batched[0].shape[0] if batched else 0
        caller = self._caller
        if caller is None or not rows:
            return super().__call__(batched, common, behind, order)
        has_rows = [True] * len(batched) + [False] * len(common) + [True] * len(behind)
        if order is not None:
            arguments, has_rows = [arguments[i] for i in order], [has_rows[i] for i in order]
        for k, x in enumerate(arguments):
            if x.dtype != torch.float64:
                return super().__call__(batched, common, behind, order)
            if not x.is_contiguous():
                arguments[k] = x.contiguous()
        self.require(arguments)
        if rows > GRAPH_ROWS:
            found = _in_blocks(caller, arguments, has_rows, rows)
        else:
            found = caller(arguments, has_rows, rows)
        if found is None:
            self._caller = None
            log.emit("model", "info", f"{self.file.name}: run by torch's runner, since an output has no rows")
            return super().__call__(batched, common, behind, order)
        return found

    def _find_caller(self) -> GraphCaller | None:
        found, reason = None, self._obstacle()
        if not reason:
            found, reason = means()
        if found is not None:
            try:
                return GraphCaller(self.library(), found)
            except Unavailable as error:
                reason = str(error)
        log.emit("model", "info", f"{self.file.name}: run by torch's runner, since {reason}")
        return None


def _in_blocks(caller: GraphCaller, arguments: list[Tensor], has_rows: list[bool], rows: int) -> list[Tensor] | None:
    """Run the graph for blocks of rows, on all threads; the first block tells the shapes of the outputs."""
    first, *rest = cut(rows, GRAPH_ROWS)

    def run(block: slice, into: list[Tensor] | None = None) -> list[Tensor] | None:
        some = [x[block] if has else x for x, has in zip(arguments, has_rows, strict=True)]
        return caller(some, has_rows, block.stop - block.start, into)

    begun = run(first)
    if begun is None:
        return None
    # What is the same for all rows comes once; a block has more than one row.
    once = [x.shape[0] == 1 for x in begun]
    whole = [x if one else x.new_empty((rows, *x.shape[1:])) for x, one in zip(begun, once, strict=True)]

    def write(block: slice) -> None:
        into = [torch.empty_like(x) if one else x[block] for x, one in zip(whole, once, strict=True)]
        if run(block, into) is None:
            raise AOTIError("a graph gives tensors of another form for some rows than for others; compile it again.")

    def copy() -> None:
        for x, into, one in zip(begun, whole, once, strict=True):
            if not one:
                put(into, first, x)

    run_all([copy, *(partial(write, block) for block in rest)])
    return whole
