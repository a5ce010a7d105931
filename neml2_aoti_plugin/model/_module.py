"""What `Model` and `AOTIModel` are as torch modules: their parameters, `to()`, copies and pickles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..errors import AOTIError, InputError
from ._promoted import PromotedParameters
from ._shown import USEFUL, Concise

P = ParamSpec("P")
R = TypeVar("R")


def public(call: Callable[P, R]) -> Callable[P, R]:
    """A call that users make, guarded against where it cannot be made.

    `torch.compile` does not look into it: it breaks its graph there and runs the call as it is. That is what
    `torch.compiler.disable` does, but it is asked for only where torch compiles, since it imports the whole compiler.

    While the interpreter ends, the call is refused: torch aborts the process if the last name of a tensor goes while a
    view of it is left, as happens in most calls.
    """
    ends = sys.is_finalizing

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            found: R = torch.compiler.disable(call)(*args, **kwargs)
            return found
        if ends():
            raise AOTIError(
                "a compiled model was called while the interpreter ends, as from a finalizer (__del__) of what is left "
                "over. torch cannot be used then. Call it before: in a with block, or by atexit.register."
            )
        return call(*args, **kwargs)

    # torch compiles a code object a few times, and then looks into what it calls: each call has its own.
    run.__code__ = run.__code__.replace(co_name=call.__name__)
    return wraps(call)(run)


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

    @overload  # type: ignore[override]
    def named_parameters(
        self, prefix: None = None, recurse: None = None, remove_duplicate: None = None
    ) -> dict[str, nn.Parameter]: ...

    @overload
    def named_parameters(
        self, prefix: str, recurse: bool | None = None, remove_duplicate: bool | None = None
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    @overload
    def named_parameters(
        self, prefix: str | None = None, *, recurse: bool, remove_duplicate: bool | None = None
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    @overload
    def named_parameters(
        self, prefix: str | None = None, recurse: bool | None = None, *, remove_duplicate: bool
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
