"""What the shapes of tensors say of their batch, sub-batches and types, where nothing else does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]

# The types that are told by shapes; a last axis of any other size is no base axis.
BASES: dict[str, Shape] = {"Scalar": (), "SR2": (6,), "Vec": (3,), "R2": (3, 3)}


@dataclass(frozen=True)
class Layout:
    """What the axes of a variable are: `(*batch, *sub_batch, *base)`.

    Args:
        type: neml2's name of its type.
        sites: number of sub-batch axes.
    """

    type: str
    sites: int = 0


def layouts(shapes: Mapping[str, Shape], outputs: Collection[str] = ()) -> list[dict[str, Layout]]:
    """How the tensors of a run may be read, from their shapes alone.

    For each batch that the tensors may have in common, each is taken as what fits it best. The best are those batches
    with the fewest sub-batch axes and the fewest tensors that have not the whole batch. Six numbers may then still be
    the components of one point, or a scalar at six; several batch axes are taken only where nothing else fits.

    Args:
        shapes: of each variable.
        outputs: names of those that have the whole batch also where they are single numbers.

    Returns:
        The readings, by variable; one if the shapes leave no choice.
    """
    leads = {lead for shape in shapes.values() for kind in BASES if (lead := _lead(shape, kind)) is not None}
    found = []
    for batch in sorted(leads, key=lambda lead: (len(lead), lead)):
        fits = {name: _fit(shape, batch, name in outputs) for name, shape in shapes.items()}
        found.append((sum(cost for cost, _ in fits.values()), batch, {name: fit for name, (_, fit) in fits.items()}))
    least = min((cost for cost, _, _ in found), default=0)
    best = [(batch, read) for cost, batch, read in found if cost == least]
    few = [read for batch, read in best if len(batch) <= max(1, len(best[0][0]))]
    return [read for number, read in enumerate(few) if read not in few[:number]]


def _lead(shape: Shape, kind: str) -> Shape | None:
    """The axes before the base axes of a type; None if the shape has no such base axes."""
    base = BASES[kind]
    lead = len(shape) - len(base)
    return shape[:lead] if lead >= 0 and shape[lead:] == base else None


def _fit(shape: Shape, batch: Shape, output: bool) -> tuple[int, Layout]:
    """What a tensor is beside a batch, and how badly it fits: its sub-batch axes, and one if it lacks the batch."""
    found = []
    for kind in BASES:
        lead = _lead(shape, kind)
        if lead is None:
            continue
        sites = 0 if _broadcasts(lead, batch) else len(lead) - (len(batch) if lead[: len(batch)] == batch else 0)
        # A single number is the same for all points, unless the model gave it.
        says = output or prod(shape) > 1
        lacks = says and lead[: len(lead) - sites] != batch
        found.append((sites + lacks, Layout(kind, sites)))
    return min(found, key=lambda fit: fit[0])


def _broadcasts(lead: Shape, batch: Shape) -> bool:
    return len(lead) <= len(batch) and all(a in (1, b) for a, b in zip(lead[::-1], batch[::-1], strict=False))
