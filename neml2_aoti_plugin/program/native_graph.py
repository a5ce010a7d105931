"""A graph that is called by its C interface, where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..artifact.package import Package
from ..graphs.c_interface import Unavailable, tensor_functions
from ..graphs.graph import Graph
from ..graphs.power import power_executor
from ..solve import choice


class NativeGraph(Graph):
    """A graph on a CPU with one free batch axis.

    Where it cannot be called by its C interface, it is run by torch's runner.

    Args:
        package: as it was looked over.
        device: that it runs on.
    """

    def __init__(self, package: Package, device: torch.device) -> None:
        super().__init__(package, device)
        # What calls it; None before the first call, False where there is nothing.
        self._caller: Any = None

    def __call__(
        self,
        batched: Sequence[Tensor],
        common: Sequence[Tensor] = (),
        behind: Sequence[Tensor] = (),
        order: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Run the graph; see `Graph.__call__`."""
        if self._caller is None:
            self._caller = self._find_caller()
        arguments = [*batched, *common, *behind]
        rows = batched[0].shape[0] if batched else 0
        if not self._caller or not rows:
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
        found: list[Tensor] = self._caller(arguments, has_rows, rows)
        return found

    def _find_caller(self) -> Any:
        reason = choice.machine()[1]
        if choice.machine()[0] is not None:
            try:
                from ..solve.graph_calls import GraphCaller

                return GraphCaller(self.library(), tensor_functions(), power_executor())
            except Unavailable as error:
                reason = str(error)
        log.emit("model", "info", f"{self.file.name}: run by torch's runner, since {reason}")
        return False
