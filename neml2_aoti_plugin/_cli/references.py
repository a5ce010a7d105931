"""What `verify` holds a compiled model against: its source, finite differences, and what was recorded earlier."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._artifact.locate import artifact_at
from .._artifact.schema import Aliases
from .._artifact.stub import AOTI_MODEL, parse_input
from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import AOTIError, InputError
from ..model import Model
from .output import in_one_line, waits_for
from .points import SCALE, ChosenPoints, EvaluatedPoints, Pair, Tensors, defaults, largest, scale_of
from .target import Target, require_block

# What to give where another file was given.
SOURCE = "the input file that was compiled"
GOLDEN = "golden 1"
GOLDEN_FILE = "a golden file (neml2-aoti verify --record)"
# Of the steps, the larger is this part of the input's largest entry, and the other one half of it.
STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}
# Two estimates, or slopes from both sides, that differ by more than this part of the largest entry are not of one
# derivative.
AGREE = 1e-3


@dataclass(frozen=True)
class Reference:
    """Values and derivatives that those of a model are compared with, at the same rows."""

    kind: str
    outputs: Tensors
    blocks: dict[Pair, Tensor]
    # Of differences, the rows in which both steps gave the same derivative, from both sides, bool.
    smooth: dict[Pair, Tensor] = field(default_factory=dict)
    # Why there is no derivative of a pair.
    missing: dict[Pair, str] = field(default_factory=dict)


# -- the source --------------------------------------------------------------------------------------------------------


class EagerSource:
    """The eager model that a compiled one was made from, in an input file; its names are those at the boundary."""

    def __init__(self, path: Path, name: str, compiled: Model, aliases: Aliases) -> None:
        where = f"[Models/{name}] in {path}"
        block = require_block(parse_input(path, what=SOURCE), "Models", name, path)
        if block.param_optional_str("type", "") == AOTI_MODEL:
            raise InputError(f"{where} is compiled itself. Give {SOURCE}.")
        waits_for(f"loading {path}")
        import neml2
        from neml2.models.common.ImplicitUpdate import ImplicitUpdate

        try:
            with defaults(None, "float64"):
                model: Any = neml2.load_input(path).get_model(name)
        except AOTIError:
            raise
        except Exception as error:
            raise InputError(f"{where}: {in_one_line(error)}") from error
        # It solves to its absolute tolerance, and is not content with a relative one.
        for update in (module for module in model.modules() if isinstance(module, ImplicitUpdate)):
            update.solver.atol *= 0.1
            update.solver.rtol = 0.0
        self._model, self._compiled, self._where = model, compiled, where
        # The names in the input file by those at the boundary.
        authored = {new: old for old, new in {**aliases.inputs, **aliases.outputs}.items()}
        self._inputs = {name: authored.get(name, name) for name in compiled.inputs}
        self._outputs = {name: authored.get(name, name) for name in compiled.outputs}
        self._parameters = {new: old for old, new in aliases.parameters.items()}
        strange = [n for n in model.input_spec if n not in self._inputs.values()]
        strange += [n for n in self._outputs.values() if n not in model.output_spec]
        if strange:
            raise InputError(
                f"{where} is not what was compiled: {', '.join(strange)} differ(s). It takes "
                f"{', '.join(model.input_spec)} and gives {', '.join(model.output_spec)}."
            )

    def reference(self, inputs: Mapping[str, Tensor], pairs: Collection[Pair]) -> Reference:
        """Values, which may have no axis of rows, and derivatives, for inputs `(rows, *sub_batch, *base)`.

        Pairs with an input that has a sub-batch are left out: neml2 and compiled models have blocks of other forms for
        them.
        """
        given = {inside: (inputs[name], self._compiled.inputs[name]) for name, inside in self._inputs.items()}
        typed = {
            name: wrapper(given[name][0].cpu().double(), sub_batch_ndim=len(given[name][1].sub_batch_shape))
            for name, wrapper in self._model.input_spec.items()
        }
        try:
            outputs = {name: value.detach() for name, value in self._values(typed).items()}
        except Exception as error:
            raise InputError(
                f"{self._where}: the source model itself fails at these points ({in_one_line(error)}). Give others "
                "(--points FILE, --driver NAME, or --scale NAME=VALUE)."
            ) from error
        variables = self._compiled.inputs
        by_inputs = [pair for pair in pairs if pair[1] in variables and not variables[pair[1]].sub_batch_shape]
        by_parameters = [pair for pair in pairs if pair[1] not in variables]
        blocks: dict[Pair, Tensor] = {}
        missing: dict[Pair, str] = {}
        for wanted, take in ((by_inputs, self._by_inputs), (by_parameters, self._by_parameters)):
            try:
                found, cannot = take(typed, wanted)
            except Exception as error:
                found, cannot = {}, dict.fromkeys(wanted, f"it fails ({in_one_line(error)})")
            blocks |= found
            missing |= cannot
        return Reference("source", outputs, blocks, missing=missing)

    def _by_inputs(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> tuple[dict[Pair, Tensor], dict[Pair, str]]:
        """One direction at a time: neml2's `jacobian` takes no sub-batch, and no output that depends on no input."""
        found: dict[Pair, Tensor] = {}
        for by in dict.fromkeys(by for _, by in pairs):
            name, base = self._inputs[by], tuple(self._compiled.inputs[by].base_shape)
            value, columns = typed[name].data, []
            for direction in torch.eye(prod(base), dtype=torch.float64).reshape((-1, *base)):
                _, along = self._model.jvp(typed, {name: direction.expand(value.shape).contiguous()})
                columns.append(along)
            for out in (out for out, of in pairs if of == by):
                stacked = torch.stack([along[self._outputs[out]].data.detach() for along in columns], -1)
                found[out, by] = stacked.reshape((*stacked.shape[:-1], *base))
        return found, {}

    def _by_parameters(
        self, typed: dict[str, Any], pairs: Sequence[Pair]
    ) -> tuple[dict[Pair, Tensor], dict[Pair, str]]:
        """One output at a time: neml2's `param_jacobian` gives none where one output depends on no parameter."""
        present = dict(self._model.named_parameters())
        rows = next(iter(typed.values())).data.shape[0]
        leaves: Tensors = {}
        stand_ins: Tensors = {}
        for by in dict.fromkeys(by for _, by in pairs):
            name = self._parameters.get(by, by)
            # A lone model is not named in the names of its own parameters.
            for own in (name, name.partition(".")[2]):
                if own in present and by not in leaves:
                    # A value for each row, so that the derivatives of the rows are not added up.
                    wide = present[own].detach().expand(rows, *self._compiled.parameter_base_shapes[by])
                    leaves[by] = stand_ins[f"model.{own}"] = wide.clone().requires_grad_()
        found: dict[Pair, Tensor] = {}
        missing = {pair: "it has no parameter of that name" for pair in pairs if pair[1] not in leaves}

        def differentiate() -> None:
            values = self._values(typed)
            for out in dict.fromkeys(out for out, by in pairs if by in leaves):
                bys = [by for o, by in pairs if o == out and by in leaves]
                try:
                    gradients = _gradients(values[out], [leaves[by] for by in bys])
                    found.update({(out, by): block for by, block in zip(bys, gradients, strict=True)})
                except Exception as error:
                    missing.update({(out, by): f"it fails ({in_one_line(error)})" for by in bys})

        if leaves:
            # neml2 reads the parameters again on the way back through an implicit update, so all is done inside.
            torch.func.functional_call(_Within(self._model), stand_ins, (differentiate,))
        return found, missing

    def _values(self, typed: Mapping[str, Any]) -> Tensors:
        """The outputs by their names at the boundary."""
        found = self._model(*typed.values())
        values = dict(zip(self._model.output_spec, found if isinstance(found, tuple) else (found,), strict=True))
        return {name: values[inside].data for name, inside in self._outputs.items()}


class _Within(nn.Module):
    """A model, and work to do while `functional_call` has its parameters exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        work()


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of an output by parameters with a value for each row; zero where it does not depend on one."""
    rows = leaves[0].shape[0]
    columns = []
    for entry in value.expand(rows, *value.shape[1:]).reshape(rows, -1).unbind(1):
        given: Sequence[Tensor | None] = (None,) * len(leaves)
        if entry.requires_grad:
            given = torch.autograd.grad(entry.sum(), leaves, retain_graph=True, allow_unused=True)
        columns.append([torch.zeros_like(by) if g is None else g for by, g in zip(leaves, given, strict=True)])
    return [
        torch.stack(entries, 1).reshape((rows, *value.shape[1:], *by.shape[1:]))
        for by, entries in zip(leaves, zip(*columns, strict=True), strict=True)
    ]


# -- finite differences ------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A derivative by differences, `(rows, *out_base, *by_base)`, and in which rows it is one; see `Reference`."""

    block: Tensor
    smooth: Tensor


def differences(model: Model, found: EvaluatedPoints, pairs: Iterable[Pair]) -> Reference:
    """Derivatives by finite differences, where these can be taken."""
    blocks: dict[Pair, Tensor] = {}
    smooth: dict[Pair, Tensor] = {}
    missing: dict[Pair, str] = {}
    outs_by: dict[str, list[str]] = {}
    for out, by in pairs:
        variable = model.inputs.get(by)
        if model.outputs[out].sub_batch_shape or (variable is not None and variable.sub_batch_shape):
            missing[out, by] = "differences of a sub-batch are not taken"
        elif variable is None and found.parameters[by].ndim > len(model.parameter_base_shapes[by]):
            missing[out, by] = "differences of a parameter with a batch are not taken"
        else:
            outs_by.setdefault(by, []).append(out)
    for by, outs in outs_by.items():
        for out, taken in _differentiate(model, found.points.inputs, by, outs).items():
            blocks[out, by], smooth[out, by] = taken
    return Reference("differences", {}, blocks, smooth, missing)


def _differentiate(model: Model, inputs: Mapping[str, Tensor], by: str, outs: Sequence[str]) -> dict[str, Difference]:
    """Derivatives of outputs, at inputs `(rows, *base)`, by one input, or by one parameter that has no batch."""
    is_input = by in model.inputs
    base = tuple(model.inputs[by].base_shape if is_input else model.parameter_base_shapes[by])
    rows = next(iter(inputs.values())).shape[0]
    value = inputs[by] if is_input else model.named_parameters()[by].detach().expand(rows, *base)

    def evaluate(moved: Tensor, times: int) -> tuple[Tensors, Tensor]:
        repeated = {n: x.repeat(times, *(1,) * (x.ndim - 1)) for n, x in inputs.items() if n != by}
        found = model.solve({**repeated, by: moved}) if is_input else model.solve(repeated, {by: moved})
        return found.outputs, found.converged

    return central(value, base, outs, evaluate)


def central(
    value: Tensor,
    base: tuple[int, ...],
    outs: Sequence[str],
    evaluate: Callable[[Tensor, int], tuple[Tensors, Tensor]],
) -> dict[str, Difference]:
    """Derivatives by all entries of `value`, `(rows, *base)`, from two steps to both sides.

    `evaluate` gives the outputs, and whether each row converged, for the value moved and repeated so many times.
    """
    rows, width = value.shape[0], prod(base)
    step = STEPS[value.dtype] * (largest(value) or SCALE)
    steps = step * torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=value.dtype, device=value.device)
    directions = torch.eye(width, dtype=value.dtype, device=value.device).reshape(width, *base)
    moves = steps.reshape(4, 1, 1, *(1,) * len(base)) * directions.unsqueeze(1)
    moved = (value + moves).reshape(4 * width * rows, *base)
    values, converged = evaluate(moved, 4 * width)
    middle, stays = evaluate(value, 1)
    whole = converged.reshape(4 * width, rows).all(0) & stays
    found = {}
    for out in outs:
        shape = tuple(values[out].shape[1:])
        far, back, near, nearer = values[out].reshape(4, width, rows, prod(shape)).to(torch.float64)
        coarse, fine = (far - back) / (2 * steps[0]), (near - nearer) / (2 * steps[2])
        # The error of a central difference goes with the square of its step.
        best = (4 * fine - coarse) / 3
        scale = scale_of(best[:, whole], middle[out][whole], value)
        # The slopes from both sides differ by an amount that goes with the step, unless there is a kink.
        between = middle[out].reshape(rows, prod(shape)).to(torch.float64)
        jump = 2 * (near + nearer - 2 * between) / steps[2] - (far + back - 2 * between) / steps[0]
        apart = torch.maximum((fine - coarse).abs(), jump.abs()).amax((0, 2))
        smooth = whole & (apart <= AGREE * scale)
        block = best.permute(1, 2, 0).reshape(rows, *shape, *base)
        found[out] = Difference(block, smooth)
    return found


# -- golden files ------------------------------------------------------------------------------------------------------


def golden_beside(target: Target) -> Path | None:
    """The golden file beside an artifact, if there is one, by which it is compared where none is named."""
    root = artifact_at(target.artifact).root
    found = root.with_name(f"{root.name}.golden.safetensors")
    return found if found.is_file() else None


def write_golden(path: Path, model: str, digest: str, found: EvaluatedPoints) -> None:
    """Write what a model of that name gave, whose metadata has that SHA-256."""
    tensors = {f"input.{name}": value for name, value in found.points.inputs.items()}
    tensors |= {f"output.{name}": value for name, value in found.outputs.items()}
    tensors |= {f"derivative.{number}": block for number, block in enumerate(found.blocks.values())}
    notes = {"model": model, "metadata_sha256": digest, "derivatives": json.dumps(list(found.blocks))}
    write_tensors(path, GOLDEN, tensors, notes)


def read_golden(path: Path, model: Model, name: str) -> EvaluatedPoints:
    """Read a golden file of the model of that name."""
    pairs: list[tuple[str, str]] = []

    def check(header: Header) -> Iterable[str]:
        header.require_kind(GOLDEN, GOLDEN_FILE)
        other = f"{path}: is of another model ({header.notes.get('model')!r})"
        known = {f"{kind}.{n}": v.natural_shape for kind, of in variables.items() for n, v in of.items()}
        blocks = {name for name in header.claims if name.startswith("derivative.")}
        differing = sorted(name.partition(".")[2] for name in (header.claims.keys() - blocks) ^ known.keys())
        if differing:
            raise InputError(
                f"{other}, not of {name!r}: {', '.join(differing)} are not in both. Give the golden file of this model."
            )
        pairs.extend((str(out), str(by)) for out, by in json.loads(header.notes.get("derivatives", "[]")))
        if not set(pairs) <= set(there) or blocks != {f"derivative.{number}" for number in range(len(pairs))}:
            raise InputError(f"{other}: it holds the derivatives {pairs}, in {name!r} there are: {there or 'none'}.")
        rows = {claim.shape[:1] for claim in header.claims.values()}
        if len(rows) != 1 or rows & {(), (0,)}:
            raise InputError(f"{path}: its tensors have different numbers of rows, or none. Give another golden file.")
        for of, natural in known.items():
            shape = header.claims[of].shape
            # Artifacts do not record the sites of outputs.
            if shape[len(shape) - len(natural) :] != natural:
                raise InputError(f"{other}: {of!r} has shape {shape[1:]} a row, in {name!r} it is {natural}.")
        return header.claims

    variables = {"input": model.inputs, "output": model.outputs}
    there = [*model.derivative_pairs, *model.parameter_derivative_pairs]
    found = read_tensors(path, GOLDEN_FILE, check)
    inputs, outputs = ({name: found[f"{kind}.{name}"] for name in of} for kind, of in variables.items())
    blocks = {pair: found[f"derivative.{number}"] for number, pair in enumerate(pairs)}
    return EvaluatedPoints(ChosenPoints({n: v.to(model.dtype) for n, v in inputs.items()}, path.name), outputs, blocks)
