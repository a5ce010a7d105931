"""What compiled models are compared with: neml2's eager models, and finite differences.

A `Case` is one entry of the stub catalogue, compiled, with its eager counterpart and with states of its own driver's
trajectory to evaluate it at. Names are those at the compiled model's boundary throughout.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch
from neml2.models.common.ImplicitUpdate import ImplicitUpdate
from neml2.solvers import ConvergenceError
from torch import Tensor

from neml2_aoti_plugin import Model
from stubs.build import compiled
from stubs.catalogue import CATALOGUE, Stub

# What torch keeps and prints of an exception inside a graph changed in 2.13.
OLD_TORCH = torch.__version__ < "2.13"

Tensors = dict[str, Tensor]
Blocks = dict[str, dict[str, Tensor]]

# neml2 cuts steps in compiled models only; this model of the same input is the same without cuts.
EAGER_MODELS = {"substepping": "whole_step"}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a while; tensors of input files follow it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, eq=False)
class Case:
    """One entry of the stub catalogue, compiled, and the folder of its stub."""

    stub: Stub
    folder: Path

    @property
    def file(self) -> Path:
        """The compiled stub."""
        return self.folder / f"{self.stub.model}_aoti.i"

    @property
    def artifact(self) -> Path:
        """The artifact's folder."""
        return self.folder / self.stub.model

    @property
    def overrides(self) -> list[str]:
        """HIT overrides among the flags the entry was compiled with."""
        return [flag for flag in self.stub.flags if ":=" in flag]

    @functools.cached_property
    def renames(self) -> dict[str, str]:
        """Names inside the model by names at its boundary, where they differ."""
        flags = self.stub.flags
        pairs = [flags[i + 1].rsplit(":", 1) for i, flag in enumerate(flags) if flag.startswith("--rename")]
        return {boundary: authored for authored, boundary in pairs}

    @property
    def driven(self) -> str:
        """Name of the first input that results follow smoothly; a control is only compared with a threshold."""
        return next(name for name in self.model.input_names if name != "control")

    def authored(self, name: str) -> str:
        """Name inside the model of a name at its boundary."""
        return self.renames.get(name, name)

    def boundary(self, name: str) -> str:
        """Name at the boundary of a name inside the model."""
        return next((new for new, old in self.renames.items() if old == name), name)

    # -- compiled ---------------------------------------------------------------------------------------------------

    def load(self, *, tight: bool = True, **options: Any) -> Model:
        """Load the compiled model anew, with further arguments of `Model`; if `tight`, with tightened tolerances."""
        model = Model(self.artifact, **options)
        if tight and self.implicit is not None:
            model.set_solver_config(**self.newton)
        return model

    @functools.cached_property
    def model(self) -> Model:
        """The compiled model with tightened tolerances; shared, so not to be changed."""
        return self.load()

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the compiled model's inputs."""
        return self.model.dtype

    @functools.cached_property
    def driver(self) -> Any:
        """The compiled stub's driver after its run, with tightened tolerances."""
        with default_dtype(torch.float32 if "float32" in self.stub.flags else torch.float64):
            driver = neml2.load_input(self.file).get_driver(self.stub.driver)
        if self.implicit is not None:
            driver.model.set_solver_config(**self.newton)
        driver.run()
        return driver

    @functools.cached_property
    def states(self) -> Tensors:
        """Inputs `(steps, points, *sub_batch, *base)` as the driver passed them in three of its steps."""
        last = self.driver.nsteps - 1
        # Where steps are cut there are many solves each; one step has points with and without cuts.
        steps = (last // 2,) if self.stub.name in EAGER_MODELS else (max(1, last // 3), 2 * last // 3, last - 1)
        natural = {name: v.natural_shape for name, v in self.model.inputs.items()}
        given = [{n: self.driver.result_in[k][n].data for n in natural if n in self.driver.result_in[k]} for k in steps]
        points = torch.broadcast_shapes(*(x.shape[: x.ndim - len(natural[n])] for row in given for n, x in row.items()))

        def whole(row: Tensors, name: str) -> Tensor:
            value = row.get(name, torch.zeros((), dtype=self.dtype))
            value = value if value.ndim >= len(natural[name]) else value.expand(natural[name])
            return value.expand(*points, *natural[name])

        return {name: torch.stack([whole(row, name) for row in given]).contiguous() for name in natural}

    def rows(self) -> Tensors:
        """The states with one batch axis."""
        return {name: x.flatten(0, 1) for name, x in self.states.items()}

    # -- eager ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def eager(self) -> Any:
        """The eager model of the same input file, with tightened tolerances."""
        name = EAGER_MODELS.get(self.stub.name, self.stub.model)
        with default_dtype(torch.float64):
            model = neml2.load_input(self.stub.path, additional_args=self.overrides).get_model(name)
        tighten(model)
        return model

    @functools.cached_property
    def compiled_from(self) -> Any:
        """The eager model that neml2-compile has read, which need not run itself."""
        with default_dtype(torch.float64):
            return neml2.load_input(self.stub.path, additional_args=self.overrides).get_model(self.stub.model)

    @functools.cached_property
    def implicit(self) -> Any:
        """The implicit part of the eager model; None where it has none."""
        return next(_implicit_updates(self.eager), None)

    @property
    def newton(self) -> dict[str, Any]:
        """The eager model's tightened Newton settings."""
        settings: dict[str, Any] = self.implicit.solver._solver_config()
        return settings

    def typed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs of the compiled model, in float64, as the eager model takes them."""
        sub = {self.authored(n): len(v.sub_batch_shape) for n, v in self.model.inputs.items()}
        inside = {self.authored(name): x.to(torch.float64) for name, x in inputs.items()}
        spec = self.eager.input_spec
        return {name: spec[name](x, sub_batch_ndim=sub[name]) for name, x in inside.items() if name in spec}

    def eager_forward(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs of the eager model for inputs with one batch axis."""
        typed = self.typed(inputs)
        found = self.eager(*(typed[name] for name in self.eager.input_spec))
        found = found if isinstance(found, tuple) else (found,)
        outputs = dict(zip(self.eager.output_spec, found, strict=True))
        return {name: _full(outputs[self.authored(name)].data, inputs, v) for name, v in self.model.outputs.items()}

    def eager_jacobian(self, inputs: Mapping[str, Tensor]) -> Blocks:
        """Derivatives of the eager model for the compiled pairs; neml2's jacobian() fails on inputs with sites."""
        typed = {name: value for name, value in self.typed(inputs).items() if name in self.eager.input_spec}
        found: Blocks = {out: {} for out, _ in self.model.derivative_pairs}
        for by in dict.fromkeys(by for _, by in self.model.derivative_pairs if self.authored(by) in typed):
            base = self.model.inputs[by].base_shape
            directions = torch.eye(prod(base), dtype=torch.float64).reshape(-1, *base)
            moves = [{self.authored(by): x.expand(inputs[by].shape).contiguous()} for x in directions]
            columns = [self.eager.jvp(typed, move)[1] for move in moves]
            for out in (out for out, other in self.model.derivative_pairs if other == by):
                block = torch.stack([column[self.authored(out)].data for column in columns], -1)
                found[out][by] = block.reshape(*block.shape[:-1], *base)
        return found

    def eager_param_jacobian(self, inputs: Mapping[str, Tensor], names: list[str]) -> Blocks:
        """Derivatives of the eager model by parameters, by boundary names."""
        typed, present = self.typed(inputs), dict(self.eager.named_parameters())
        # The eager model has no name of its own in front of those of its parameters.
        authored = {self.authored(name): name for name in names}
        inside = {n if n in present else n.removeprefix(f"{self.stub.model}."): name for n, name in authored.items()}
        _, blocks = self.eager.param_jacobian({n: typed[n] for n in self.eager.input_spec}, list(inside))
        return {
            self.boundary(out): {inside[parameter]: block for parameter, block in row.items()}
            for out, row in blocks.items()
        }

    def residual_and_outputs(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        """The residual of the eager equations at the compiled solution, `(rows, entries)`.

        With what the explicit parts before and behind the implicit one give with these unknowns. Inputs have one batch
        axis.
        """
        assert self.implicit is not None
        system = self.implicit.system
        sub = {name: len(v.sub_batch_shape) for name, v in (self.model.inputs | self.model.outputs).items()}
        state: dict[str, Any] = dict(self.typed(inputs))
        spec = system.model.input_spec
        for name in system.unknown_names:
            rank = outputs[name].ndim - 1 - spec[name].BASE_NDIM
            state[name] = spec[name](outputs[name], sub_batch_ndim=max(rank, sub.get(name, 0)))
        explicit: Tensors = {}
        parts = [m for m in self.eager.children() if m is not self.implicit] if self.eager is not self.implicit else []
        waiting = list(parts)
        while waiting:
            ready = [m for m in waiting if all(name in state for name in m.input_spec)]
            assert ready, f"cannot order {waiting}"
            for part in ready:
                found = part.call_by_name(state)
                state.update(found)
                explicit.update({name: value.data for name, value in found.items()})
                waiting.remove(part)
        residuals = system.model.call_by_name({name: state[name] for name in spec})
        rows = next(iter(inputs.values())).shape[0]
        found = [residuals[name].data.detach() for name in system.residual_names]
        return torch.cat([x.expand(rows, *x.shape[1:]).reshape(rows, -1) for x in found], -1), explicit


def tighten(model: Any) -> None:
    """Make an eager model solve to a tenth of its absolute tolerance, and not be content with a relative one."""
    for update in _implicit_updates(model):
        update.solver.atol *= 0.1
        update.solver.rtol = 0.0


def _implicit_updates(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, ImplicitUpdate))


def _full(value: Tensor, inputs: Mapping[str, Tensor], variable: Any) -> Tensor:
    """Give an eager output its batch axis where it does not depend on the batch."""
    rows = next(iter(inputs.values())).shape[0]
    base = len(variable.base_shape)
    natural = value.shape[-len(variable.natural_shape) :] if variable.natural_shape else ()
    rank = len(natural) if len(natural) >= base else base
    return value if value.ndim > rank else value.expand(rows, *value.shape)


# Whether the running test is marked as one of the wide suite; conftest.py sets it.
wide_allowed = True


def case(name: str) -> Case:
    """An entry of the catalogue, compiled; one object for all tests of a process."""
    assert wide_allowed or not CATALOGUE[name].wide, f"{name} is a wide stub: mark this test pytest.mark.wide"
    return _case(name)


@functools.cache
def _case(name: str) -> Case:
    return Case(CATALOGUE[name], compiled(name))


def copied(name: str, folder: Path) -> Path:
    """The artifact in a copy of a compiled model, which has its stub beside it; a test may change both."""
    of = case(name)
    return Path(shutil.copytree(of.folder, folder, dirs_exist_ok=True)) / of.stub.model


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    """Change a document in a file; `change` does it in place."""
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")


def edited(of: Case, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The folder of an artifact with the graphs of a case and metadata that `edit` has changed in place."""
    root = Path(shutil.copytree(of.artifact, folder / of.stub.model))
    change_json(root / "metadata.json", edit)
    return root


def write_stub(file: Path, more: str = "", *, options: str = "", **models: object) -> Path:
    """Write an input file with compiled models, the paths of their artifacts by name; give the file's path."""
    blocks = (f"[{name}]\ntype = AOTIModel\nartifact_path = '{path}'\n{options}\n[]\n" for name, path in models.items())
    file.write_text(f"[Models]\n{''.join(blocks)}[]\n{more}", encoding="utf-8")
    return file


@contextlib.contextmanager
def reported(error: type[Exception], *words: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Require an error that says these words."""
    with pytest.raises(error) as raised:
        yield raised
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


def caller_of(model: Any) -> Any:
    """What is behind a model, a `model._call.Caller`: for tests of what no public name shows."""
    return model._caller


def altered(name: str, folder: Path, **keys: object) -> Model:
    """A model with the graphs of a case and other values of these keys of its metadata."""
    return Model(edited(case(name), folder, lambda metadata: metadata.update(keys)))


def flat(result: object, name: str = "") -> Tensors:
    """All tensors of a result, by their place in it."""
    if isinstance(result, Tensor):
        return {name: result}
    entries = result.items() if isinstance(result, dict) else enumerate(result)  # type: ignore[arg-type]
    return {place: x for key, value in entries for place, x in flat(value, f"{name}/{key}").items()}


def named(operation: str, found: Any) -> Tensors:
    """What an operation gives, each tensor under a name of its own, as the service has them."""
    if operation == "forward":
        return dict(found)
    if operation == "solve":
        fared = {"@converged": found.converged, "@iterations": found.iterations, "@outcome": found.outcome}
        return {**found.outputs, **fared}
    if operation == "param_vjp":
        return {f"gradient:{name}": value for name, value in found.items()}
    outputs, more = found
    if operation == "jvp":
        return {**outputs, **{f"tangent:{name}": value for name, value in more.items()}}
    return {**outputs, **{f"{out}:{by}": block for out, row in more.items() for by, block in row.items()}}


def few(of: Case) -> Tensors:
    """A few rows of a case for what is evaluated many times over: two points of one step."""
    return {name: x[-1, -2:] for name, x in of.states.items()}


@functools.cache
def expected_outputs(of: Case) -> Tensors:
    """Eager outputs for the rows of a case, by halving the step where eager neml2 must not."""
    rows = of.rows()
    if of.stub.name not in EAGER_MODELS:
        return of.eager_forward(rows)
    forces = {name: f"{name}~1" for name in rows if "~" not in name and f"{name}~1" in rows}
    states = {name: f"{name}~1" for name in of.model.output_names}
    depth = int(of.compiled_from.max_substepping_level)
    parts = []
    for k in range(next(iter(rows.values())).shape[0]):
        found, _ = bisected(of.eager_forward, {name: x[k : k + 1] for name, x in rows.items()}, forces, states, depth)
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts]) for name in of.model.output_names}


# -- numbers ----------------------------------------------------------------------------------------------------------


# Size of an argument that happens to be zero; strains, rates and rotations of the stubs are of this order.
SIZE_OF_ZERO = 1e-3


def size(value: Tensor) -> float:
    """Largest magnitude of the entries; of zeros, a typical one."""
    largest = float(value.detach().abs().max()) if value.numel() else 0.0
    return largest or SIZE_OF_ZERO


def difference(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Largest deviation relative to the largest entry that was expected, or to `least` if that is larger."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().to(torch.float64), expected.detach().to(torch.float64)
    assert bool(found.isfinite().all()), "not finite"
    scale = max(float(expected.abs().max()), least)
    return float((found - expected).abs().max()) / (scale or 1.0)


def finite_differences(function: Callable[[Tensor], Tensors], at: Tensor, base_rank: int) -> Tensors:
    """Derivatives by central differences of fourth order: of each output, `(*batch, *out_base, *base)`.

    The function takes `(4 * entries, *at.shape)`, with `at` `(*batch, *base)`, and gives the same leading axes.
    """
    base = tuple(at.shape[at.ndim - base_rank :])
    entries = prod(base)
    step = 1e-5 * size(at)
    directions = torch.eye(entries, dtype=at.dtype).reshape(entries, *(1,) * (at.ndim - base_rank), *base)
    lengths = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=at.dtype) * step
    points = at + lengths.reshape(4, *(1,) * directions.ndim) * directions
    values = function(points.reshape(4 * entries, *at.shape))
    found = {}
    for name, value in values.items():
        near, back, far, far_back = value.reshape(4, entries, *value.shape[1:])
        slope = (8.0 * (near - back) - (far - far_back)) / (12.0 * step)
        found[name] = slope.movedim(0, -1).reshape(*slope.shape[1:], *base)
    return found


# -- substepping ------------------------------------------------------------------------------------------------------


def bisected(
    step: Callable[[Tensors], Tensors], row: Tensors, forces: Mapping[str, str], states: Mapping[str, str], depth: int
) -> tuple[Tensors, int]:
    """Take one row over an increment, in halves of halves where a solve fails.

    `forces` and `states` lead to the names at the start of the increment from those at its end; the increment may be
    halved `depth` times. Gives the unknowns at the end, and the number of solves that succeeded.
    """
    chained = dict(row)
    spans = 0

    def take(start: float, end: float, level: int) -> Tensors:
        nonlocal spans
        span = dict(chained)
        for current, old in forces.items():
            span[old] = row[old] + start * (row[current] - row[old])
            span[current] = row[old] + end * (row[current] - row[old])
        try:
            found = step(span)
        except ConvergenceError:
            if level == depth:
                raise
            middle = (start + end) / 2
            take(start, middle, level + 1)
            return take(middle, end, level + 1)
        spans += 1
        chained.update({states[name]: value for name, value in found.items()})
        return found

    return take(0.0, 1.0, 0), spans
