"""Where a model is evaluated, and what it gives there: at calls of a driver, points in a file, random ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._artifact.stub import AOTI_MODEL, blocks, drivers_of, parse_input
from .._solve.outcome import Outcome
from .._tensor_files import Header, read_tensors
from ..errors import AOTIError, InputError, UnknownNameError
from ..model import Model
from .output import in_one_line, require_ending, waits_for
from .target import Target, find_target, lag, require_block

Tensors = dict[str, Tensor]
# By output and by what it is differentiated by, an input or a parameter.
Pair = tuple[str, str]

# Around what a driver passes, as a fraction of the largest entry that it passes.
SPREAD = 0.01
# Of an input of which nothing shows what is usual: no driver passes it, or it is zero everywhere.
SCALE = 1e-3
# What is below this part of the output over the input is zero but for rounding.
ZERO = 1e-5
FORMATS = (".npz", ".pt", ".safetensors")
WHAT = f"a file with a tensor per input ({', '.join(FORMATS)})"
TIME = "t"


@dataclass(frozen=True)
class ChosenPoints:
    """Inputs of a model by name, `(rows, *sub_batch, *base)`."""

    inputs: Tensors
    source: str  # where they come from, in words

    @property
    def rows(self) -> int:
        """How many there are."""
        return next((value.shape[0] for value in self.inputs.values()), 0)

    def at(self, rows: Tensor) -> ChosenPoints:
        """Some of them; `rows` are indices or a mask."""
        return ChosenPoints({name: value[rows] for name, value in self.inputs.items()}, self.source)


@dataclass(frozen=True)
class EvaluatedPoints:
    """What a model gives at points where it converged, `(rows, ...)`."""

    points: ChosenPoints
    outputs: Tensors
    blocks: dict[Pair, Tensor]
    parameters: Tensors = field(default_factory=dict)
    not_finite: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # indices among all points

    def scale_of(self, pair: Pair, block: Tensor) -> float:
        """What an error of this derivative is measured by; `block` is the reference."""
        values = {**self.parameters, **self.points.inputs}
        return scale_of(block, self.outputs[pair[0]], values[pair[1]])


def largest(values: Tensor) -> float:
    """The largest absolute entry; 0 where there is none."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def scale_of(block: Tensor, out: Tensor, by: Tensor) -> float:
    """The largest entry of a derivative, or a part of output over input, so that one of mere rounding has no error."""
    return max(largest(block), ZERO * largest(out) / (largest(by) or SCALE))


def choose_points(
    target: Target,
    model: Model,
    points: Path | None = None,
    driver: str | None = None,
    rows: int = 16,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
) -> ChosenPoints:
    """The points of a file, else so many of a driver and random ones around them, else random ones alone.

    The driver is the first one of the stub if none is named; `scales` are standard deviations of random entries.
    """
    if points is not None:
        return read_points(points, model)
    if driver is None and target.stub is not None:
        driver = next(iter(drivers_of(target.stub, target.model)), None)
    driven = None if driver is None else driver_points(target, model, driver, rows)
    around = random_points(model, rows, seed, scales or {}, driven)
    if driven is None:
        return around
    inputs = {name: torch.cat([driven.inputs[name], around.inputs[name]]) for name in model.inputs}
    return ChosenPoints(inputs, f"{driven.source}, {around.source}")


def evaluate(model: Model, points: ChosenPoints) -> EvaluatedPoints:
    """Evaluate a model with all its derivatives where it converges."""
    waits_for(f"evaluating {points.rows} points")
    on_device = ChosenPoints({n: v.to(model.device) for n, v in points.inputs.items()}, points.source)
    solution = model.solve(on_device.inputs, jacobian=bool(model.derivative_pairs))
    converged = solution.converged
    if not converged.any():
        raise InputError(
            f"the model converges at none of the {points.rows} points ({points.source}). Give points that it meets "
            "(--points FILE, or a stub with a driver), or a scale for its inputs (--scale NAME=VALUE)."
        )
    kept = on_device.at(converged)
    outputs = {name: value[converged] for name, value in solution.outputs.items()}
    blocks = {(out, by): block[converged] for out, row in solution.blocks.items() for by, block in row.items()}
    if model.parameter_derivative_pairs:
        found = model.param_jacobian(kept.inputs)[1]
        blocks |= {(out, by): block for out, row in found.items() for by, block in row.items()}
    not_finite = (solution.outcome == Outcome.NOT_FINITE).nonzero().squeeze(-1).cpu()
    return EvaluatedPoints(kept, outputs, blocks, dict(model.named_parameters()), not_finite)


def driver_points(target: Target, model: Model, driver: str, most: int) -> ChosenPoints:
    """The inputs that a driver passes to its model: at most so many rows, spread over the driver's calls."""
    if target.stub is None:
        raise InputError(f"{target.artifact} is an artifact, which has no drivers. Give the stub beside it.")
    from .._host.hit import AOTIModel
    from .._host.typed import unwrap

    calls: list[Tensors] = []

    def keep(module: Any, arguments: tuple[Any, ...]) -> None:
        given = dict(zip(module.input_spec, arguments, strict=True))
        calls.append(flat(unwrap(given, model.inputs, module.input_spec, "input", target.artifact), model))

    device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
    with defaults(device, dtype):
        built = load_driver(target.stub, driver, device=device, dtype=dtype)
        if not isinstance(built.model, AOTIModel):
            kind = f"{type(built.model).__module__}.{type(built.model).__qualname__}"
            raise InputError(
                f"[Drivers/{driver}] in {target.stub} drives a {kind}, expected a compiled model of this plugin. If "
                "NEML2_AOTI_PLUGIN=0 is set, unset it; `neml2-aoti doctor` shows whether the plugin is active."
            )
        # What the driver gives is not asked for here, and must not take the place of a file.
        built.save_as = ""
        failed = run_driver(built, keep)
    # The points of the step that fails are among those kept, and counted where they are evaluated.
    source = f"driver {driver}" + (f", which fails in its step {len(calls)}" if failed else "")
    if not calls:
        raise InputError(f"[Drivers/{driver}] in {target.stub} does not call the model.")
    found = ChosenPoints({name: torch.cat([call[name] for call in calls]) for name in model.inputs}, source)
    if not found.rows:
        raise InputError(f"[Drivers/{driver}] in {target.stub} has no points. Give points in a file (--points FILE).")
    return found if found.rows <= most else found.at(torch.linspace(0, found.rows - 1, most).round().long())


def load_driver(
    path: Path, driver: str, overrides: tuple[str, ...] = (), *, device: str | None = None, dtype: str | None = None
) -> Any:
    """Build a driver of an input file; device and dtype are those of the leaf, if its model is a compiled one."""
    root = parse_input(path, overrides)
    block = require_block(root, "Drivers", driver, path)
    driven = blocks(root, "Models").get(block.param_optional_str("model", ""))
    if driven is not None and driven.param_optional_str("type", "") == AOTI_MODEL:
        # A leaf that is not there is reported as what it is, wrong use.
        find_target(path, driven.path(), device, dtype, overrides).place()
    import neml2

    try:
        file = neml2.load_input(path, additional_args=list(overrides), device=device, dtype=dtype)
        built: Any = file.get_driver(driver)
    except AOTIError:
        raise
    except Exception as error:
        raise InputError(f"[Drivers/{driver}] in {path}: {in_one_line(error)}") from error
    if not hasattr(built, "model"):
        kind = block.param_optional_str("type", "")
        raise InputError(f"[Drivers/{driver}] in {path} is of type {kind}, which drives no model.")
    return built


def run_driver(built: Any, on_call: Callable[..., None]) -> RuntimeError | None:
    """Run a driver, with a call before each of its model's; gives the error of a step that does not converge."""
    handle = built.model.register_forward_pre_hook(on_call)
    try:
        built.run()
    except RuntimeError as error:
        if type(error).__name__ != "ConvergenceError":
            raise
        return error
    finally:
        handle.remove()
    return None


def flat(inputs: Mapping[str, Tensor], model: Model) -> Tensors:
    """Inputs `(*batch, *sub_batch, *base)` with one batch axis that they have in common."""
    natural = {name: variable.natural_shape for name, variable in model.inputs.items()}
    batches = [tuple(inputs[n].shape[: inputs[n].ndim - len(shape)]) for n, shape in natural.items()]
    common = torch.broadcast_shapes(*batches)
    return {
        name: inputs[name].detach().expand((*common, *shape)).reshape((-1, *shape)).clone()
        for name, shape in natural.items()
    }


def read_points(path: Path, model: Model) -> ChosenPoints:
    """Read points from a .npz, .pt or .safetensors file with a tensor per input, by name."""
    require_ending(path, FORMATS)

    def check(header: Header) -> Iterable[str]:
        absent = [name for name in model.inputs if name not in header.claims]
        if absent:
            raise InputError(
                f"{path}: has no {', '.join(absent)}; the model's inputs are {', '.join(model.inputs)}, and the file "
                f"has {', '.join(header.claims) or 'nothing'}."
            )
        for name, variable in model.inputs.items():
            shape, natural = header.claims[name].shape, variable.natural_shape
            if shape[len(shape) - len(natural) :] != natural or 0 in shape:
                wanted = ", ".join(("rows", *map(str, natural)))
                raise InputError(f"{path}: {name!r} has shape {shape}, expected ({wanted}).")
        return model.inputs

    given = {name: value.to(model.dtype) for name, value in read_tensors(path, WHAT, check).items()}
    try:
        return ChosenPoints(flat(given, model), path.name)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise InputError(f"{path}: the inputs have different numbers of rows: {shapes}.") from None


def random_points(
    model: Model, rows: int, seed: int, scales: Mapping[str, float], around: ChosenPoints | None = None
) -> ChosenPoints:
    """Random points, normally distributed: around those of a driver, or around zero.

    The standard deviation of an input that has no scale is 1% of the largest entry around a driver's points, else 1e-3.
    """
    unknown = [name for name in scales if name not in model.inputs]
    if unknown:
        raise UnknownNameError(f"no input {', '.join(unknown)}; the inputs are {', '.join(model.inputs)}.")
    generator = torch.Generator().manual_seed(seed)
    middle = None if around is None else around.at(torch.randint(around.rows, (rows,), generator=generator))
    found: Tensors = {}
    for name, variable in model.inputs.items():
        noise = torch.randn((rows, *variable.natural_shape), generator=generator, dtype=torch.float64)
        if around is None or middle is None:
            found[name] = scales.get(name, SCALE) * noise
        else:
            # Times stay what they are: a step that lasts no time, or less, means nothing.
            usual = 0.0 if lag(name)[0] == TIME else SPREAD * largest(around.inputs[name])
            found[name] = middle.inputs[name] + scales.get(name, usual) * noise
    if around is None and {TIME, f"{TIME}~1"} <= found.keys():
        before = torch.rand(rows, generator=generator, dtype=torch.float64)
        found[f"{TIME}~1"], found[TIME] = before, before + 0.1 + before.flip(0)
    return ChosenPoints({name: value.to(model.dtype) for name, value in found.items()}, f"{rows} random")


@contextlib.contextmanager
def defaults(device: str | None, dtype: str) -> Iterator[None]:
    """Set torch's default device and dtype for a while, as neml2-run does: tensors in input files follow them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
