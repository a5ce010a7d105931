"""What `verify` holds a compiled model against: its source, finite differences, and what was recorded earlier."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._artifact.locate import artifact_at
from .._artifact.schema import Aliases
from .._artifact.stub import AOTI_MODEL, parse_input
from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import AOTIError, InputError
from ..model import Model
from .output import first_line, waits_for
from .points import SCALE, Blocks, Evaluated, Pair, Points, Tensors, defaults, largest, scale_of
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


# -- the source --------------------------------------------------------------------------------------------------------


class Source:
    """The eager model that a compiled one was made from, in an input file; its names are those at the boundary."""

    def __init__(self, path: Path, name: str, compiled: Model, aliases: Aliases) -> None:
        block = require_block(parse_input(path, what=SOURCE), "Models", name, path)
        if block.param_optional_str("type", "") == AOTI_MODEL:
            raise InputError(f"[Models/{name}] in {path} is compiled itself. Give {SOURCE}.")
        waits_for(f"loading {path}")
        import neml2
        from neml2.models.common.ImplicitUpdate import ImplicitUpdate

        try:
            with defaults(None, "float64"):
                self._model: Any = neml2.load_input(path).get_model(name)
        except AOTIError:
            raise
        except Exception as error:
            raise InputError(f"[Models/{name}] in {path}: {first_line(error)}") from error
        self._compiled, self._aliases, self._where = compiled, aliases, f"[Models/{name}] in {path}"
        self._inside = {new: old for old, new in {**aliases.inputs, **aliases.outputs}.items()}
        # It solves to its absolute tolerance, and is not content with a relative one.
        for update in (module for module in self._model.modules() if isinstance(module, ImplicitUpdate)):
            update.solver.atol *= 0.1
            update.solver.rtol = 0.0
        spec, inputs = self._model.input_spec, [self._inside.get(name, name) for name in compiled.inputs]
        outputs = [self._inside.get(name, name) for name in compiled.outputs]
        strange = [n for n in spec if n not in inputs] + [n for n in outputs if n not in self._model.output_spec]
        if strange:
            raise InputError(
                f"[Models/{name}] in {path} is not what was compiled: {', '.join(strange)} differ(s). It takes "
                f"{', '.join(spec)} and gives {', '.join(self._model.output_spec)}."
            )

    def outputs(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Values for inputs `(rows, *sub_batch, *base)`; some may have no axis of rows."""
        try:
            found = self._model(*self._typed(inputs).values())
        except Exception as error:
            raise InputError(
                f"{self._where}: the source model itself fails at these points ({first_line(error)}). Give others "
                "(--points FILE, --driver NAME, or --scale NAME=VALUE)."
            ) from error
        values = dict(zip(self._model.output_spec, found if isinstance(found, tuple) else (found,), strict=True))
        return {name: values[self._inside.get(name, name)].data.detach() for name in self._compiled.outputs}

    def blocks(self, inputs: Mapping[str, Tensor], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        """Derivatives by inputs and parameters, and for the pairs that the eager model gives none of, why.

        Pairs with an input that has a sub-batch are in neither: neml2 and compiled models have blocks of other forms
        for them.
        """
        by_inputs = [
            (o, i) for o, i in pairs if i in self._compiled.inputs and not self._compiled.inputs[i].sub_batch_shape
        ]
        by_parameters = [pair for pair in pairs if pair[1] not in self._compiled.inputs]
        found: Blocks = {}
        missing: dict[Pair, str] = {}
        typed = self._typed(inputs)
        for pairs, take in ((by_inputs, self._by_inputs), (by_parameters, self._by_parameters)):
            try:
                more, cannot = take(typed, pairs)
            except Exception as error:
                more, cannot = {}, dict.fromkeys(pairs, _failing(error))
            found |= more
            missing |= cannot
        return found, missing

    def _by_inputs(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        """One direction at a time: neml2's `jacobian` takes no sub-batch, and no output that depends on no input."""
        found: Blocks = {}
        for by in dict.fromkeys(by for _, by in pairs):
            name, base = self._inside.get(by, by), tuple(self._compiled.inputs[by].base_shape)
            value, columns = typed[name].data, []
            for direction in torch.eye(prod(base), dtype=torch.float64).reshape((-1, *base)):
                _, along = self._model.jvp(typed, {name: direction.expand(value.shape).contiguous()})
                columns.append(along)
            for out in (out for out, of in pairs if of == by):
                stacked = torch.stack([along[self._inside.get(out, out)].data.detach() for along in columns], -1)
                found[out, by] = stacked.reshape((*stacked.shape[:-1], *base))
        return found, {}

    def _by_parameters(self, typed: dict[str, Any], pairs: Sequence[Pair]) -> tuple[Blocks, dict[Pair, str]]:
        """One output at a time: neml2's `param_jacobian` gives none where one output depends on no parameter."""
        own = {by: self._parameter(by) for _, by in pairs}
        missing = {pair: "it has no parameter of that name" for pair in pairs if own[pair[1]] is None}
        wanted: dict[str, list[str]] = {}
        for out, by in pairs:
            if own[by] is not None:
                wanted.setdefault(out, []).append(by)
        if not wanted:
            return {}, missing
        found: Blocks = {}
        leaves = self._leaves(own, rows=next(iter(typed.values())).data.shape[0])
        spec = list(self._model.output_spec)

        def differentiate() -> None:
            values = self._model(*typed.values())
            values = values if isinstance(values, tuple) else (values,)
            for out, bys in wanted.items():
                value = values[spec.index(self._inside.get(out, out))].data
                try:
                    found.update(_gradients(out, value, {by: leaves[by] for by in bys}))
                except Exception as error:
                    missing.update({(out, by): _failing(error) for by in bys})

        # neml2 reads the parameters again on the way back through an implicit update, so all of it is done inside.
        stand_ins = {f"model.{own[by]}": leaf for by, leaf in leaves.items()}
        torch.func.functional_call(_Within(self._model), stand_ins, (differentiate,))
        return found, missing

    def _leaves(self, own: Mapping[str, str | None], rows: int) -> Tensors:
        """A value for each row of each parameter, so that the derivatives of the rows are not added up."""
        values = dict(self._model.named_parameters())
        shapes = {by: (rows, *self._compiled.parameter_base_shapes[by]) for by in own}
        return {
            by: values[name].detach().expand(shapes[by]).clone().requires_grad_()
            for by, name in own.items()
            if name is not None
        }

    def _parameter(self, name: str) -> str | None:
        """The eager model's own name of a parameter; None where it has another one."""
        own = next((old for old, new in self._aliases.parameters.items() if new == name), name)
        present = dict(self._model.named_parameters())
        # A lone model is not named in the names of its own parameters.
        return next((found for found in (own, own.partition(".")[2]) if found in present), None)

    def _typed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs as the eager model takes them, by its names and in its order."""
        variables = {self._inside.get(name, name): (name, v) for name, v in self._compiled.inputs.items()}
        found = {}
        for name, wrapper in self._model.input_spec.items():
            given, variable = variables[name]
            found[name] = wrapper(inputs[given].to(torch.float64), sub_batch_ndim=len(variable.sub_batch_shape))
        return found


def _failing(error: Exception) -> str:
    return f"it fails ({first_line(error)})"


class _Within(nn.Module):
    """A model, and work to do while `functional_call` has its parameters exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        work()


def _gradients(out: str, value: Tensor, leaves: Mapping[str, Tensor]) -> Blocks:
    """Derivatives of an output by parameters with a value for each row; zero where it does not depend on one."""
    rows = next(iter(leaves.values())).shape[0]
    columns: dict[str, list[Tensor]] = {by: [] for by in leaves}
    flat = value.expand(rows, *value.shape[1:]).reshape(rows, -1)
    for entry in flat.unbind(1):
        given: Sequence[Tensor | None] = (None,) * len(leaves)
        if entry.requires_grad:
            given = torch.autograd.grad(entry.sum(), [*leaves.values()], retain_graph=True, allow_unused=True)
        for (by, leaf), gradient in zip(leaves.items(), given, strict=True):
            columns[by].append(torch.zeros_like(leaf) if gradient is None else gradient)
    return {
        (out, by): torch.stack(entries, 1).reshape((rows, *value.shape[1:], *leaves[by].shape[1:]))
        for by, entries in columns.items()
    }


# -- finite differences ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A derivative by differences, `(rows, *out_base, *by_base)`."""

    block: Tensor
    smooth: Tensor  # the rows in which both steps gave the same derivative, from both sides, bool


def differentiate(model: Model, inputs: Mapping[str, Tensor], by: str, outs: Sequence[str]) -> dict[str, Difference]:
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


def write_golden(path: Path, model: str, digest: str, found: Evaluated) -> None:
    """Write what a model of that name gave, whose metadata has that SHA-256."""
    tensors = {f"input.{name}": value for name, value in found.points.inputs.items()}
    tensors |= {f"output.{name}": value for name, value in found.outputs.items()}
    tensors |= {f"derivative.{number}": block for number, block in enumerate(found.blocks.values())}
    notes = {"model": model, "metadata_sha256": digest, "derivatives": json.dumps(list(found.blocks))}
    write_tensors(path, GOLDEN, tensors, notes)


def read_golden(path: Path, model: Model, name: str) -> Evaluated:
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
    found = read_tensors(path, GOLDEN_FILE, check).tensors
    inputs, outputs = ({name: found[f"{kind}.{name}"] for name in of} for kind, of in variables.items())
    blocks = {pair: found[f"derivative.{number}"] for number, pair in enumerate(pairs)}
    return Evaluated(Points({n: v.to(model.dtype) for n, v in inputs.items()}, path.name), outputs, blocks)
