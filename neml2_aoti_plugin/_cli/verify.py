"""`neml2-aoti verify`: does a compiled model do what its source does? Values and derivatives, quantity by quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import click
import torch
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from .._files import require_writable
from ..errors import InputError
from .options import refuse_together
from .output import Report, figure, literal, require_drawable, table, written
from .points import ChosenPoints, EvaluatedPoints, Pair, choose_points, evaluate, largest
from .references import EagerSource, Reference, differences, golden_beside, read_golden, write_golden
from .target import Target, leaf_name

# Finite differences are no better than this, by the model's dtype.
DIFFERENCE_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3}
# What is compared where the compiled model gives numbers that are not finite.
FINITE = "finite numbers"


@dataclass(frozen=True)
class Comparison:
    """One quantity against its reference."""

    quantity: str  # an output, or a derivative such as `d(stress)/d(strain)`
    reference: str  # `source`, `differences` or `golden`
    rows: int  # how many points were compared
    left_out: int  # how many were not: differences with two steps disagree there
    # the largest difference of an entry, over the largest entry of the reference; of a derivative that is zero but for
    # rounding, over 1e-5 of its output over its input
    worst: float
    worst_row: int  # the point where that is; -1 where nothing was compared
    tolerance: float  # what `worst` may be at most
    passed: bool  # whether it is, and something was compared


@dataclass(frozen=True)
class Verification(Report):
    """What `verify` found."""

    artifact: str  # its path
    model: str  # name of the model
    leaf: str  # as `device/dtype`
    points: str  # where they come from, in words
    rows: int  # how many there are
    # at how many of them the compiled model did not converge, or gave what is not finite; they are left out
    not_converged: int
    comparisons: tuple[Comparison, ...]  # one for each quantity and reference
    not_compared: tuple[str, ...]  # quantities without a reference, and why
    recorded: str | None  # the golden file that was written; null if none was, as when a comparison failed
    passed: bool  # whether all comparisons passed
    picture: str | None  # the file that was drawn; null if none was

    @property
    def fine(self) -> bool:
        return self.passed

    def render(self) -> Iterator[str | Text | Table]:
        count = self.not_converged
        apart = f"; {count} did not converge, or are not finite, and are left out" if count else ""
        yield f"{self.model} ({self.leaf}) at {self.rows} points ({self.points}){apart}"
        # Only the names of quantities may be broken, in a narrow terminal.
        numbers = [Column(title, justify="right", no_wrap=True) for title in ("points", "worst", "at", "limit", "")]
        errors = table(Column("quantity", overflow="fold"), Column("reference", no_wrap=True), *numbers)
        for found in self.comparisons:
            errors.add_row(
                found.quantity,
                found.reference,
                f"{found.rows} (-{found.left_out})" if found.left_out else str(found.rows),
                f"{found.worst:.1e}" if found.rows else "-",
                str(found.worst_row) if found.rows else "-",
                f"{found.tolerance:.0e}",
                Text("passed", "green") if found.passed else Text("FAILED", "bold red"),
            )
        yield errors
        if any(found.left_out for found in self.comparisons):
            yield "(-N): so many points were left out, because the two steps of the differences disagree there"
        for text in self.not_compared:
            yield Text.assemble(("not compared", "yellow"), f" {text}")
        yield from written(self.recorded, self.picture)


def verify(
    target: Target,
    against: Path | None,
    source_model: str | None,
    golden: Path | None,
    record: Path | None,
    points: Path | None,
    driver: str | None,
    rows: int,
    seed: int,
    scales: Mapping[str, float],
    rtol: float,
    difference_rtol: float | None,
    picture: Path | None,
) -> Verification:
    """Compare a model with its source, a golden file, or finite differences; draw and record what was asked for."""
    if source_model is not None and against is None:
        raise click.UsageError("--source-model names a model in INPUT.i. Give that file as well: --against INPUT.i")
    refuse_together({"--golden": golden, "--points": points, "--driver or --scale": driver or scales})
    require_drawable(picture)
    if record is not None:
        require_writable(record, [*target.files(), *(file for file in (against, golden, points) if file is not None)])
    model, metadata = target.load(), target.metadata()
    if not any((golden, against, record, points, driver, scales)):
        golden = golden_beside(target)
    recorded = None if golden is None else read_golden(golden, model, target.model)
    at = choose_points(target, model, points, driver, rows, seed, scales) if recorded is None else recorded.points
    found = evaluate(model, at)
    not_converged = at.rows - found.points.rows
    # Comparisons, and in words what is not compared, and why.
    verdicts: list[Comparison | str] = []
    if against is not None:
        source = EagerSource(against, source_model or target.model, model, metadata.aliases)
        verdicts += _with(source.reference(found.points.inputs, found.blocks), found, rtol)
        if len(found.not_finite):
            verdicts.append(_finite(source, found, at, rtol))
    if recorded is not None:
        if not_converged:
            raise InputError(
                f"the model converges at {found.points.rows} of the {at.rows} points of {at.source} only, and has "
                "converged at all of them when that was recorded. `neml2-aoti inspect` shows the solver's settings."
            )
        verdicts += _with(Reference("golden", recorded.outputs, recorded.blocks), found, rtol)
    if against is None and recorded is None:
        verdicts.append("values: no source (--against INPUT.i) and no golden file (--golden FILE)")
    compared = {verdict.quantity for verdict in verdicts if isinstance(verdict, Comparison)}
    left = [pair for pair in found.blocks if _derivative(pair) not in compared]
    limit = DIFFERENCE_RTOL[model.dtype] if difference_rtol is None else difference_rtol
    verdicts += _with(differences(model, found, left), found, limit)
    comparisons = tuple(verdict for verdict in verdicts if isinstance(verdict, Comparison))
    not_compared = tuple(verdict for verdict in verdicts if isinstance(verdict, str))
    if not comparisons and record is None:
        raise InputError(
            f"there is nothing to compare of {target.model}: {'; '.join(not_compared)}. Name its source (--against "
            "INPUT.i) or a golden file (--golden FILE), or record one (--record FILE)."
        )
    passed = all(comparison.passed for comparison in comparisons)
    if record is not None and passed:
        write_golden(record, target.model, metadata.digest, found)
    report = Verification(
        artifact=str(target.artifact),
        model=target.model,
        leaf=leaf_name(target.place()),
        points=at.source,
        rows=at.rows,
        not_converged=not_converged,
        comparisons=comparisons,
        not_compared=not_compared,
        recorded=str(record) if record is not None and passed else None,
        passed=passed,
        picture=None if picture is None else str(picture),
    )
    if picture is not None:
        _draw(report, picture)
    return report


def _draw(report: Verification, path: Path) -> None:
    """Draw the worst error of each quantity, and its tolerance."""
    shown = report.comparisons[::-1]
    places = range(len(shown))
    # What agrees to the last bit has no place on a logarithmic axis.
    least = 1e-17
    with figure(path, 7.0, 1.5 + 0.32 * max(len(shown), 1)) as (axes,):
        colours = ["C2" if found.passed else "C3" for found in shown]
        errors = [max(found.worst, least) for found in shown]
        axes.scatter(errors, places, color=colours, zorder=3, label="largest error")
        limits = [found.tolerance for found in shown]
        axes.scatter(limits, places, marker="|", s=160, linewidth=2.0, color="0.4", label="tolerance")
        axes.set_yticks(places, [literal(f"{found.quantity} ({found.reference})") for found in shown])
        axes.set_xscale("log")
        axes.set_xlim(least / 2, 10.0 * max([1e-5, *filter(isfinite, (*errors, *limits))]))
        axes.set_ylim(-0.7, len(shown) - 0.3)
        none = " (at the left end: none)" if min(errors, default=1.0) == least else ""
        axes.set_xlabel(f"error, over the largest entry of the quantity{none}")
        axes.figure.suptitle(literal(f"{report.model} ({report.leaf}), {report.rows} points"))
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _with(reference: Reference, found: EvaluatedPoints, rtol: float) -> Iterator[Comparison | str]:
    """Compare with all that a reference gives, quantity by quantity; of the rest it is said why not."""
    for name, wanted in reference.outputs.items():
        yield _compare(name, reference.kind, found.outputs[name], wanted, rtol)
    for pair, block in found.blocks.items():
        if pair in reference.blocks:
            wanted, rows = reference.blocks[pair], reference.smooth.get(pair)
            scale = found.scale_of(pair, wanted if rows is None else wanted[rows])
            yield _compare(_derivative(pair), reference.kind, block, wanted, rtol, rows, scale)
    where = " with the source" if reference.kind == "source" else ""
    yield from (f"{_derivative(pair)}{where}: {why}" for pair, why in reference.missing.items())


def _finite(source: EagerSource, found: EvaluatedPoints, points: ChosenPoints, rtol: float) -> Comparison | str:
    """Whether the source has numbers that are not finite either, where the compiled model has such."""
    rows = found.not_finite
    inputs = {name: value.cpu()[rows] for name, value in points.inputs.items()}
    try:
        given = source.reference(inputs, found.blocks)
    except InputError as error:
        return f"{FINITE} with the source: {error}"
    finite = torch.ones(len(rows), dtype=torch.bool)
    for value in (*given.outputs.values(), *given.blocks.values()):
        entries = torch.isfinite(value)
        whole = entries.ndim and len(entries) == len(rows)
        finite &= entries.reshape(len(rows), -1).all(1) if whole else entries.all()
    wrong = finite.nonzero().squeeze(-1)
    at = int(rows[wrong[0] if len(wrong) else 0])
    return Comparison(FINITE, "source", len(rows), 0, inf if len(wrong) else 0.0, at, rtol, not len(wrong))


def _compare(
    quantity: str,
    reference: str,
    found: Tensor,
    wanted: Tensor,
    rtol: float,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Comparison:
    """Compare one quantity, `(rows, ...)`, at the rows of a mask; `scale` is the largest entry if it is not given."""
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
    scale = largest(b) if scale is None else scale
    apart = (a - b).abs().amax(-1) if b.numel() else torch.zeros(len(index))
    worst, at = apart.max(0)
    ratio = float(worst) / scale if scale else float(worst)
    return Comparison(quantity, reference, len(index), total - len(index), ratio, int(index[at]), rtol, ratio <= rtol)


def _derivative(pair: Pair) -> str:
    """What a derivative is called in reports."""
    return f"d({pair[0]})/d({pair[1]})"
