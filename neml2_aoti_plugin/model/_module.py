"""What `Model` and `AOTIModel` are as torch modules: parameters, `to()`, copies and pickles, and what `help` shows."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from .._artifact import files
from .._artifact.compatibility import check
from .._artifact.decode import read_metadata
from .._artifact.files import Folder
from .._artifact.kinship import kinship
from .._artifact.locate import absolute, locate
from .._artifact.stub import is_input_file, model_in
from .._checks import first_line
from ..errors import ArtifactError, InputError, UnknownNameError
from ..settings import NewtonSettings, changed_settings, newton_settings
from ._admission import callers_level
from ._call import Caller

MODE = "NEML2_AOTI_PLUGIN_MODE"
MODES = ("rowwise", "lockstep")

# Attributes that `_load` makes, and no pickle holds; and where a pickle has what is to be loaded.
_LOADED = frozenset({"artifact", "inputs", "outputs", "initial_guesses", "_caller", "_origin"})
_LEAF = "_leaf"

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
        *("input_names", "output_names", "input_base_shapes", "output_base_shapes", "extra_repr", "require_pairs"),
    }
)


class Concise(ABCMeta):
    """Of a class whose `dir`, and so `help`, leaves out what it has from `torch.nn.Module` and for neml2.

    It derives from `ABCMeta`, so that a class may derive from a compiled model and from an abstract class.
    """

    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
        names = {name for base in own for name in vars(base)}
        return sorted(name for name in names if not name.startswith("_") and name not in INTERNAL)


class CompiledModule(nn.Module, metaclass=Concise):
    """A leaf of an artifact as a torch module, whose parameters are the promoted ones.

    They are frozen until `requires_grad_()` is called, so that a call costs nothing for derivatives that nobody wants.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        mode: str | None = None,
        solver: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode or os.environ.get(MODE) or MODES[0]
        if self.mode not in MODES:
            source = "mode" if mode else f"the environment variable {MODE}"
            raise InputError(f"{source} is {self.mode!r}, expected one of {', '.join(MODES)}.")
        self._given = absolute(artifact)
        self._solver = dict(solver) if solver else None
        from_stub = is_input_file(self._given)
        if from_stub:
            _, stub = model_in(self._given, name)
            self._given, self._solver = stub.artifact, {**(stub.solver or {}), **(solver or {})} or None
        self._load(device, dtype)
        model = self._caller.boundary.model
        if name is not None and not from_stub and name != model:
            raise UnknownNameError(f"{self._given} holds the model {model!r}, not {name!r}.")
        _let_dask_pickle(type(self))

    def _load(
        self,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        settings: NewtonSettings | None = None,
        same_as: Mapping[str, str] | None = None,
    ) -> None:
        """Load a leaf, of an artifact with the digests `same_as`; the promoted parameters stay what they are."""
        place = locate(self._given, device, dtype)
        checked = check(read_metadata(place, solver=self._solver), place)
        metadata, packages = checked.metadata, checked.packages
        kin = kinship(metadata, place)
        if kin.fault:
            raise ArtifactError(kin.fault)
        if kin.doubt:
            warnings.warn(kin.doubt, UserWarning, stacklevel=callers_level())
        digests = {package.file: package.digest for package in packages.values()}
        origin = Origin(place.folder, place.metadata, {place.metadata: metadata.digest, **digests})
        if same_as is not None:
            origin.require_same(same_as, self._given)
        self._caller = Caller(metadata, place, packages, self, lockstep=self.mode == "lockstep")
        self._caller.settings = settings
        self._origin = origin
        self.artifact = place.metadata.parent
        boundary = self._caller.boundary
        self.inputs = {name: replace(variable, name=name) for name, variable in boundary.inputs.items()}
        self.outputs = {name: replace(variable, name=name) for name, variable in boundary.outputs.items()}
        self.initial_guesses = {name: replace(variable, name=name) for name, variable in boundary.guesses.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What travels: where the artifact is, which leaf, the options and the parameters; not what was loaded."""
        _let_dask_pickle(type(self))
        self._origin.require_unchanged()
        state = {name: value for name, value in self.__dict__.items() if name not in _LOADED}
        return {**state, _LEAF: (self.device, self.dtype, self._caller.settings, self._origin.by_name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the leaf anew, if the artifact is the same."""
        _let_dask_pickle(type(self))
        super().__setstate__({name: value for name, value in state.items() if name != _LEAF})  # type: ignore[no-untyped-call]
        self._load(*state[_LEAF])

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *USEFUL})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """What `repr` tells of a model."""
        leaf = f"{self.device}/{str(self.dtype).removeprefix('torch.')}"
        return f"{str(self.artifact)!r}, {leaf}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}"

    # -- what the model is ------------------------------------------------------------------------------------------

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in the model's order."""
        return list(self.inputs)

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in the model's order."""
        return list(self.outputs)

    @property
    def input_base_shapes(self) -> list[list[int]]:
        """Base shape of each input, in the order of `input_names`."""
        return [list(variable.base_shape) for variable in self.inputs.values()]

    @property
    def output_base_shapes(self) -> list[list[int]]:
        """Base shape of each output, in the order of `output_names`."""
        return [list(variable.base_shape) for variable in self.outputs.values()]

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return self._caller.boundary.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs."""
        return self._caller.boundary.dtype

    @property
    def digest(self) -> str:
        """SHA-256 of the artifact's files as they were loaded, of metadata and graphs together."""
        return self._origin.digest

    @property
    def derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, input) pairs whose derivatives were compiled."""
        return [(out, name) for out, (_, name) in self._caller.derivatives.by("input")]

    @property
    def parameter_derivative_pairs(self) -> list[tuple[str, str]]:
        """The (output, parameter) pairs whose derivatives were compiled."""
        return [(out, name) for out, (_, name) in self._caller.derivatives.by("parameter")]

    def require_pairs(self, pairs: Sequence[tuple[str, str]] | None = None) -> None:
        """Raise what `Model.solve` raises where one of the pairs was not compiled, or, if None, where none was."""
        self._caller.derivatives.chosen(pairs, or_parameters=True)

    # -- parameters -------------------------------------------------------------------------------------------------

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
            return dict(self._caller.promoted.values)
        return super().named_parameters(
            prefix or "", recurse is None or recurse, remove_duplicate is None or remove_duplicate
        )

    @property
    def parameter_base_shapes(self) -> dict[str, list[int]]:
        """Base shape of each promoted parameter."""
        return {name: list(spec.base_shape) for name, spec in self._caller.promoted.specs.items()}

    def set_parameter(self, name: str, value: Tensor | float) -> None:
        """Set a promoted parameter to a tensor `(*batch, *base)`, or to a number for all its entries.

        In place where the shape is the same, else by a new parameter.
        """
        self._caller.promoted.set(name, value)

    def save_parameters(self, path: str | os.PathLike[str]) -> None:
        """Write the promoted parameters to a safetensors file, which `Model(..., parameters=path)` takes."""
        self._caller.promoted.save(Path(path))

    def load_parameters(self, path: str | os.PathLike[str], *, same_artifact: bool = True) -> None:
        """Set the promoted parameters to the values in a file that `save_parameters` wrote.

        It must have been written for this artifact: one with the same metadata, for whatever device, dtype and machine;
        or, unless `same_artifact`, for one whose parameters have the same names and shapes. Else it is an `InputError`.
        """
        self._caller.promoted.load(path, same_artifact=same_artifact)

    # -- solver settings --------------------------------------------------------------------------------------------

    @property
    def solver(self) -> NewtonSettings | None:
        """Newton settings in force, of the first implicit segment if they differ; None without implicit segments."""
        segments = self._caller.program.implicit
        return self._caller.settings or segments[0].spec.newton if segments else None

    def set_solver(self, **settings: Any) -> None:
        """Change some Newton settings of all implicit segments, as in `set_solver(atol=1e-8)`; the others stay.

        They are atol, rtol, miters (one more than the updates allowed), ls_type, ls_max_iters (one more than the trials
        allowed; 1 is no line search), ls_cutback, ls_c, substep_del_tol and chord_steps; see `NewtonSettings`.
        """
        self._caller.settings = changed_settings(self.solver, settings, str(self.artifact))

    def set_solver_config(
        self,
        atol: float,
        rtol: float,
        miters: int,
        ls_type: str,
        ls_max_iters: int,
        ls_cutback: float,
        ls_c: float,
        substep_del_tol: float = 1e-6,
    ) -> None:
        """Replace all Newton settings that neml2's C++ runtime has; `set_solver` takes them one by one."""
        given = dict(atol=atol, rtol=rtol, miters=miters, ls_type=ls_type, ls_max_iters=ls_max_iters)
        given |= dict(ls_cutback=ls_cutback, ls_c=ls_c, substep_del_tol=substep_del_tol)
        present = self.solver
        chord_steps = present is None or present.chord_steps
        self._caller.settings = newton_settings(**given, chord_steps=chord_steps)

    # -- other leaves -----------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Take part in `to()`, `float()`, `cuda()` and their like: by another compiled leaf, or not at all.

        Raises:
            ArtifactNotFoundError: nothing was compiled for that device and dtype.
            InputError: torch has no such device here.
        """
        try:
            probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            # What torch says where there is no such device is of several types, and of torch only.
            raise InputError(
                f"torch cannot move a tensor to where this model was asked to go: {first_line(error).rstrip('.')}. It "
                f"stays on {self.device}. Choose a device that is there; torch.cuda.is_available() is "
                f"{torch.cuda.is_available()}."
            ) from error
        if probe.dtype != self.dtype or probe.device != torch.empty(0, device=self.device).device:
            self._load(probe.device, probe.dtype, self._caller.settings)
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
                same = files.read_file(path, kind, self.folder.root).digest == digest
            except (ArtifactError, FileNotFoundError):
                same = False
            if not same:
                raise ArtifactError(
                    f"{path} was changed or removed after the model was loaded, so a copy of the model would be "
                    "another one. Load the model again, then copy or pickle it."
                )

    def require_same(self, digests: Mapping[str, str], artifact: Path) -> None:
        """Refuse these files, found at `artifact`, where they are not those of a pickled model."""
        there = self.by_name
        differing = sorted(n for n in digests.keys() | there.keys() if digests.get(n) != there.get(n))
        if differing:
            raise ArtifactError(
                f"{artifact} is not the artifact that the pickled model was made from: {', '.join(differing)} "
                "differ. Put the same artifact there, or load this one anew instead of unpickling."
            )
