"""Derivatives carried along the segments: of each variable by each seed, as blocks of folded entries.

A seed is what is differentiated by: an input, a parameter, or a given direction of all inputs. `Tangents[v][seed]` has
shape `(rows, entries of v, m)` or `(1, ...)` where it is the same for all rows; None stands for the identity. A seed
that is absent does not reach the variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import Pair
from ..errors import DerivativeNotCompiledError

Seed = tuple[str, str]
Columns = dict[Seed, Tensor | None]
Tangents = dict[str, Columns]

# Of seeds (PER_SITE, input), which are the identity: blocks of an explicit segment stay as they are, site by site.
PER_SITE = "per site"


def add(columns: Columns, seed: Seed, term: Tensor) -> None:
    """Add a term to the derivative by a seed."""
    present = columns.get(seed)
    columns[seed] = term if present is None else present + term


def dense(columns: Columns, like: Tensor) -> dict[Seed, Tensor]:
    """The derivatives of a variable like `(rows, ...)`, with identities written out as matrices, `(1, n, n)`."""
    return {
        seed: torch.eye(prod(like.shape[1:]), dtype=like.dtype, device=like.device).unsqueeze(0)
        if value is None
        else value
        for seed, value in columns.items()
    }


def combine(terms: list[tuple[float, dict[Seed, Tensor]]]) -> Columns:
    """A linear combination of derivatives, as substepping makes of variables."""
    total: Columns = {}
    for factor, columns in terms:
        for seed, value in columns.items() if factor else ():
            add(total, seed, value if factor == 1.0 else factor * value)
    return total


def times(block: Tensor, column: Tensor | None) -> Tensor:
    """`block @ column`, both with the rows leading."""
    return block if column is None else torch.matmul(block, column)


def forward_block(output: Tensor, pair: Pair, file: str) -> Tensor:
    """View an explicit graph's output as `(rows or 1, *sites, out, wrt)`.

    It is `(rows or 1, *sites, *out_base, *wrt_base)`, or a matrix that the pair is cut out of.
    """
    if pair.row is not None and pair.column is not None:
        return output[..., pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns]
    base = len(pair.out_base_shape) + len(pair.wrt_base_shape)
    lead = output.shape[: output.ndim - base]
    if tuple(output.shape[output.ndim - base :]) != pair.out_base_shape + pair.wrt_base_shape:
        raise DerivativeNotCompiledError(
            f"{file}: the block d({pair.out})/d({pair.wrt}) has shape {tuple(output.shape)}, which does not end in "
            f"{pair.out_base_shape + pair.wrt_base_shape}: this kind of sub-batched derivative is not supported."
        )
    return output.reshape((*lead, pair.rows, pair.columns))


def contract(block: Tensor, pair: Pair, out_sites: tuple[int, ...], column: Tensor | None, file: str) -> Tensor:
    """Multiply an explicit block `(rows or 1, *sites, out, wrt)` with the derivative of the variable it is by.

    `column` is `(rows or 1, entries of wrt, m)`, None for the identity; gives `(rows or 1, entries of out, m)`.
    """
    if block.ndim == 3 and not out_sites and not pair.wrt_sub_batch_shape:
        return times(block, column)
    sites, wrt_sites = tuple(block.shape[1:-2]), pair.wrt_sub_batch_shape
    if not wrt_sites:
        spread = _on_sites(block, out_sites, pair, file)
        return times(spread.reshape((block.shape[0], prod(out_sites) * pair.rows, pair.columns)), column)
    if out_sites and out_sites != wrt_sites:
        raise DerivativeNotCompiledError(
            f"{file}: d({pair.out})/d({pair.wrt}) leads from sites {wrt_sites} to sites {out_sites} (block over "
            f"{sites}): this kind of sub-batched derivative is not supported."
        )
    spread = _on_sites(block, wrt_sites, pair, file)
    count = prod(wrt_sites)
    flat = spread.reshape((block.shape[0], count, pair.rows, pair.columns))
    if column is None:
        if not out_sites:
            return flat.permute(0, 2, 1, 3).reshape((block.shape[0], pair.rows, count * pair.columns))
        diagonal = flat.new_zeros((block.shape[0], count, pair.rows, count, pair.columns))
        k = torch.arange(count, device=flat.device)
        diagonal[:, k, :, k, :] = flat.transpose(0, 1)
        return diagonal.reshape((block.shape[0], count * pair.rows, count * pair.columns))
    by_site = torch.matmul(flat, column.reshape((column.shape[0], count, pair.columns, column.shape[-1])))
    if not out_sites:
        return by_site.sum(1)
    return by_site.reshape((by_site.shape[0], count * pair.rows, column.shape[-1]))


def per_site(block: Tensor, pair: Pair, out_sites: tuple[int, ...], file: str) -> Tensor:
    """An explicit block over the sites of its variables, `(rows or 1, *sites, *out_base, *wrt_base)`."""
    spread = _on_sites(block, out_sites or pair.wrt_sub_batch_shape, pair, file)
    return spread.reshape((*spread.shape[:-2], *pair.out_base_shape, *pair.wrt_base_shape))


def _on_sites(block: Tensor, sites: tuple[int, ...], pair: Pair, file: str) -> Tensor:
    """Bring a block's site axes to the given ones; surplus axes must have extent 1."""
    have = list(block.shape[1:-2])
    while len(have) > len(sites) and 1 in have:
        have.reverse()
        have.remove(1)
        have.reverse()
    fits = len(have) <= len(sites) and all(h in (1, s) for h, s in zip(have[::-1], sites[::-1], strict=False))
    if not fits:
        raise DerivativeNotCompiledError(
            f"{file}: the block d({pair.out})/d({pair.wrt}) lies over sites {tuple(block.shape[1:-2])}, not {sites}: "
            "this kind of sub-batched derivative is not supported."
        )
    lead = (1,) * (len(sites) - len(have))
    shaped = block.reshape((block.shape[0], *lead, *have, pair.rows, pair.columns))
    return shaped.expand((block.shape[0], *sites, pair.rows, pair.columns))


def select(tangents: Mapping[str, Columns], rows: Tensor | slice) -> Tangents:
    """The derivatives of some rows."""
    return {
        name: {seed: value if value is None or value.shape[0] == 1 else value[rows] for seed, value in columns.items()}
        for name, columns in tangents.items()
    }
