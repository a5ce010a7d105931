"""Where a model is evaluated: at the calls of a driver, at points in a file, at random ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._artifact.stub import AOTI_MODEL, blocks, parse_input
from .._tensor_files import Header, read_tensors
from ..errors import AOTIError, InputError, UnknownNameError
from ..model import Model
from .names import lag
from .target import Target, find_target, require_block

if TYPE_CHECKING:
    from .._host.hit import AOTIModel

Tensors = dict[str, Tensor]

# Around what a driver passes, as a fraction of the largest entry that it passes.
SPREAD = 0.01
# Of random numbers where there is no driver to tell what is usual.
SCALE = 1e-3
FORMATS = (".npz", ".pt", ".safetensors")
WHAT = f"a file with a tensor per input ({', '.join(FORMATS)})"
TIME = "t"


@dataclass(frozen=True)
class Points:
    """Inputs of a model.

    Args:
        inputs: by name, `(rows, *sub_batch, *base)`.
        source: where they come from, in words.
    """

    inputs: Tensors
    source: str

    @property
    def rows(self) -> int:
        """How many there are."""
        return next((value.shape[0] for value in self.inputs.values()), 0)

    def at(self, rows: Tensor) -> Points:
        """Some of them; `rows` are indices or a mask."""
        return Points({name: value[rows] for name, value in self.inputs.items()}, self.source)


def driver_names(target: Target) -> list[str]:
    """The drivers in a target's stub that drive the target's model."""
    if target.stub is None:
        return []
    found = blocks(parse_input(target.stub), "Drivers")
    return [name for name, block in found.items() if block.param_optional_str("model", "") == target.model]


def driver_points(target: Target, model: Model, driver: str, most: int) -> Points:
    """The inputs that a driver passes to a model.

    Args:
        target: a stub.
        model: its model, which says what shape inputs have.
        driver: name of the driver.
        most: how many rows to take, spread over the driver's calls.

    Raises:
        InputError: there is no such driver, or it fails.
    """
    if target.stub is None:
        raise InputError(f"{target.artifact} is an artifact, which has no drivers. Give the stub beside it.")
    calls: list[Tensors] = []

    def keep(module: Any, arguments: tuple[Any, ...]) -> None:
        calls.append(flat(module._raw(dict(zip(module.input_spec, arguments, strict=True))), model))

    device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
    with defaults(device, dtype):
        built = load_driver(target.stub, driver, device=device, dtype=dtype)
        require_compiled(built, driver, target.stub)
        # What the driver gives is not asked for here, and must not take the place of a file.
        built.save_as = ""
        handle = built.model.register_forward_pre_hook(keep)
        source = f"driver {driver}"
        try:
            built.run()
        except RuntimeError as error:
            # The points of the step that fails are among those kept, and counted where they are evaluated.
            if type(error).__name__ != "ConvergenceError":
                raise
            source += f", which fails in its step {len(calls)}"
        finally:
            handle.remove()
    if not calls:
        raise InputError(f"[Drivers/{driver}] in {target.stub} does not call the model.")
    together = {name: torch.cat([call[name] for call in calls]) for name in model.inputs}
    found = Points(together, source)
    if not found.rows:
        raise InputError(f"[Drivers/{driver}] in {target.stub} has no points. Give points in a file (--points FILE).")
    if found.rows <= most:
        return found
    return found.at(torch.linspace(0, found.rows - 1, most).round().long())


def load_driver(
    path: Path, driver: str, overrides: tuple[str, ...] = (), *, device: str | None = None, dtype: str | None = None
) -> Any:
    """Build a driver of an input file.

    Args:
        path: the file.
        driver: name of the driver.
        overrides: HIT overrides, such as `Drivers/driver/save_as:=out.pt`.
        device: of the leaf of its compiled model.
        dtype: of that leaf.

    Raises:
        InputError: there is no such file or driver, or neml2 cannot build it.
        ArtifactError: the compiled model that it drives cannot run here.
    """
    block = require_block(parse_input(path, overrides), "Drivers", driver, path)
    driven = blocks(parse_input(path, overrides), "Models").get(block.param_optional_str("model", ""))
    if driven is not None and driven.param_optional_str("type", "") == AOTI_MODEL:
        # A leaf that is not there is told as what it is, wrong use.
        find_target(path, driven.path(), overrides).place(device, dtype)
    import neml2

    try:
        file = neml2.load_input(path, additional_args=list(overrides), device=device, dtype=dtype)
        built: Any = file.get_driver(driver)
    except AOTIError:
        raise
    except Exception as error:
        raise InputError(f"[Drivers/{driver}] in {path}: {first_line(error)}") from error
    if not hasattr(built, "model"):
        kind = block.param_optional_str("type", "")
        raise InputError(f"[Drivers/{driver}] in {path} is of type {kind}, which drives no model.")
    return built


def require_compiled(driver: Any, name: str, path: Path) -> AOTIModel:
    """The model of a driver, which must be a compiled one that this plugin runs.

    Raises:
        InputError: it is another.
    """
    from .._host.hit import AOTIModel

    found = driver.model
    if isinstance(found, AOTIModel):
        return found
    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    raise InputError(
        f"[Drivers/{name}] in {path} drives a {kind}, expected a compiled model of this plugin. If NEML2_AOTI_PLUGIN=0 "
        "is set, unset it; `neml2-aoti doctor` tells whether the plugin is active."
    )


def flat(inputs: Mapping[str, Tensor], model: Model) -> Tensors:
    """Inputs with one batch axis that they have in common.

    Args:
        inputs: by name, `(*batch, *sub_batch, *base)`.
        model: whose inputs they are.
    """
    natural = {name: variable.natural_shape for name, variable in model.inputs.items()}
    batches = [tuple(inputs[n].shape[: inputs[n].ndim - len(shape)]) for n, shape in natural.items()]
    common = torch.broadcast_shapes(*batches)
    return {
        name: inputs[name].detach().expand((*common, *shape)).reshape((-1, *shape)).clone()
        for name, shape in natural.items()
    }


def read_points(path: Path, model: Model) -> Points:
    """Read points from a file: a tensor per input, by name, in a .npz, .pt or .safetensors file.

    Raises:
        InputError: the file cannot be read, or does not hold the model's inputs.
    """
    given = {name: value.to(model.dtype) for name, value in _inputs_in(path, model).items()}
    try:
        return Points(flat(given, model), path.name)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise InputError(f"{path}: the inputs have different numbers of rows: {shapes}.") from None


def random_points(
    model: Model, rows: int, seed: int, scales: Mapping[str, float], around: Points | None = None
) -> Points:
    """Random points: around those of a driver, or normally distributed.

    Args:
        model: whose inputs they are.
        rows: how many.
        seed: of the random numbers.
        scales: standard deviation of an input's entries by name; 1% of the largest entry around a driver's points, else
            1e-3, if not given.
        around: the driver's points.

    Raises:
        UnknownNameError: `scales` names no input.
    """
    unknown = [name for name in scales if name not in model.inputs]
    if unknown:
        raise UnknownNameError(f"no input {', '.join(unknown)}; the inputs are {', '.join(model.inputs)}.")
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn((rows, *shape), generator=generator, dtype=torch.float64)

    found: Tensors = {}
    pick = torch.randint(around.rows, (rows,), generator=generator) if around is not None else None
    for name, variable in model.inputs.items():
        noise = normal(variable.natural_shape)
        if around is None or pick is None:
            found[name] = scales.get(name, SCALE) * noise
        else:
            middle = around.inputs[name].to(torch.float64)
            # Times stay what they are: a step that lasts no time, or less, means nothing.
            usual = 0.0 if lag(name)[0] == TIME else SPREAD * float(middle.abs().max())
            found[name] = middle[pick] + scales.get(name, usual) * noise
    if around is None and {TIME, f"{TIME}~1"} <= found.keys():
        before = torch.rand(rows, generator=generator, dtype=torch.float64)
        found[f"{TIME}~1"], found[TIME] = before, before + 0.1 + before.flip(0)
    return Points({name: value.to(model.dtype) for name, value in found.items()}, f"{rows} random")


def joined(parts: list[Points]) -> Points:
    """Several sets of points as one."""
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    return Points(inputs, ", ".join(part.source for part in parts))


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


def first_line(error: BaseException) -> str:
    """What an error of neml2's says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _inputs_in(path: Path, model: Model) -> Tensors:
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}.")

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

    return read_tensors(path, WHAT, check).tensors
