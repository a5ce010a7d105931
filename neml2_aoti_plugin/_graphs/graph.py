"""Compiled graphs: loaded when first used, called with contiguous tensors that share one flat batch axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._artifact.package import Argument, Package
from ..errors import AOTIError, ArtifactError
from . import forks
from .c_interface import Library, Unavailable
from .loaded import loaded

# CUDA kernels are compiled for inputs at such addresses; a slice of rows may start elsewhere.
CUDA_ALIGNMENT = 16


class Graph:
    """One compiled graph."""

    def __init__(self, package: Package, device: torch.device) -> None:
        self.file = package.file
        self.signature = package.signature
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._loaded = loaded(package, device)
        # What runs the graph for contiguous arguments, in its order, of which there are as many and of the same ranks
        # each time: after the first, without another comparison.
        self.again: Callable[[list[Tensor]], list[Tensor]] = self._first
        # Ranks of arguments that were compared with the signature; they are few, and the same from call to call.
        self._compared: set[tuple[int, ...]] = set()

    @property
    def takes_one_batch_axis(self) -> bool:
        """Whether the graph was traced with one batch axis, of any length."""
        return True

    def load(self) -> None:
        """Load the package, if it is not loaded yet."""
        self._loaded.load()

    def library(self) -> Library:
        """What is called without the interpreter, with tensors that `require` has looked at."""
        reason = self._obstacle()
        if reason:
            raise Unavailable(reason)
        return self._loaded.library()

    def obstacle(self) -> str:
        """Why the graph cannot be called by its C interface, as far as is known without loading it; else empty."""
        return self._obstacle() or self._loaded.obstacle()

    def _obstacle(self) -> str:
        """What is in the way, whatever its package holds."""
        if self.device.type != "cpu":
            return "it runs on a GPU"
        if not self.takes_one_batch_axis:
            return "it has pinned batch axes"
        others = {a.dtype for a in self.signature.arguments} - {torch.float64} if self.signature is not None else ()
        return f"it takes {', '.join(sorted(map(str, others)))}" if others else ""

    def __call__(
        self,
        batched: Sequence[Tensor],
        common: Sequence[Tensor] = (),
        behind: Sequence[Tensor] = (),
        order: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Run the graph."""
        arguments = [a if a.is_contiguous() else a.contiguous() for a in (*batched, *common, *behind)]
        if order is not None:
            arguments = [arguments[i] for i in order]
        if self._on_cuda:
            arguments = [a if a.data_ptr() % CUDA_ALIGNMENT == 0 else a.clone() for a in arguments]
        self.require(arguments)
        return self._loaded.run(arguments)

    def require(self, arguments: Sequence[Tensor]) -> None:
        """Refuse arguments that the graph would read wrongly, in its order; those of the same ranks are compared once."""
        self.require_process()
        ranks = tuple([a.ndim for a in arguments])
        if ranks not in self._compared:
            self._compare(arguments)
            self._compared.add(ranks)

    def require_process(self) -> None:
        """Refuse to run in a forked process where torch would wait for threads that it does not have."""
        if forks.forked_after_use:
            forks.require_one_thread(self.file)

    def _first(self, arguments: list[Tensor]) -> list[Tensor]:
        outputs = Graph.__call__(self, arguments)
        self.again = self._loaded.run
        return outputs

    def _compare(self, arguments: Sequence[Tensor]) -> None:
        """Refuse arguments that the graph would read wrongly: it looks at none of this itself."""
        signature = self.signature
        if signature is None:
            return
        cure = "The package and the metadata do not belong together: copy the whole artifact folder, or compile again."
        if len(arguments) != len(signature.arguments):
            raise ArtifactError(
                f"{self.file}: takes {len(signature.arguments)} tensors, the metadata gives it {len(arguments)}. {cure}"
            )
        for i, (given, taken) in enumerate(zip(arguments, signature.arguments, strict=True)):
            if not _fits(given, taken):
                extents = ", ".join("*" if n is None else str(n) for n in taken.extents)
                raise ArtifactError(
                    f"{self.file}: takes {taken.dtype} of shape ({extents}) as tensor {i}, the metadata gives it "
                    f"{given.dtype} of shape {tuple(given.shape)}. {cure}"
                )


def _fits(given: Tensor, taken: Argument) -> bool:
    return (
        given.dtype == taken.dtype
        and given.ndim == len(taken.extents)
        and all(n is None or n == m for n, m in zip(taken.extents, given.shape, strict=True))
    )


class PinnedGraph(Graph):
    """A graph that was traced with batch axes other than one free one: rows are padded and folded onto them."""

    def __init__(self, package: Package, device: torch.device, axes: tuple[int | None, ...]) -> None:
        super().__init__(package, device)
        self.axes = axes

    @property
    def takes_one_batch_axis(self) -> bool:
        """Whether the graph was traced with one batch axis, of any length: not this one."""
        return False

    def __call__(
        self,
        batched: Sequence[Tensor],
        common: Sequence[Tensor] = (),
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
            outputs = super().__call__(lead, common, rear, order)
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
