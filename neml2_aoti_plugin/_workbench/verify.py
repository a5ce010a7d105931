"""Does a compiled model do what its source does? Values and derivatives against a reference, quantity by quantity."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch

from .._artifact.layout import root_of
from .._files import require_writable
from ..errors import InputError
from ..model import Model
from . import differences
from .comparison import Comparison, compare, derivative
from .describe import name_of
from .eager import Source
from .evaluation import Evaluated, Where, choose_points, evaluate
from .golden import Blocks, Golden, beside, read_golden, write_golden
from .points import Points
from .target import Target

RTOL = 1e-6
# What is compared where the compiled model gives numbers that are not finite.
FINITE = "finite numbers"
# Finite differences are no better than this.
DIFFERENCE_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3}


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        artifact: its path.
        model: name of the model.
        leaf: as `device/dtype`.
        points: where they come from, in words.
        rows: how many there are.
        not_converged: at how many of them the compiled model did not converge, or gave what is not finite; they are
            left out.
        comparisons: one for each quantity and reference.
        not_compared: quantities without a reference, and why.
        recorded: the golden file that was written; null if none was, as when a comparison failed.
        passed: whether all comparisons passed.
        picture: the file that was drawn; null if none was.
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
    picture: str | None = None


@dataclass(frozen=True)
class Wanted:
    """Where to evaluate, and what to compare with.

    Args:
        against: input file with the eager model.
        source_model: name of that model; the compiled one's if None.
        golden: a golden file; the one beside the artifact, if there is one and no points or source are asked for.
        where: which points; a golden file has its own.
        rtol: tolerance against source and golden file.
        difference_rtol: tolerance against finite differences; `DIFFERENCE_RTOL` of the model's dtype if None.
    """

    against: Path | None = None
    source_model: str | None = None
    golden: Path | None = None
    where: Where = field(default_factory=Where)
    rtol: float = RTOL
    difference_rtol: float | None = None


def verify(
    target: Target,
    wanted: Wanted,
    device: str | None = None,
    dtype: str | None = None,
    *,
    record: Path | None = None,
) -> Verification:
    """Hold a compiled model against its source, finite differences, or a golden file.

    Args:
        target: the model.
        wanted: points and references.
        device: of the leaf.
        dtype: of the leaf.
        record: a golden file to write, with what the model gives at the points, unless a comparison fails.

    Returns:
        What was found.

    Raises:
        InputError: there is nothing to compare with, or an argument does not fit the model.
        ArtifactError: the artifact cannot run here.
    """
    if record is not None:
        read = (wanted.against, wanted.golden, wanted.where.points)
        require_writable(record, [*target.files(device, dtype), *(file for file in read if file is not None)])
    model = target.load(device, dtype)
    golden_file = wanted.golden or (_golden_beside(target, wanted) if record is None else None)
    golden = None if golden_file is None else read_golden(golden_file, model, target.model)
    points = golden.points if golden is not None else choose_points(target, model, wanted.where)
    found, not_converged = evaluate(model, points)
    source = None
    metadata = target.metadata(device, dtype)
    if wanted.against is not None:
        source = Source(wanted.against, wanted.source_model or target.model, model, metadata.aliases)
    comparisons: list[Comparison] = []
    not_compared: list[str] = []
    if source is not None:
        with_source, cannot = _with_source(source, found, points, wanted.rtol)
        comparisons += with_source
        not_compared += cannot
    if golden is not None:
        comparisons += _with_golden(golden, found, points, wanted.rtol)
    if source is None and golden is None:
        not_compared.append("values: no source (--against INPUT.i) and no golden file (--golden FILE)")
    compared = {c.quantity for c in comparisons}
    left = {pair: block for pair, block in found.blocks.items() if derivative(*pair) not in compared}
    difference_rtol = DIFFERENCE_RTOL[model.dtype] if wanted.difference_rtol is None else wanted.difference_rtol
    more, cannot = _with_differences(model, found, left, difference_rtol)
    comparisons += more
    not_compared += cannot
    if not comparisons and record is None:
        raise InputError(
            f"there is nothing to compare of {target.model}: {'; '.join(not_compared)}. Name its source (--against "
            "INPUT.i) or a golden file (--golden FILE), or record one (--record FILE)."
        )
    passed = all(comparison.passed for comparison in comparisons)
    if record is not None and passed:
        write_golden(record, target.model, Golden(found.points, found.outputs, found.blocks, metadata.digest))
    place = target.place(device, dtype)
    return Verification(
        artifact=str(target.artifact),
        model=target.model,
        leaf=f"{place.device.type}/{name_of(place)}",
        points=points.source,
        rows=points.rows,
        not_converged=not_converged,
        comparisons=tuple(comparisons),
        not_compared=tuple(not_compared),
        recorded=str(record) if record is not None and passed else None,
        passed=passed,
    )


def _golden_beside(target: Target, wanted: Wanted) -> Path | None:
    """The golden file that lies beside the artifact, unless something else is asked for."""
    if wanted.against is not None or wanted.where.asked_for:
        return None
    found = beside(root_of(target.artifact))
    return found if found.is_file() else None


def _with_source(source: Source, found: Evaluated, points: Points, rtol: float) -> tuple[list[Comparison], list[str]]:
    """What the source gives is compared, quantity by quantity; of the rest it is said why not."""
    inputs = {name: value.cpu() for name, value in found.points.inputs.items()}
    values = source.outputs(inputs)
    comparisons = [compare(n, "source", found.outputs[n], values[n], rtol) for n in found.outputs]
    blocks, missing = source.blocks(inputs, list(found.blocks))
    for pair, block in found.blocks.items():
        if pair in blocks:
            scale = found.scale(pair, blocks[pair])
            comparisons.append(compare(derivative(*pair), "source", block, blocks[pair], rtol, scale=scale))
    cannot = [f"{derivative(*pair)} with the source: {why}" for pair, why in missing.items()]
    if len(found.not_finite):
        try:
            comparisons.append(_finite(source, found, points, rtol))
        except InputError as error:
            cannot.append(f"{FINITE} with the source: {error}")
    return comparisons, cannot


def _finite(source: Source, found: Evaluated, points: Points, rtol: float) -> Comparison:
    """Whether the source has numbers that are not finite either, where the compiled model has such."""
    rows = found.not_finite
    inputs = {name: value.cpu()[rows] for name, value in points.inputs.items()}
    given = [*source.outputs(inputs).values(), *source.blocks(inputs, list(found.blocks))[0].values()]
    finite = torch.ones(len(rows), dtype=torch.bool)
    for value in given:
        entries = torch.isfinite(value)
        whole = entries.ndim and len(entries) == len(rows)
        finite &= entries.reshape(len(rows), -1).all(1) if whole else entries.all()
    wrong = finite.nonzero().squeeze(-1)
    at = int(rows[wrong[0] if len(wrong) else 0])
    return Comparison(FINITE, "source", len(rows), 0, inf if len(wrong) else 0.0, at, rtol, not len(wrong))


def _with_golden(golden: Golden, found: Evaluated, points: Points, rtol: float) -> list[Comparison]:
    """Compare with a golden file; a point where the model no longer converges is a difference."""
    if found.points.rows != points.rows:
        raise InputError(
            f"the model converges at {found.points.rows} of the {points.rows} points of {points.source} only, and has "
            "converged at all of them when that was recorded. `neml2-aoti inspect` tells the solver's settings."
        )
    comparisons = [compare(n, "golden", found.outputs[n], golden.outputs[n], rtol) for n in found.outputs]
    for pair, block in found.blocks.items():
        if pair in golden.blocks:
            scale = found.scale(pair, golden.blocks[pair])
            comparisons.append(compare(derivative(*pair), "golden", block, golden.blocks[pair], rtol, scale=scale))
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
            comparisons.append(compare(quantity, "differences", block, taken.block, rtol, taken.smooth, scale))
    return comparisons, cannot
