"""What `Model` and `AOTIModel` are as torch modules: parameters, `to()`, copies and pickles, and what `help` shows."""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from threading import Event, get_ident, main_thread
from time import monotonic, sleep
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .._artifact import files
from .._artifact.files import Folder
from .._artifact.locate import Place
from .._artifact.package import Package
from .._artifact.schema import Metadata
from ..errors import AOTIError, ArtifactError, InputError
from ..settings import NewtonSettings
from ._parameters import PromotedParameters

P = ParamSpec("P")
R = TypeVar("R")

# Of a torch module, what is of use with a compiled model; the rest works as ever, and is not listed.
USEFUL = frozenset(
    {
        *("eval", "get_parameter", "load_state_dict", "parameters", "requires_grad_", "state_dict", "to", "train"),
        *("training", "zero_grad"),
    }
)
# What neml2 calls, and what is there as in neml2's C++ runtime beside a better way (`inputs`, `outputs`, `set_solver`).
INTERNAL = frozenset(
    {
        *("forward_with_batch", "linearise", "set_solver_config", "parameter_base_shapes"),
        *("input_names", "output_names", "input_base_shapes", "output_base_shapes"),
    }
)


# The threads beside the main one that are in a call, and whether the interpreter is about to end.
_MAIN, _inside, _ending = main_thread().ident, set[int](), Event()
# How long the end of the interpreter may wait for calls in daemon threads, in seconds.
_PATIENCE = 10.0


def _let_threads_out() -> None:
    """Wait until no daemon thread is in a call, and let none begin another one."""
    _ending.set()
    end = monotonic() + _PATIENCE
    while _inside and monotonic() < end:
        sleep(1e-3)


atexit.register(_let_threads_out)
if hasattr(os, "register_at_fork"):
    # The other threads are not in the new process.
    os.register_at_fork(after_in_child=_inside.clear)


def public(call: Callable[P, R]) -> Callable[P, R]:
    """A call that users make, guarded against where it cannot be made.

    `torch.compile` does not look into it: it breaks its graph there and runs the call as it is. That is what
    `torch.compiler.disable` does, but it is asked for only where torch compiles, since it imports the whole compiler.

    While the interpreter ends, the call is refused: torch aborts the process if the last name of a tensor goes while a
    view of it is left, as happens in most calls. Daemon threads are let out of their calls before it ends: one that
    comes back from torch's code later aborts the process, too.
    """
    ends, me = sys.is_finalizing, get_ident

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            found: R = torch.compiler.disable(call)(*args, **kwargs)
            return found
        if ends():
            raise AOTIError(
                "a compiled model was called while the interpreter ends, as from a finalizer (__del__) of what is left "
                "over. torch cannot be used then. Call it before: in a with block, or by atexit.register."
            )
        thread = me()
        if thread == _MAIN or thread in _inside:
            return call(*args, **kwargs)
        if _ending.is_set():
            # A daemon thread, as a rule: the interpreter ends meanwhile.
            sleep(_PATIENCE)
        _inside.add(thread)
        try:
            return call(*args, **kwargs)
        finally:
            _inside.discard(thread)

    # torch compiles a code object a few times, and then looks into what it calls: each call has its own.
    run.__code__ = run.__code__.replace(co_name=call.__name__)
    return wraps(call)(run)


class Concise(ABCMeta):
    """Of a class whose `dir`, and so `help`, leaves out what it has from `torch.nn.Module` and for neml2.

    It derives from `ABCMeta`, so that a class may derive from a compiled model and from an abstract class.
    """

    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
        names = {name for base in own for name in vars(base)}
        return sorted(name for name in names if not name.startswith("_") and name not in INTERNAL)


class CompiledModule(nn.Module, metaclass=Concise):
    """A torch module whose parameters are the promoted parameters of a compiled model.

    They are frozen until `requires_grad_()` is called, so that a call costs nothing for derivatives that nobody wants.
    """

    def __init__(self) -> None:
        super().__init__()
        _let_dask_pickle(type(self))

    def __getstate__(self) -> dict[str, Any]:
        _let_dask_pickle(type(self))
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _let_dask_pickle(type(self))
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *USEFUL})  # type: ignore[no-untyped-call]

    @property
    def _promoted(self) -> PromotedParameters:
        """The promoted parameters."""
        raise NotImplementedError

    @overload
    def named_parameters(self) -> dict[str, nn.Parameter]: ...

    @overload
    def named_parameters(
        self, prefix: str = ..., recurse: bool = ..., remove_duplicate: bool = ...
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_parameters(
        self, prefix: str | None = None, recurse: bool | None = None, remove_duplicate: bool | None = None
    ) -> dict[str, nn.Parameter] | Iterator[tuple[str, nn.Parameter]]:
        """The promoted parameters; changing one in place takes effect on the next call.

        Without arguments a dict from name to parameter, as neml2's compiled models give it; with any, an iterator of
        names and parameters, as in `torch.nn.Module`.
        """
        if prefix is None and recurse is None and remove_duplicate is None:
            return dict(self._promoted.values)
        return super().named_parameters(
            prefix or "", recurse is None or recurse, remove_duplicate is None or remove_duplicate
        )

    @property
    def parameter_base_shapes(self) -> dict[str, list[int]]:
        """Base shape of each promoted parameter."""
        return {name: list(spec.base_shape) for name, spec in self._promoted.specs.items()}

    def set_parameter(self, name: str, value: Tensor | float) -> None:
        """Set a promoted parameter to a tensor `(*batch, *base)`, or to a number for all its entries.

        In place where the shape is the same, else by a new parameter.
        """
        self._promoted.set(name, value)

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the leaf for another device or dtype."""
        raise NotImplementedError

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the model runs, and on what."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Take part in `to()`, `float()`, `cuda()` and their like: by another compiled leaf, or not at all.

        Raises:
            ArtifactNotFoundError: nothing was compiled for that device and dtype.
            InputError: torch has no such device here.
        """
        device, dtype = self._place()
        try:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            # What torch says where there is no such device is of several types, and of torch only.
            raise InputError(
                f"torch cannot move a tensor to where this model was asked to go: {_first_line(error)}. It stays on "
                f"{device}. Choose a device that is there; torch.cuda.is_available() is {torch.cuda.is_available()}."
            ) from error
        if probe.dtype != dtype or probe.device != torch.empty(0, device=device).device:
            self._move(probe.device, probe.dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _let_dask_pickle(kind: type[CompiledModule]) -> None:
    """Have Dask pickle models of a class, where it is imported; it takes other torch modules apart by their attributes.

    Dask asks for it where it sends a value. A model is made, or pickled for its token, before that.
    """
    protocol = sys.modules.get("distributed.protocol")
    registry = getattr(protocol, "dask_serialize", None)
    if registry is not None:
        registry.register(kind, _pickle_it)


def _pickle_it(model: CompiledModule) -> NoReturn:
    """What Dask takes for: try the next serializer, which is pickle."""
    raise NotImplementedError(type(model).__name__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# -- copies and pickles -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a pickle of a model holds beside its parameters: artifact, leaf, Newton settings, digests by file."""

    artifact: Path
    device: torch.device
    dtype: torch.dtype
    settings: NewtonSettings | None
    digests: dict[str, str]


@dataclass(frozen=True)
class Origin:
    """The files that a model was loaded from: the SHA-256 of metadata file and packages as they were read."""

    folder: Folder
    metadata: Path
    digests: dict[Path, str]

    @property
    def by_name(self) -> dict[str, str]:
        """The digests by name of file."""
        return {path.name: digest for path, digest in self.digests.items()}

    @property
    def digest(self) -> str:
        """One SHA-256 for all of them."""
        lines = (f"{digest} {name}\n" for name, digest in sorted(self.by_name.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def require_unchanged(self) -> None:
        """Refuse to copy a model whose artifact is no longer there as it was: the copy would be another one."""
        for path, digest in self.digests.items():
            kind = files.METADATA if path == self.metadata else files.PACKAGE
            try:
                same = files.digest_file(path, kind, self.folder.root) == digest
            except (ArtifactError, FileNotFoundError):
                same = False
            if not same:
                raise ArtifactError(
                    f"{path} was changed or removed after the model was loaded, so a copy of the model would be "
                    "another one. Load the model again, then copy or pickle it."
                )

    def require_same(self, recipe: Recipe) -> None:
        """Refuse these files where they are not those of a pickled model."""
        there = self.by_name
        differing = sorted(n for n in recipe.digests.keys() | there.keys() if recipe.digests.get(n) != there.get(n))
        if differing:
            raise ArtifactError(
                f"{recipe.artifact} is not the artifact that the pickled model was made from: {', '.join(differing)} "
                "differ. Put the same artifact there, or load this one anew instead of unpickling."
            )


def origin(place: Place, metadata: Metadata, packages: Iterable[Package]) -> Origin:
    """What a model is made of, once it has been looked over."""
    digests = {place.metadata: metadata.digest, **{package.file: package.digest for package in packages}}
    return Origin(place.folder, place.metadata, digests)
