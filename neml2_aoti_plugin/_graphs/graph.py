"""Compiled graphs: loaded when first used, called with contiguous tensors that share one flat batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from .. import _log as log
from .._artifact.package import Package
from .._solve import machine_code
from .._solve.caller import GraphCaller, Means
from ..errors import AOTIError, ArtifactError
from .c_interface import Library, Unavailable, tensor_functions
from .loaded import loaded, require_one_thread
from .operators import power_executor
from .threads import cut, run_all

# CUDA kernels are compiled for inputs at such addresses; a slice of rows may start elsewhere.
CUDA_ALIGNMENT = 16
# Rows that a graph is called for at a time by its C interface. Blocks of an implicit segment have fewer.
GRAPH_ROWS = 1 << 14


def means() -> tuple[Means | None, str]:
    """What graphs are called with by their C interface, and the reason; None where torch's runner runs all of them."""
    code, reason = machine_code.machine_code()
    if code is None:
        return None, reason
    try:
        return Means(code, tensor_functions(), power_executor(code.power)), reason
    except Unavailable as error:
        machine_code.give_up(f"torch {torch.__version__} cannot be called by C functions: {error}")
    return None, machine_code.chosen()[1]


class Graph:
    """One compiled graph."""

    # Whether it was traced with one batch axis, of any length.
    takes_one_batch_axis = True

    def __init__(self, package: Package, device: torch.device) -> None:
        self.file = package.file
        self.signature = package.signature
        self.device = device
        self._loaded = loaded(package, device)
        # Runs arguments like those of an earlier call, which were compared then; nothing stands between.
        self.again = self._loaded.run
        # Ranks of arguments that were compared with the signature; they are few, and the same from call to call.
        self._compared: set[tuple[int, ...]] = set()

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
        """Run the graph: arguments `(rows, ...)`, then some without a batch axis, then some `(rows, ...)`.

        `order` says which of all these the graph takes first, second, ...; as given if None. The outputs are
        `(rows, ...)`, or `(1, ...)` where they do not depend on the row.
        """
        arguments = [*batched, *common, *behind]
        has_rows = [True] * len(batched) + [False] * len(common) + [True] * len(behind)
        if order is not None:
            arguments, has_rows = [arguments[i] for i in order], [has_rows[i] for i in order]
        return self._run([a if a.is_contiguous() else a.contiguous() for a in arguments], has_rows)

    def _run(self, arguments: list[Tensor], has_rows: list[bool]) -> list[Tensor]:
        """Run the graph for contiguous arguments, in its order; which of them have rows."""
        if self.device.type == "cuda":
            arguments = [a if a.data_ptr() % CUDA_ALIGNMENT == 0 else a.clone() for a in arguments]
        return self.run_short(arguments)

    def run_short(self, arguments: list[Tensor]) -> list[Tensor]:
        """Run the graph by torch's runner, for contiguous arguments in its order: the shortest way for few rows."""
        self.require(arguments)
        return self._loaded.run(arguments)

    def require(self, arguments: Sequence[Tensor]) -> None:
        """Refuse arguments that the graph would read wrongly, which it does not ask; those of the same ranks once."""
        require_one_thread(self.file)
        signature, ranks = self.signature, tuple([a.ndim for a in arguments])
        if signature is None or ranks in self._compared:
            return
        cure = "The package and the metadata do not belong together: copy the whole artifact folder, or compile again."
        if len(arguments) != len(signature.arguments):
            raise ArtifactError(
                f"{self.file}: takes {len(signature.arguments)} tensors, the metadata gives it {len(arguments)}. {cure}"
            )
        for i, (given, taken) in enumerate(zip(arguments, signature.arguments, strict=True)):
            sizes = zip(taken.extents, given.shape, strict=False)
            if (
                given.dtype != taken.dtype
                or given.ndim != len(taken.extents)
                or any(n not in (None, m) for n, m in sizes)
            ):
                extents = ", ".join("*" if n is None else str(n) for n in taken.extents)
                raise ArtifactError(
                    f"{self.file}: takes {taken.dtype} of shape ({extents}) as tensor {i}, the metadata gives it "
                    f"{given.dtype} of shape {tuple(given.shape)}. {cure}"
                )
        self._compared.add(ranks)


class NativeGraph(Graph):
    """A graph on a CPU with one free batch axis, called by its C interface, or else by torch's runner."""

    def __init__(self, package: Package, device: torch.device) -> None:
        super().__init__(package, device)
        # What calls it, once it has been looked for; None where there is nothing.
        self._caller: GraphCaller | None = None
        self._looked_for = False

    def _run(self, arguments: list[Tensor], has_rows: list[bool]) -> list[Tensor]:
        if not self._looked_for:
            self._caller, self._looked_for = self._find_caller(), True
        caller = self._caller
        rows = next((a.shape[0] for a, has in zip(arguments, has_rows, strict=True) if has), 0)
        if caller is None or not rows or any(a.dtype != torch.float64 for a in arguments):
            return super()._run(arguments, has_rows)
        self.require(arguments)
        call = caller if rows <= GRAPH_ROWS else partial(_in_blocks, caller)
        found = call(arguments, has_rows, rows)
        if found is None:
            self._caller = None
            log.emit("model", "info", f"{self.file.name}: run by torch's runner, since an output has no rows")
            return super()._run(arguments, has_rows)
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
    whole = [x if x.shape[0] == 1 else x.new_empty((rows, *x.shape[1:])) for x in begun]

    def write(block: slice) -> None:
        into = [torch.empty_like(x) if x.shape[0] == 1 else x[block] for x in whole]
        if run(block, into) is None:
            raise AOTIError("a graph gives tensors of another form for some rows than for others; compile it again.")

    def copy() -> None:
        for x, into in zip(begun, whole, strict=True):
            if into is not x:
                into[first] = x

    run_all([copy, *(partial(write, block) for block in rest)])
    return whole


class PinnedGraph(Graph):
    """A graph that was traced with batch axes other than one free one: rows are padded and folded onto them."""

    takes_one_batch_axis = False

    def __init__(self, package: Package, device: torch.device, axes: tuple[int | None, ...]) -> None:
        super().__init__(package, device)
        self.axes = axes

    def _run(self, arguments: list[Tensor], has_rows: list[bool]) -> list[Tensor]:
        """Run the graph as often as its pinned extents ask."""
        rows = next(a.shape[0] for a, has in zip(arguments, has_rows, strict=True) if has)
        fixed = prod(size for size in self.axes if size is not None)
        if rows == 0 or fixed == 0:
            raise AOTIError(f"{self.file}: compiled for {self.axes} rows; cannot evaluate {rows} rows.")
        free = self.axes[0] is None
        # A free first axis takes all rows in one call; with all axes pinned, each call takes as many as they hold.
        per_call = -(-rows // fixed) * fixed if free else fixed
        extents = tuple(per_call // fixed if size is None else size for size in self.axes)
        calls = []
        for start in range(0, rows, per_call):
            given = []
            for a, has in zip(arguments, has_rows, strict=True):
                if has:
                    a, shape = a[start : start + per_call], a.shape[1:]
                    if len(a) < per_call:
                        # Copies of the last row fill the call up.
                        a = torch.cat([a, a[-1:].expand(per_call - len(a), *shape)])
                    a = a.reshape(extents + shape)
                given.append(a)
            calls.append([_flat(output, extents) for output in super()._run(given, has_rows)])
        return [
            # What is the same for all rows comes once.
            parts[0] if per_call > 1 and parts[0].shape[0] == 1 else torch.cat(parts)[:rows]
            for parts in zip(*calls, strict=True)
        ]


def _flat(output: Tensor, extents: tuple[int, ...]) -> Tensor:
    """Fold the batch axes of an output onto one; an output without the batch keeps extent 1."""
    lead, shape = output.shape[: len(extents)], output.shape[len(extents) :]
    if all(size == 1 for size in lead):
        return output.reshape((1, *shape))
    return output.expand(extents + shape).reshape((-1, *shape))
