"""The floor: the graphs that one call of the plugin calls, one after the other, with nothing between them.

Which graphs these are, and on how many rows, is not computed but seen: a model is loaded whose graphs note their calls.
The same graphs, as torch loaded them for the plugin, are then called again with arguments of as many rows. What is
missing is all else: the checks, the packing, the linear solves, and the choice of rows and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from neml2_aoti_plugin.graphs import loaded
from neml2_aoti_plugin.graphs.unpack import load_runner
from neml2_aoti_plugin.model import Model
from neml2_aoti_plugin.model.call import BelowAutograd

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Noted:
    """A graph that notes its calls; takes the place of torch's runner.

    Args:
        name: of its file, without the ending.
        runner: torch's.
        calls: takes a note of each call.
        below_autograd: whether autograd's dispatch was left out in the latest call.
        largest: its arguments in the latest call of those on the most rows.
    """

    name: str
    runner: Any
    calls: list[tuple[Noted, Shapes]]
    below_autograd: bool = False
    largest: list[Tensor] = field(default_factory=list)

    def run(self, arguments: Sequence[Tensor]) -> Any:
        """Run the graph, as torch's runner does."""
        shapes = tuple(tuple(x.shape) for x in arguments)
        self.calls.append((self, shapes))
        self.below_autograd = torch._C._dispatch_tls_is_dispatch_key_excluded("AutogradFunctionality")
        if not self.largest or rows_of(shapes) >= len(self.largest[0]):
            # What the plugin passes are views of buffers that it writes to again.
            self.largest = [x.clone() for x in arguments]
        return self.runner.run(arguments)

    def arguments(self, shapes: Shapes) -> list[Tensor]:
        """Arguments of such shapes: the first rows of the largest ones."""
        pairs = zip(self.largest, shapes, strict=True)
        return [x if tuple(x.shape) == shape else x[: shape[0]] for x, shape in pairs]


def rows_of(shapes: Shapes) -> int:
    """Rows of a call, by its first argument."""
    return shapes[0][0]


class Recorder:
    """A model whose graphs note their calls.

    Args:
        artifact: its folder with the graphs.
    """

    def __init__(self, artifact: Path) -> None:
        self._calls: list[tuple[Noted, Shapes]] = []
        self._loaded: dict[Any, Any] = {}
        with self._noting():
            self._model = Model(artifact, mode="rowwise")

    def floor(self, inputs: Mapping[str, Tensor]) -> Floor:
        """See which graphs one call for outputs calls.

        Args:
            inputs: of the model, `(rows, ...)`.
        """
        with self._noting():
            # The first call may load graphs, and make calls of its own for that.
            self._model.forward({name: value[:1] for name, value in inputs.items()})
            self._calls.clear()
            self._model.forward(inputs)
        return Floor(list(self._calls))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Have graphs that are loaded meanwhile note their calls, and be shared with no other model."""

        def noted(file: Path, data: bytes, device: torch.device) -> tuple[Any, bool]:
            runner, python = load_runner(file, data, device)
            return Noted(file.stem, runner, self._calls), python

        with patch.multiple(loaded, _loaded=self._loaded, load_runner=noted):
            yield


class Floor:
    """Graph calls that are made again.

    Args:
        calls: the graphs with the shapes of their arguments, in order.
    """

    def __init__(self, calls: Sequence[tuple[Noted, Shapes]]) -> None:
        self.counts: dict[str, list[int]] = {}
        # As the plugin calls them.
        self._below_autograd = any(graph.below_autograd for graph, _ in calls)
        arguments: dict[tuple[int, Shapes], list[Tensor]] = {}
        self._calls: list[tuple[Callable[[list[Tensor]], Any], list[Tensor]]] = []
        for graph, shapes in calls:
            count = self.counts.setdefault(graph.name, [0, 0])
            count[0] += 1
            count[1] += rows_of(shapes)
            key = id(graph), shapes
            if key not in arguments:
                arguments[key] = graph.arguments(shapes)
            self._calls.append((graph.runner.run, arguments[key]))

    def __call__(self) -> None:
        """Call all graphs."""
        if self._below_autograd:
            with BelowAutograd():
                self._call_all()
        else:
            self._call_all()

    def _call_all(self) -> None:
        for run, arguments in self._calls:
            run(arguments)
