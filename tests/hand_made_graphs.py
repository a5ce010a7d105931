"""Graphs that are functions of tensors written down here, called as compiled ones are: by addresses and handles."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neml2_aoti_plugin._graphs.c_interface import address, function, libtorch, tensor_functions
from neml2_aoti_plugin._solve import machine_code
from neml2_aoti_plugin._solve.caller import Means
from neml2_aoti_plugin._solve.machine_code import MachineCode
from neml2_aoti_plugin._solve.native import Block, BlockSolver, Pass
from neml2_aoti_plugin._solve.outcome import Solved
from neml2_aoti_plugin._solve.tables import CREATE, DATA, DELETE, DIM, SIZES, STRIDES

# The types of the C functions; all of them return an error code.
_Create = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p)
_Delete = ctypes.CFUNCTYPE(c_int32, c_void_p)
_Ask = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p)
_Run = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)

# What a graph does; where it raises, the graph fails with the text of the error.
Function = Callable[..., Sequence[Tensor]]


class Handles:
    """Handles of tensors, and the functions for them, which note what has been made and not deleted yet."""

    def __init__(self) -> None:
        self.functions = tensor_functions().copy()
        self.alive: set[int] = set()
        # How many there were, and what was deleted that was not alive.
        self.made, self.strays = 0, 0
        addresses = self.functions.tolist()
        self._make, self._drop = _Create(addresses[CREATE]), _Delete(addresses[DELETE])
        self._questions = [_Ask(addresses[question]) for question in (DIM, SIZES, STRIDES, DATA)]
        # Memory that outputs lie in.
        self._lent: dict[int, tuple[Tensor, bool]] = {}
        # Machine code calls these.
        self._noting = _Create(self._create), _Delete(self.delete)
        self.functions[[CREATE, DELETE]] = [address(noting) for noting in self._noting]

    @property
    def means(self) -> Means:
        """What graphs are called with."""
        return Means(machine_code.load(), self.functions, 0)

    def require_none_left(self) -> None:
        """Each tensor has been deleted, and once."""
        assert not self.alive and not self.strays

    def _create(self, *arguments: int) -> int:
        failed: int = self._make(*arguments)
        if not failed:
            self.alive.add(c_int64.from_address(arguments[-1]).value)
            self.made += 1
        return failed

    def delete(self, handle: int) -> int:
        """Delete a tensor, and spoil its memory, so that whoever still reads it is found out."""
        if handle not in self.alive:
            self.strays += 1
            return 1
        self.alive.remove(handle)
        lent, spoiled = self._lent.pop(handle, (None, False))
        if lent is not None and spoiled:
            memory = lent.untyped_storage()
            ctypes.memset(memory.data_ptr(), 255, memory.nbytes())
        return int(self._drop(handle))

    def read(self, handle: int) -> Tensor:
        """A copy of a tensor of doubles."""
        words = (c_int64 * 4)()
        for k, question in enumerate(self._questions):
            assert question(handle, ctypes.addressof(words) + 8 * k) == 0
        axes, sizes_at, strides_at, data = words
        # The number of axes is a number of 64 bits, as are sizes and strides.
        sizes, strides = ((c_int64 * axes).from_address(at)[:] if axes else [] for at in (sizes_at, strides_at))
        expected = [prod(sizes[k + 1 :]) for k in range(axes)]
        assert strides == expected, f"not contiguous: {sizes}, {strides}"
        entries = (ctypes.c_double * prod(sizes)).from_address(data)
        return torch.tensor(entries[:], dtype=torch.float64).reshape(sizes)

    def of(self, x: Tensor, *, spoiled: bool) -> int:
        """A handle for a tensor, whose memory is kept until it is deleted."""
        dtype = function(libtorch(), f"aoti_torch_dtype_{str(x.dtype).removeprefix('torch.')}")()
        sizes, strides = (c_int64 * x.ndim)(*x.shape), (c_int64 * x.ndim)(*x.stride())
        handle = c_void_p()
        extents = ctypes.addressof(sizes), ctypes.addressof(strides)
        assert self._create(x.data_ptr(), x.ndim, *extents, 0, dtype, 0, -1, ctypes.addressof(handle)) == 0
        assert handle.value is not None
        self._lent[handle.value] = x, spoiled
        return handle.value


@dataclass
class Container:
    """See `neml2_aoti_plugin._solve.caller.Container`."""

    run: int
    handle: int


class HandMadeGraph:
    """A function in the place of a compiled graph; see `neml2_aoti_plugin._solve.caller.CompiledGraph`."""

    def __init__(
        self, function: Function, handles: Handles, inputs: int, outputs: int, name: str = "graph", keeps: bool = False
    ) -> None:
        self.file, self.inputs, self.outputs = Path(f"{name}.pt2"), inputs, outputs
        self.calls = 0
        # What a test changes of the outputs of a call, or does meanwhile; it may raise.
        self.alter: Callable[[int, Sequence[Tensor]], Sequence[Tensor]] = lambda call, outputs: outputs
        # The containers that were in a call, each with the threads.
        self.users: dict[int, set[int]] = {}
        self._function, self._handles, self._keeps = function, handles, keeps
        self._callback = _Run(self._run)
        self._numbers = itertools.count(1)
        self._inside: set[int] = set()
        self._told = threading.local()

    def container(self) -> Container:
        """A container of its own."""
        return Container(address(self._callback), next(self._numbers))

    def last_error(self) -> str:
        """What the last call in this thread that failed says."""
        return str(getattr(self._told, "text", "nothing has failed in this thread"))

    def _run(
        self, container: int, inputs: int, taken: int, outputs: int, given: int, stream: int, executor: int
    ) -> int:
        handles = (c_int64 * taken).from_address(inputs)[:]
        try:
            assert container not in self._inside, "two calls at once of one container"
            self._inside.add(container)
            self.users.setdefault(container, set()).add(threading.get_ident())
            self.calls += 1
            found = self.alter(self.calls, self._function(*map(self._handles.read, handles)))
            assert (taken, given, len(found)) == (self.inputs, self.outputs, self.outputs)
            for k, x in enumerate(found):
                c_int64.from_address(outputs + 8 * k).value = self._handles.of(x, spoiled=not self._keeps)
        except Exception as error:
            self._told.text = str(error)
            return 1
        finally:
            self._inside.discard(container)
            # A graph takes its inputs for its own.
            for handle in handles:
                self._handles.delete(handle)
        return 0


@dataclass
class System:
    """A system whose graphs are functions: of the residual `-r`, and of the Jacobian and `-r`."""

    solver: BlockSolver
    graphs: tuple[HandMadeGraph, HandMadeGraph]

    def run(self, u: Tensor, g: Tensor, *settings: Any, parameters: Sequence[Tensor] = (), **options: Any) -> Pass:
        """Solve from initial guesses `(rows, n)` with givens `(rows, q)`, and differentiate where that is wanted."""
        return self.solver.solve([u], [g], len(u), parameters, *settings, **options)

    def solve(self, *arguments: Any, **options: Any) -> Solved:
        return self.run(*arguments, **options).solved


def system_of(
    handles: Handles,
    residual: Function,
    jacobian: Function,
    n: int,
    q: int,
    *,
    by_givens: Function | None = None,
    parameters: int = 0,
    keeps: bool = False,
    code: MachineCode | None = None,
) -> System:
    """A system of `n` unknowns and `q` givens; `by_givens` is the derivative of the residual at the solution."""

    def graph(function: Function, outputs: int, name: str) -> HandMadeGraph:
        return HandMadeGraph(function, handles, 2 + parameters, outputs, name, keeps=keeps)

    one, two = graph(residual, 1, "residual"), graph(jacobian, 2, "jacobian")
    last = [None, None] if by_givens is None else [two, graph(by_givens, 1, "by_givens")]
    means = Means(code or machine_code.load(), handles.functions, 0)
    return System(BlockSolver(Block([one, two, *last], [n], [q], parameters), means, most=1024), (one, two))


# Forms of an output.


def once(x: Tensor) -> Tensor:
    return x[:1].contiguous()


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def transposed(x: Tensor) -> Tensor:
    """All strides in another order."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def strided(x: Tensor) -> Tensor:
    """Every third number of an array, from the second on."""
    return torch.stack([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], -1)[..., 1]
