"""Does a compiled model do what its source does? Values and derivatives against a reference, quantity by quantity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..model import Model
from . import differences
from .describe import name_of
from .eager import Source
from .golden import Blocks, Golden, beside, read_golden, write_golden
from .points import Points, Tensors, driver_names, driver_points, joined, random_points, read_points
from .target import Target

RTOL = 1e-6
# Finite differences are no better than this.
DIFFERENCE_RTOL = 1e-5


@dataclass(frozen=True)
class Comparison:
    """One quantity against its reference.

    Args:
        quantity: an output, or a derivative such as `d(stress)/d(strain)`.
        reference: `source`, `differences` or `golden`.
        rows: how many points were compared.
        left_out: how many were not: differences with two steps disagree there.
        worst: the largest difference of an entry, over the largest entry of the reference; see `scale_of` for
            derivatives that are zero.
        worst_row: the point where that is; -1 where nothing was compared.
        tolerance: what `worst` may be at most.
        passed: whether it is, and something was compared.
    """

    quantity: str
    reference: str
    rows: int
    left_out: int
    worst: float
    worst_row: int
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        artifact: its path.
        model: name of the model.
        leaf: as `device/dtype`.
        points: where they come from, in words.
        rows: how many there are.
        not_converged: at how many of them the compiled model did not converge; they are left out.
        comparisons: one for each quantity and reference.
        not_compared: quantities without a reference, and why.
        recorded: the golden file that was written; null if none was, as when a comparison failed.
        passed: whether all comparisons passed.
    """

    artifact: str
    model: str
    leaf: str
    points: str
    rows: int
    not_converged: int
    comparisons: tuple[Comparison, ...]
    not_compared: tuple[str, ...]
    recorded: str | None
    passed: bool


@dataclass(frozen=True)
class Wanted:
    """Where to evaluate, and what to compare with.

    Args:
        against: input file with the eager model.
        source_model: name of that model; the compiled one's if None.
        golden: a golden file; the one beside the artifact, if there is one and no points or source are asked for.
        points: a file of points.
        driver: a driver of the stub whose calls are taken; its only one if None.
        rows: how many points of a driver, and how many random ones.
        seed: of the random ones.
        scales: their standard deviation by input.
        rtol: tolerance against source and golden file.
        difference_rtol: tolerance against finite differences.
    """

    against: Path | None = None
    source_model: str | None = None
    golden: Path | None = None
    points: Path | None = None
    driver: str | None = None
    rows: int = 16
    seed: int = 0
    scales: Mapping[str, float] | None = None
    rtol: float = RTOL
    difference_rtol: float = DIFFERENCE_RTOL


@dataclass(frozen=True)
class Evaluated:
    """A compiled model at points where it converged.

    Args:
        points: those points.
        outputs: by name.
        blocks: derivatives by inputs and parameters, `(rows, ...)`, by pair.
        parameters: promoted parameters by name.
    """

    points: Points
    outputs: Tensors
    blocks: Blocks
    parameters: Tensors

    def scale(self, pair: tuple[str, str], block: Tensor) -> float:
        """What an error of a derivative is measured by; `block` is the reference."""
        out, by = pair
        return scale_of(block, self.outputs[out], {**self.parameters, **self.points.inputs}[by])


def verify(
    target: Target,
    wanted: Wanted,
    device: str | None = None,
    dtype: str | None = None,
    *,
    record: Path | None = None,
) -> tuple[Verification, list[Comparison]]:
    """Hold a compiled model against its source, finite differences, or a golden file.

    Args:
        target: the model.
        wanted: points and references.
        device: of the leaf.
        dtype: of the leaf.
        record: a golden file to write, with what the model gives at the points, unless a comparison fails.

    Returns:
        What was found, and the comparisons that failed.

    Raises:
        InputError: there is nothing to compare with, or an argument does not fit the model.
        ArtifactError: the artifact cannot run here.
    """
    model = target.load(device, dtype)
    golden_file = wanted.golden or (_golden_beside(target, wanted) if record is None else None)
    golden = None if golden_file is None else read_golden(golden_file, model, target.model)
    points = golden.points if golden is not None else choose_points(target, model, wanted)
    found, not_converged = evaluate(model, points)
    source = None
    metadata = target.metadata(device, dtype)
    if wanted.against is not None:
        source = Source(wanted.against, wanted.source_model or target.model, model, metadata.aliases)
    if source is None and golden is None and record is None and not found.blocks:
        raise InputError(
            f"{target.model} has no compiled derivatives, so there is nothing to compare. Name its source (--against "
            "INPUT.i) or a golden file (--golden FILE), or record one (--record FILE)."
        )
    comparisons: list[Comparison] = []
    not_compared: list[str] = []
    if source is not None:
        comparisons += _with_source(source, found, wanted.rtol)
    elif golden is not None:
        comparisons += _with_golden(golden, found, points, model, wanted.rtol)
    else:
        not_compared.append("values: no source (--against INPUT.i) and no golden file (--golden FILE)")
    compared = {c.quantity for c in comparisons}
    left = {pair: block for pair, block in found.blocks.items() if derivative(*pair) not in compared}
    more, cannot = _with_differences(model, found, left, wanted.difference_rtol)
    comparisons += more
    not_compared += cannot
    failed = [c for c in comparisons if not c.passed]
    if record is not None and not failed:
        write_golden(record, target.model, Golden(found.points, found.outputs, found.blocks, metadata.digest))
    place = target.place(device, dtype)
    report = Verification(
        artifact=str(target.artifact),
        model=target.model,
        leaf=f"{place.device.type}/{name_of(place)}",
        points=points.source,
        rows=points.rows,
        not_converged=not_converged,
        comparisons=tuple(comparisons),
        not_compared=tuple(not_compared),
        recorded=None if record is None or failed else str(record),
        passed=not failed,
    )
    return report, failed


def choose_points(target: Target, model: Model, wanted: Wanted) -> Points:
    """The points of a file; else those of the stub's driver and random ones around them; else random ones."""
    if wanted.points is not None:
        return read_points(wanted.points, model)
    scales = wanted.scales or {}
    driver = wanted.driver or next(iter(driver_names(target)), None)
    if driver is None:
        return random_points(model, wanted.rows, wanted.seed, scales)
    driven = driver_points(target, model, driver, wanted.rows)
    around = random_points(model, wanted.rows, wanted.seed, scales, driven)
    return joined([driven, around])


def evaluate(model: Model, points: Points) -> tuple[Evaluated, int]:
    """Evaluate a model with all its derivatives where it converges.

    Returns:
        What it gives, and the number of points where it does not converge.

    Raises:
        InputError: it converges nowhere.
    """
    on_device = Points({n: v.to(model.device) for n, v in points.inputs.items()}, points.source)
    converged = model.solve(on_device.inputs).converged
    rows = int(converged.sum())
    if rows == 0:
        raise InputError(
            f"the model converges at none of the {points.rows} points ({points.source}). Give points that it meets "
            "(--points FILE, or a stub with a driver), or a scale for its inputs (--scale NAME=VALUE)."
        )
    kept = on_device.at(converged)
    outputs = model.forward(kept.inputs)
    blocks: Blocks = {}
    if model.derivative_pairs:
        blocks |= _pairs(model.jacobian(kept.inputs)[1], model, rows)
    if model.parameter_derivative_pairs:
        blocks |= _pairs(model.param_jacobian(kept.inputs)[1], model, rows)
    return Evaluated(kept, outputs, blocks, dict(model.named_parameters())), points.rows - rows


def derivative(out: str, by: str) -> str:
    """What a derivative is called in reports."""
    return f"d({out})/d({by})"


def _golden_beside(target: Target, wanted: Wanted) -> Path | None:
    """The golden file that lies beside the artifact, unless something else is asked for."""
    if wanted.against is not None or wanted.points is not None or wanted.driver is not None or wanted.scales:
        return None
    found = beside(target.artifact)
    return found if found.is_file() else None


def _pairs(blocks: Mapping[str, Mapping[str, Tensor]], model: Model, rows: int) -> Blocks:
    """Blocks by pair, each with its batch axis."""
    found: Blocks = {}
    for out, row in blocks.items():
        for by, block in row.items():
            known = model.inputs.get(by)
            base = tuple(known.base_shape) if known is not None else tuple(model.parameter_base_shapes[by])
            constant = len(model.outputs[out].base_shape) + len(base)
            found[out, by] = block.expand(rows, *block.shape) if block.ndim == constant else block
    return found


def _with_source(source: Source, found: Evaluated, rtol: float) -> list[Comparison]:
    inputs = {name: value.cpu() for name, value in found.points.inputs.items()}
    values = source.outputs(inputs)
    comparisons = [_compare(n, "source", found.outputs[n], values[n], rtol) for n in found.outputs]
    by_inputs = [pair for pair in found.blocks if pair[1] in inputs]
    by_parameters = [pair for pair in found.blocks if pair[1] not in inputs]
    blocks = source.jacobian(inputs, by_inputs) if by_inputs else {}
    if by_parameters:
        blocks |= source.parameter_jacobian(inputs, list(dict.fromkeys(by for _, by in by_parameters)))
    for pair, block in found.blocks.items():
        if pair in blocks:
            scale = found.scale(pair, blocks[pair])
            comparisons.append(_compare(derivative(*pair), "source", block, blocks[pair], rtol, scale=scale))
    return comparisons


def _with_golden(golden: Golden, found: Evaluated, points: Points, model: Model, rtol: float) -> list[Comparison]:
    """Compare with a golden file; a point where the model no longer converges is a difference."""
    if found.points.rows != points.rows:
        raise InputError(
            f"the model converges at {found.points.rows} of the {points.rows} points of {points.source} only, and has "
            "converged at all of them when that was recorded. `neml2-aoti inspect` tells the solver's settings."
        )
    comparisons = [_compare(n, "golden", found.outputs[n], golden.outputs[n], rtol) for n in found.outputs]
    for pair, block in found.blocks.items():
        if pair in golden.blocks:
            scale = found.scale(pair, golden.blocks[pair])
            comparisons.append(_compare(derivative(*pair), "golden", block, golden.blocks[pair], rtol, scale=scale))
    return comparisons


def _with_differences(
    model: Model, found: Evaluated, blocks: Blocks, rtol: float
) -> tuple[list[Comparison], list[str]]:
    comparisons, cannot = [], []
    by: dict[str, list[str]] = {}
    for out, name in blocks:
        sites = model.outputs[out].sub_batch_shape or (name in model.inputs and model.inputs[name].sub_batch_shape)
        batched = name not in model.inputs and list(model.named_parameters()[name].shape) != list(
            model.parameter_base_shapes[name]
        )
        if sites or batched:
            kind = "a sub-batch" if sites else "a parameter with a batch"
            cannot.append(f"{derivative(out, name)}: differences of {kind} are not taken")
        else:
            by.setdefault(name, []).append(out)
    for name, outs in by.items():
        take = differences.by_input if name in model.inputs else differences.by_parameter
        for out, taken in take(model, found.points.inputs, name, outs).items():
            scale = found.scale((out, name), taken.block[taken.smooth])
            quantity, block = derivative(out, name), blocks[out, name]
            comparisons.append(_compare(quantity, "differences", block, taken.block, rtol, taken.smooth, scale))
    return comparisons, cannot


def scale_of(block: Tensor, out: Tensor, by: Tensor) -> float:
    """What an error of a derivative is measured by: its largest entry, or a small part of output over input.

    So a derivative that is zero but for rounding has no error to speak of.

    Args:
        block: the derivative.
        out: the output.
        by: the input or parameter.
    """
    found, size, moved = (float(x.detach().abs().max()) if x.numel() else 0.0 for x in (block, out, by))
    return max(found, differences.ZERO * size / moved) if moved else found


def _compare(
    quantity: str,
    reference: str,
    found: Tensor,
    wanted: Tensor,
    rtol: float,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Comparison:
    """Compare one quantity, `(rows, ...)`.

    Args:
        quantity: its name.
        reference: what `wanted` is from.
        found: of the compiled model.
        wanted: the reference.
        rtol: tolerance.
        rows: a mask of those to compare.
        scale: what errors are measured by; the largest entry of the reference if not given.
    """
    a, b = found.detach().cpu().to(torch.float64), wanted.detach().cpu().to(torch.float64)
    total = a.shape[0]
    index = torch.arange(total) if rows is None else rows.cpu().nonzero().squeeze(-1)
    if not len(index):
        return Comparison(quantity, reference, 0, total, 0.0, -1, rtol, False)
    try:
        b = b.expand(a.shape)
    except RuntimeError:
        # Of another shape, it is another quantity.
        return Comparison(quantity, reference, len(index), total - len(index), inf, int(index[0]), rtol, False)
    a, b = a[index].reshape(len(index), -1), b[index].reshape(len(index), -1)
    if scale is None:
        scale = float(b.abs().max()) if b.numel() else 0.0
    apart = (a - b).abs().amax(-1) if b.numel() else torch.zeros(len(index))
    worst, at = apart.max(0)
    ratio = float(worst) / scale if scale else float(worst)
    return Comparison(quantity, reference, len(index), total - len(index), ratio, int(index[at]), rtol, ratio <= rtol)
