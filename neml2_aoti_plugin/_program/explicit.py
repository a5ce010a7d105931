"""Explicit segments: one graph call for the values, or one for values and derivative blocks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from .._artifact.schema import DerivativePair, ExplicitInfo, PairGraph, Variable
from .._graphs.graph import Graph
from ..errors import DerivativeNotCompiledError
from .systems import check_arity
from .values import PER_SITE, Columns, State, Tangents, Values, add, times

Sites = tuple[int, ...]


class ExplicitSegment:
    """An explicit segment (neml2 calls it forward) with its graphs."""

    def __init__(
        self, spec: ExplicitInfo, graphs: Mapping[str, Graph], per_row: bool, known: Mapping[str, Variable]
    ) -> None:
        self.spec, self.graphs = spec, graphs
        self._per_row = per_row
        # Parameters that the graphs take once for all rows.
        self.common_parameters = () if per_row else spec.parameters
        # Number of axes of an output that depends on no input, and so has no rows.
        self._bare = [len(known[name].base_shape) if name in known else -1 for name in spec.outputs]

    def run(
        self,
        state: State,
        values: Values,
        rows: int,
        tangents: Tangents | None = None,
        parameters: frozenset[str] = frozenset(),
    ) -> None:
        """Evaluate the outputs into `state`, and their derivatives by seeds and `parameters` into `tangents`."""
        spec = self.spec
        of = spec.jacobian if tangents and any(tangents.get(name) for name in spec.inputs) else None
        file, count = (spec.value, len(spec.outputs)) if of is None else (of.file, _count(of))
        outputs = self._call(file, state, values, rows, count)
        for name, value, bare in zip(spec.outputs, outputs, self._bare, strict=False):
            state[name] = value.expand(rows, *value.shape) if value.ndim == bare else value
        if tangents is None:
            return
        found: dict[str, Columns] = {name: {} for name in spec.outputs}
        for pair, block in _blocks(outputs, of) if of is not None else ():
            value = state[pair.out]
            sites = tuple(value.shape[1 : value.ndim - len(pair.out_base_shape)])
            for seed, column in tangents.get(pair.wrt, {}).items():
                if seed[0] == PER_SITE:
                    spread = _on_sites(block, sites or pair.wrt_sub_batch_shape, pair, file)
                    term = spread.reshape((*spread.shape[:-2], *pair.out_base_shape, *pair.wrt_base_shape))
                else:
                    term = contract(block, pair, sites, column, file)
                add(found[pair.out], seed, term)
        own = spec.parameter_jacobian
        if own is not None and any(pair.wrt in parameters for pair in own.pairs):
            outputs = self._call(own.file, state, values, rows, _count(own))
            for pair, block in _blocks(outputs, own):
                if pair.wrt in parameters:
                    add(found[pair.out], ("parameter", pair.wrt), block.flatten(1, -2))
        tangents.update(found)

    def _call(self, file: str, state: State, values: Values, rows: int, expected: int) -> list[Tensor]:
        """What one of its graphs gives, each output `(rows or 1, ...)`."""
        spec, graph = self.spec, self.graphs[file]
        inputs = [state[name] for name in spec.inputs]
        if self._per_row:
            outputs = graph(inputs + values.expanded(spec.parameters, rows), order=spec.order)
        else:
            outputs = graph(inputs, values.common(spec.parameters), order=spec.order)
        check_arity(graph, outputs, expected)
        return outputs


def _count(of: PairGraph) -> int:
    """Number of outputs of a graph of derivatives."""
    return of.skip + max((pair.output + 1 for pair in of.pairs), default=0)


def _blocks(outputs: list[Tensor], of: PairGraph) -> Iterator[tuple[DerivativePair, Tensor]]:
    """The derivative blocks among a graph's outputs, `(rows or 1, *sites, out, wrt)`.

    An output is `(rows or 1, *sites, *out_base, *wrt_base)`, or a matrix that pairs are cut out of.
    """
    for pair in of.pairs:
        output = outputs[of.skip + pair.output]
        if pair.row is not None and pair.column is not None:
            yield pair, output[..., pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns]
            continue
        base = pair.out_base_shape + pair.wrt_base_shape
        lead = output.ndim - len(base)
        if tuple(output.shape[lead:]) != base:
            raise _unsupported(pair, of.file, f"has shape {tuple(output.shape)}, which does not end in {base}")
        yield pair, output.reshape((*output.shape[:lead], pair.rows, pair.columns))


def contract(block: Tensor, pair: DerivativePair, out_sites: Sites, column: Tensor | None, file: str) -> Tensor:
    """Multiply an explicit block `(rows or 1, *sites, out, wrt)` with the derivative of the variable it is by.

    `column` is `(rows or 1, entries of wrt, m)`, None for the identity; gives `(rows or 1, entries of out, m)`.
    """
    rows, wrt_sites = block.shape[0], pair.wrt_sub_batch_shape
    if block.ndim == 3 and not out_sites and not wrt_sites:
        return times(block, column)
    if not wrt_sites:
        spread = _on_sites(block, out_sites, pair, file)
        return times(spread.reshape((rows, prod(out_sites) * pair.rows, pair.columns)), column)
    if out_sites and out_sites != wrt_sites:
        what = f"leads from sites {wrt_sites} to sites {out_sites}, over sites {tuple(block.shape[1:-2])}"
        raise _unsupported(pair, file, what)
    count = prod(wrt_sites)
    flat = _on_sites(block, wrt_sites, pair, file).reshape((rows, count, pair.rows, pair.columns))
    if column is not None:
        by_site = torch.matmul(flat, column.reshape((column.shape[0], count, pair.columns, column.shape[-1])))
        return by_site.flatten(1, 2) if out_sites else by_site.sum(1)
    if not out_sites:
        return flat.permute(0, 2, 1, 3).reshape((rows, pair.rows, count * pair.columns))
    # The derivative at a site by the same site alone.
    whole = torch.diag_embed(flat.movedim(1, -1))
    return whole.permute(0, 3, 1, 4, 2).reshape((rows, count * pair.rows, count * pair.columns))


def _on_sites(block: Tensor, sites: Sites, pair: DerivativePair, file: str) -> Tensor:
    """Bring a block's site axes to the given ones; surplus axes must have extent 1."""
    rows, *have = block.shape[:-2]
    if tuple(have) == sites:
        return block
    while len(have) > len(sites) and 1 in have:
        # The last of them.
        del have[len(have) - 1 - have[::-1].index(1)]
    lead = (1,) * (len(sites) - len(have))
    if len(have) > len(sites) or any(h not in (1, s) for h, s in zip((*lead, *have), sites, strict=True)):
        raise _unsupported(pair, file, f"lies over sites {tuple(block.shape[1:-2])}, not {sites}")
    shaped = block.reshape((rows, *lead, *have, pair.rows, pair.columns))
    return shaped.expand((rows, *sites, pair.rows, pair.columns))


def _unsupported(pair: DerivativePair, file: str, what: str) -> DerivativeNotCompiledError:
    return DerivativeNotCompiledError(
        f"{file}: the block d({pair.out})/d({pair.wrt}) {what}: this kind of sub-batched derivative is not supported."
    )
