"""Compiled graphs: loaded when first used, called with contiguous tensors that share one flat batch axis."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.package import Signature, read_signature
from ..errors import AOTIError, ArtifactError

# CUDA kernels are compiled for inputs at such addresses; a slice of rows may start elsewhere.
CUDA_ALIGNMENT = 16


class Graph:
    """One compiled graph.

    Args:
        file: its package.
        device: that it runs on.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        self.device = device
        # torch's loader waits for its runner with the interpreter locked, and a graph with a custom operator needs the
        # interpreter to finish: calls must queue before they reach the loader.
        self._lock = threading.Lock()
        self._run: Any = None
        self._signature: Signature | None = None
        self._signature_read = False

    @property
    def signature(self) -> Signature | None:
        """What the graph takes; None where its package does not tell."""
        if not self._signature_read:
            self._signature, self._signature_read = read_signature(self.file), True
        return self._signature

    def load(self) -> None:
        """Load the package, if it is not loaded yet; the caller holds no lock."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        if self._run is not None:
            return
        index = -1 if self.device.index is None or self.device.type == "cpu" else self.device.index
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self.file), "model", False, 1, index)
        except RuntimeError as error:
            raise ArtifactError(
                f"{self.file}: torch {torch.__version__} cannot load this package ({_first_line(error)}). If it "
                "needs a "
                "custom operator, import neml2 first; else compile the model again with neml2-compile."
            ) from error
        self._run = loader.run

    def __call__(
        self,
        batched: Sequence[Tensor],
        tail: Sequence[Tensor] = (),
        behind: Sequence[Tensor] = (),
        order: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Run the graph.

        Args:
            batched: the leading arguments, each `(rows, ...)`.
            tail: the arguments behind them, without a batch axis.
            behind: arguments behind the tail, each `(rows, ...)`.
            order: which of all these the graph takes first, second, ...; as given if None.

        Returns:
            The outputs, each `(rows, ...)`, or `(1, ...)` where it does not depend on the row.

        Raises:
            AOTIError: the graph failed.
        """
        arguments = [a if a.is_contiguous() else a.contiguous() for a in (*batched, *tail, *behind)]
        if order is not None:
            arguments = [arguments[i] for i in order]
        if self.device.type == "cuda":
            arguments = [a if a.data_ptr() % CUDA_ALIGNMENT == 0 else a.clone() for a in arguments]
        with self._lock:
            if self._run is None:
                self._load()
            try:
                outputs: list[Tensor] = self._run(arguments)
            except RuntimeError as error:
                raise AOTIError(f"{self.file}: the compiled graph failed: {_first_line(error)}") from error
        return outputs


class PinnedGraph(Graph):
    """A graph that was traced with batch axes other than one free one: rows are padded and folded onto them.

    Args:
        file: its package.
        device: that it runs on.
        axes: the traced batch axes; None for a free one, which only the first can be.
    """

    def __init__(self, file: Path, device: torch.device, axes: tuple[int | None, ...]) -> None:
        super().__init__(file, device)
        self.axes = axes

    def __call__(
        self,
        batched: Sequence[Tensor],
        tail: Sequence[Tensor] = (),
        behind: Sequence[Tensor] = (),
        order: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Run the graph as often as its pinned extents ask; see `Graph.__call__`."""
        rows = batched[0].shape[0]
        fixed = 1
        for size in self.axes:
            fixed *= 1 if size is None else size
        if rows == 0 or fixed == 0:
            raise AOTIError(f"{self.file}: compiled for {self.axes} rows; cannot evaluate {rows} rows.")
        free = self.axes[0] is None
        # A free first axis takes all rows in one call; with all axes pinned, each call takes as many as they hold.
        per_call = -(-rows // fixed) * fixed if free else fixed
        extents = tuple(per_call // fixed if size is None else size for size in self.axes)
        calls = []
        for start in range(0, rows, per_call):
            lead, rear = (
                [_pad(a[start : start + per_call], per_call).reshape(extents + a.shape[1:]) for a in group]
                for group in (batched, behind)
            )
            outputs = super().__call__(lead, tail, rear, order)
            calls.append([_flat(o, extents) for o in outputs])
        return [_join([outputs[i] for outputs in calls], rows, per_call) for i in range(len(calls[0]))]


def _pad(rows: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are `count`."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _flat(output: Tensor, extents: tuple[int, ...]) -> Tensor:
    """Fold the batch axes of an output onto one; an output without the batch keeps extent 1."""
    lead = output.shape[: len(extents)]
    if all(size == 1 for size in lead):
        return output.reshape((1, *output.shape[len(extents) :]))
    return output.expand(extents + output.shape[len(extents) :]).reshape((-1, *output.shape[len(extents) :]))


def _join(parts: list[Tensor], rows: int, per_call: int) -> Tensor:
    if per_call > 1 and parts[0].shape[0] == 1:
        return parts[0]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
