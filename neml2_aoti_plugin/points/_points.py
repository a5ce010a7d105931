"""`Points`: the integration points of a finite-element program, or of a part of its mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .._checks import require_names, whole_number
from ..errors import AOTIError, InputError, InputTypeError
from ..model import Model, as_model
from . import _state as states
from ._arrays import Array, is_followed, rows_of
from ._evaluation import Evaluator, Part, PointDerivatives, Trial, advanced, attached, parameters_at, step_factor
from ._interface import DIMENSIONS, Dimension, Notation, PointsResult, interface_of, result_of
from ._plane_stress import plane_stress_of
from ._roles import Pair, Tensors, earlier, roles_of
from ._state import PointsState


class Points:
    """The integration points of a finite-element program over a compiled model.

    What the model asks for from earlier steps is kept here: of each output or driven input `x` the values that it takes
    as `x~1`, `x~2`, ... `update` evaluates a step from this state, as often as the program needs; `commit` makes its
    values the state. Until then nothing changes. An update starts where the last one of the same step ended.

    One thread at a time may use an object; for parts of a mesh make one each.

    Args:
        model: the compiled model, or the path of its folder.
        n: number of points.
        notation: how symmetric tensors are written: `mandel`, `(n, 6)` with sqrt(2) on the shears, as the model takes
            them; `voigt`, `(n, 6)` with engineering shears in strains; `tensor`, `(n, 3, 3)`. The order of vectors is
            xx, yy, zz, yz, xz, xy.
        dimension: 3; `plane strain` or `plane stress`, where driven inputs and results have xx, yy, xy, `(n, 3)` or
            `(n, 2, 2)`; `axisymmetric`, where they have rr, zz, tt (hoop), rz, `(n, 4)` or `(n, 3, 3)` with the axes r,
            z, t, which stand in the place of x, y, z. Driven inputs that are no symmetric tensors are given whole.
        pairs: (output, driven input) and (output, promoted parameter) pairs for the tangent; all that were compiled by
            driven inputs if not given.
        history: inputs that are earlier values under other names, as `{"old_stress": "stress~1"}`.
        driven: inputs that are given with each update although their names say otherwise.
        strains: symmetric tensors that Voigt's notation writes as strains; by default those with `strain` in the name.
        stresses: those that it writes as stresses; by default those with `stress` in the name.
        whole: symmetric tensors with all six components in any dimension, such as an eigenstrain.
        stress_strain: the output and the driven input that plane stress is about, where there are several.

    Raises:
        InputError: something does not follow from the model's names and has to be given, or a value is wrong.
        DerivativeNotCompiledError: a derivative in `pairs` was not compiled.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        n: int,
        *,
        notation: Notation = "mandel",
        dimension: Dimension = 3,
        pairs: Sequence[Pair] | None = None,
        history: Mapping[str, str] | None = None,
        driven: Sequence[str] = (),
        strains: Sequence[str] = (),
        stresses: Sequence[str] = (),
        whole: Sequence[str] = (),
        stress_strain: Pair | None = None,
    ) -> None:
        if dimension not in DIMENSIONS:
            raise InputError(f"dimension is {dimension!r}, expected one of {', '.join(map(repr, DIMENSIONS))}.")
        self.model, self.n = as_model(model), whole_number(n, "n")
        self.notation, self.dimension = notation, dimension
        constraint, roles = None, roles_of(self.model, history or {}, driven)
        if dimension == "plane stress":
            constraint = plane_stress_of(self.model, roles.driven, stress_strain, whole)
            # With the strains out of the plane, from which the next step starts.
            strain = constraint.strain
            roles = replace(roles, depth={**roles.depth, strain: roles.depth.get(strain, 1)})
        self._roles, self._kept = roles, roles.kept
        self._derivatives = PointDerivatives(self.model, roles.driven, constraint)
        self.pairs = self._derivatives.of_tangent(pairs)
        self._interface = interface_of(self.model, self.n, roles, notation, dimension, strains, stresses, whole)
        unknowns = tuple(self.model.initial_guesses)
        if not set(unknowns) <= set(self.model.outputs):
            # Guesses of some of the unknowns only would be no iterate of any solve.
            unknowns = ()
        self._evaluator = Evaluator(self.model, roles, (*unknowns, *roles.guesses), constraint)
        self._old: Tensors = {}
        self._trial: Trial | None = None
        self.initial()
        self._begun = not roles.lagged

    def __repr__(self) -> str:
        return f"Points({self.model!r}, {self.n}, notation={self.notation!r}, dimension={self.dimension!r})"

    @property
    def driven(self) -> tuple[str, ...]:
        """The inputs that each update takes."""
        return self._roles.driven

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the values that make up the state, such as `stress~1`."""
        return tuple(self._kept)

    # -- a step -----------------------------------------------------------------------------------------------------

    def initial(self, values: Mapping[str, Array] | None = None, /, **named: Array) -> None:
        """Set the state anew, zero where nothing is given; an update that was not committed is dropped.

        Args:
            values: by name, for names that are no Python identifiers, such as `stress~2`.
            named: of a variable that is kept, `(n, *sub_batch, *base)` or without `n` for all points, in the caller's
                notation and three dimensions. It holds for all steps back, but for those that are given themselves.

        Raises:
            UnknownNameError: a name is not that of a variable that is kept.
            InputError: a shape does not fit, or a value is not finite.
            InputTypeError: a value is no array, or has the wrong dtype or device.
        """
        found: Tensors = {}
        given = {**_mapping(values, "values"), **named}
        require_names(given, (*self._roles.depth, *self._kept), "initial", "values that are kept")
        for name, value in given.items():
            if is_followed(value, repr(name)):
                raise InputError(
                    f"{name!r} requires grad, and the state of Points is part of no graph: pass its detach(), or call "
                    "under torch.no_grad()."
                )
            variable = self._kept.get(name, name)
            found[name] = self._interface.admitted(name, variable, value, whole=True).clone()
            if not bool(found[name].isfinite().all()):
                raise InputError(f"the initial value {name!r} is not finite (NaN or infinite).")
        old: Tensors = {}
        for name, variable in self._kept.items():
            shape = (self.n, *self._roles.natural[variable])
            zero = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
            old[name] = found.get(name, found.get(variable, zero))
        self._old, self._trial, self._begun = old, None, True

    def update(
        self,
        values: Mapping[str, Array] | None = None,
        /,
        *,
        out: Mapping[str | Pair, Array] | None = None,
        tangent: bool = True,
        param_overrides: Mapping[str, Array] | None = None,
        points: Array | slice | None = None,
        **named: Array,
    ) -> PointsResult:
        """Evaluate a step from the state to values of the driven inputs; the state stays as it is.

        With `points` only these are updated: what was given and what is returned has `m` of them for `n`, in their
        order, and the others keep what their last update in this step gave.

        Autograd follows the outputs, in reverse mode, by driven inputs and parameters that require grad; through this
        update alone, since tangent and state are detached.

        Args:
            values: driven inputs by name, for names that are no Python identifiers or those of arguments.
            out: arrays of the caller that results are written to: by output, or by (output, input) for a tangent.
            tangent: whether to evaluate the tangent.
            param_overrides: values of promoted parameters for this update only, `(n, *base)` or, for all points,
                `(*base)`; as the model has them, in Mandel's notation and three dimensions.
            points: those to update, each once: indices, a mask `(n,)` or a slice; all if not given.
            named: driven inputs by name, `(n, *sub_batch, *base)` in the caller's notation and dimension, or without
                `n` for all points; a number for a scalar.

        Returns:
            Outputs and tangent, and how each point fared. Points that fail are NaN, and raise nothing.

        Raises:
            AOTIError: there is no state to step from.
            DerivativeNotCompiledError: in the backward pass, if a gradient needs a derivative that was not compiled.
            UnknownNameError: a driven input is absent, or a name is not that of one, or of a parameter.
            InputError: an array has another shape, is not symmetric, can't be written to, or shares memory with another
                result; or a gradient is asked for that there can't be, with `out`, or where results are NumPy's.
            InputTypeError: an array has another dtype or device, masked entries, or is none.
        """
        given = {**_mapping(values, "values"), **named}
        overrides = _mapping(param_overrides, "param_overrides")
        own = self.model.named_parameters()
        for name, parameter in own.items():
            self._interface.require_parameter(name, parameter)
        if not self._begun:
            raise AOTIError(
                f"these points have no state yet, and the model needs {', '.join(self._roles.lagged)}. Call initial() "
                "first; without arguments all of it is zero."
            )
        kept = {n: f"{n!r} is kept by the points themselves." for n in (*self._roles.lagged, *self._roles.guesses)}
        require_names(given, self.driven, "update", "driven inputs", needed=self.driven, hints=kept)
        require_names(overrides, self.model.parameter_base_shapes, "param_overrides", "promoted parameters")
        part: Part = slice(None)
        interface, parameters = self._interface, Tensors()
        if points is not None:
            part = self._part(points)
            interface, parameters = replace(interface, n=len(part)), parameters_at(self.model, {}, part)
        torch_kind = any(isinstance(value, Tensor) for value in (*given.values(), *overrides.values()))
        every = {**own, **parameters, **overrides, **given}
        followed = {name: value for name, value in every.items() if is_followed(value, repr(name))}
        pairs = evaluated = self.pairs if tangent else ()
        if followed:
            evaluated = tuple(dict.fromkeys((*pairs, *self._derivatives.by(followed))))
            if out or not torch_kind:
                why = (
                    "the arrays of out= are part of no graph: leave out= away"
                    if out
                    else "what was given is of NumPy, and so would be the results: give tensors of torch"
                )
                raise InputError(f"{next(iter(followed))!r} requires grad, and {why}, or call under torch.no_grad().")
        # All that the caller gave is looked over before anything is evaluated.
        driven = {name: interface.admitted(name, name, given[name]) for name in self.driven}
        for name, value in overrides.items():
            parameters[name] = interface.arrays.tensor(value, name)
            interface.require_parameter(name, parameters[name])
        targets = interface.targets({} if out is None else out, self.model.output_names, pairs)
        trial = self._trial or Trial(self.n, self.model.device)
        old = {name: value[part] for name, value in self._old.items()}
        found, driven = self._evaluator.step(driven, old, trial.at(part), evaluated, parameters)
        # Before results are written, which may be over what the caller gave.
        now = {**found.outputs, **driven}
        trial.write(part, {name: now[name] for name in (*self._roles.depth, *self._evaluator.unknowns)}, found)
        self._trial = trial
        results = interface.results(found, evaluated, targets)
        if followed:
            outputs = {name: results[name] for name in found.outputs}
            blocks = {pair: results[pair] for pair in evaluated if pair[1] in followed}
            results.update(attached(outputs, blocks, followed, interface.one, self._derivatives.require))
        refuse = partial(self._derivatives.require_evaluated, pairs if tangent else None)
        factor = step_factor(trial.hardest, failed=bool(trial.failed.any()))
        return result_of(results, found, pairs, factor, refuse, torch_kind=torch_kind)

    def commit(self, keep: Array | None = None) -> None:
        """Make the values of the last update the state.

        Args:
            keep: the points to do it for, a mask `(n,)`, indices or a slice; the others stay where they are. All if not
                given.

        Raises:
            AOTIError: a point that is to be kept was not updated since the last commit, or has failed in its update.
            InputError: `keep` is no mask, indices or slice of points.
        """
        trial, mask = self._require_trial("commit"), None
        if keep is not None:
            mask = torch.zeros_like(trial.updated)
            mask[rows_of(keep, self.n, "keep").to(mask.device)] = True
        # What was not updated yet is NaN as well.
        given = [name for name in self.driven if name in trial.values and bool(trial.updated.all())]
        lost = [repr(name) for name in given if not bool(trial.values[name].isfinite().all())]
        step = f"give finite values of {', '.join(lost)}" if lost else "take a smaller step"
        failed = "failed in the last update", f"revert() and {step}, or commit(result.converged)"
        absent = "were not updated since the last commit", "update(..., points=...) for them, or commit(keep)"
        for out, (what, cure) in ((trial.failed, failed), (~trial.updated, absent)):
            rows = (out if mask is None else mask & out).nonzero().squeeze(-1).tolist()
            if rows:
                shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
                raise AOTIError(
                    f"{len(rows)} of {self.n} points {what} and can't be committed: {shown}. Call {cure} for the "
                    "others alone."
                )
        self._old, self._trial = advanced(self._roles, self._old, trial.values, mask), None

    def revert(self) -> None:
        """Drop what was updated since the last commit; the next update starts where the model itself starts."""
        self._trial = None

    # -- the state --------------------------------------------------------------------------------------------------

    def committed(self, name: str, steps: int = 1) -> Array:
        """A variable's value in the state, in the caller's notation and three dimensions.

        Args:
            name: of a variable that is kept.
            steps: how many steps back; 1 is what was committed last.

        Returns:
            A copy, an array of NumPy `(n, *sub_batch, *base)`.

        Raises:
            UnknownNameError: that value is not kept.
        """
        require_names([earlier(name, steps)], self._old, "committed", "values that are kept")
        return self._shown(name, self._old[earlier(name, steps)])

    def trial(self, name: str) -> Array:
        """A variable's value in the last update, in the caller's notation and three dimensions.

        So come the strains out of the plane in plane stress, and in plane strain the stresses, if the model keeps them.

        Args:
            name: of a variable that is kept.

        Returns:
            A copy, an array of NumPy `(n, *sub_batch, *base)`; NaN at points that failed or were not updated.

        Raises:
            AOTIError: there is no update since the last commit.
            UnknownNameError: the variable is not kept.
        """
        values = self._require_trial("trial").values
        require_names([name], values, "trial", "variables that are kept")
        return self._shown(name, values[name])

    def state(self) -> PointsState:
        """The committed state, as a value of its own."""
        roles, values = self._roles, {name: value.clone() for name, value in self._old.items()}
        axes = {name: states.axes_of(roles.natural[of], roles.bases[of]) for name, of in self._kept.items()}
        return PointsState(values, self.model.digest, self.n, axes)

    def restore(self, state: PointsState, *, other_artifact: bool = False) -> None:
        """Go back to a state; an update that was not committed is dropped.

        Args:
            state: that `state` gave.
            other_artifact: whether it may be that of another artifact with the same variables.

        Raises:
            InputError: it is a state of other points or of another artifact, or not finite.
        """
        if not isinstance(state, PointsState):
            raise InputTypeError(f"the state is a {type(state).__name__}, expected what Points.state() gives.")
        shapes = {name: tuple(value.shape) for name, value in state.values.items()}
        self._require_fitting(state.digest, state.n, shapes, other_artifact=other_artifact)
        state.require_finite()
        dtype, device = self.model.dtype, self.model.device
        self._old = {name: state.values[name].to(device, dtype, copy=True) for name in self._kept}
        self._trial, self._begun = None, True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the committed state to a file, without pickle; a file that is there is replaced as a whole.

        Args:
            path: of the file: `.safetensors`, or any other ending, as a rule `.npz`, for NumPy's form.

        Raises:
            InputError: the file cannot be written.
        """
        self.state().save(path)

    def load(self, path: str | os.PathLike[str], *, other_artifact: bool = False) -> None:
        """Go back to a state that `save` wrote.

        Args:
            path: of the file.
            other_artifact: as for `restore`.

        Raises:
            InputError: the file is absent, damaged or another one; or as for `restore`.
        """
        require_fitting = partial(self._require_fitting, other_artifact=other_artifact)
        self.restore(states.load(path, require_fitting), other_artifact=other_artifact)

    # -- checks -----------------------------------------------------------------------------------------------------

    def _require_fitting(self, digest: str, n: int, shapes: states.Shapes, *, other_artifact: bool) -> None:
        """Refuse a state of another artifact, of another number of points, or of other values."""
        if n != self.n:
            raise InputError(f"the state is one of {n} points, expected {self.n}.")
        require_names(shapes, self._kept, "the state", "values that this model keeps", needed=self._kept)
        for name, variable in self._kept.items():
            wanted = (n, *self._roles.natural[variable])
            if shapes[name] != wanted:
                raise InputError(f"the state's {name!r} has shape {shapes[name]}, expected {wanted}.")
        if digest != self.model.digest and not other_artifact:
            raise InputError(
                f"the state is one of another artifact (digest {digest[:12]}..., here {self.model.digest[:12]}...). If "
                "it was compiled anew from the same model, pass other_artifact=True."
            )

    def _shown(self, name: str, value: Tensor) -> Array:
        """A copy of a variable's value in the caller's notation, in three dimensions."""
        return self._interface.whole[name].outward(value).cpu().numpy().copy()

    def _part(self, points: Array | slice) -> Tensor:
        part = rows_of(points, self.n, "points")
        if len(part.unique()) < len(part):
            raise InputError("points holds a point twice, whose last update would be either of two.")
        return part.to(self.model.device)

    def _require_trial(self, call: str) -> Trial:
        if self._trial is None:
            raise AOTIError(f"{call}: there is no update since the last commit or revert; call update first.")
        return self._trial


def _mapping(values: Mapping[str, Array] | None, what: str) -> Mapping[str, Array]:
    """What was given by name, if anything was."""
    if values is not None and not isinstance(values, Mapping):
        raise InputTypeError(f"{what} are a {type(values).__name__}, expected a dict by name.")
    return values or {}
