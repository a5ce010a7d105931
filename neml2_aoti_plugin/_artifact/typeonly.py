"""The steps from schemas 2 and 3, whose files tell the types of variables instead of their shapes.

Neither tells what derivatives were asked for: there are all that the graphs can give. Both keep Newton settings in each
implicit segment, and lay the derivatives of unknowns by givens into one matrix per pair of groups.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

from ..errors import ArtifactError
from .reading import Node, entry, names, shape, text, whole

Document = dict[str, Any]

# `Rot` became `MRP` in 3.0.6.
BASE_SHAPES: dict[str, list[int]] = {
    "Scalar": [],
    "Vec": [3],
    "WR2": [3],
    "Rot": [3],
    "MRP": [3],
    "MillerIndex": [3],
    "Quaternion": [4],
    "SR2": [6],
    "R2": [3, 3],
    "SSR4": [6, 6],
}


def from_2(document: Node) -> Document:
    """Schema 2 to 3: flat vectors become one dense group each, and the one matrix of derivatives one cell or blocks."""
    segments = [
        _flat_implicit(s) if s.at("kind").value == "implicit" else _flat_forward(s) for s in segments_of(document)
    ]
    return {**document.value, "segments": segments}


def from_3(document: Node) -> Document:
    """Schema 3 to 7: shapes come from types, all pairs that can be are derivatives, cells become pairs."""
    inputs, outputs = ([_with_base_shape(v) for v in document.at(key).items()] for key in ("inputs", "outputs"))
    segments = [_celled(s) if s.at("kind").value == "implicit" else _unordered(s) for s in segments_of(document)]
    pairs = [[out, wrt] for out, wrts in _differentiable(document).items() for wrt in wrts]
    # Whatever was promoted, the graphs were traced with its value in double precision.
    parameters = [{**entry(p), "dtype": "float64"} for p in document.at("parameters").items()]
    changed = {"inputs": inputs, "outputs": outputs, "segments": segments, "parameters": parameters}
    return {"derivatives": pairs, "parameter_derivatives": [], **document.value, **changed}


def segments_of(document: Node) -> list[Node]:
    """The segments, each of them an object with a kind."""
    found = document.at("segments").items()
    for segment in found:
        text(segment.at("kind"))
    return found


def base_shape(variable: Node) -> list[int]:
    """The base shape of a variable from its type.

    Args:
        variable: its entry, with `name` and `var_type`.

    Returns:
        The shape.

    Raises:
        ArtifactError: the type is not known.
    """
    kind = text(variable.at("var_type"))
    if kind not in BASE_SHAPES:
        raise ArtifactError(
            f"{variable.file}: variable {text(variable.at('name'))!r} has type {kind!r}, whose shape the file does not "
            f"tell; known are {', '.join(BASE_SHAPES)}. Compile the model again with neml2 3.0.4 or later."
        )
    return BASE_SHAPES[kind]


def _with_base_shape(variable: Node) -> Document:
    """A variable of the model with its base shape; its size in the file must agree."""
    base = list(shape(variable.at("base_shape"))) if "base_shape" in variable else base_shape(variable)
    if whole(variable.at("var_size")) != prod(base):
        raise variable.at("var_size").fail(f"{prod(base)}, the number of entries of a {text(variable.at('var_type'))}")
    return {**variable.value, "base_shape": base}


def _offsets(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _blocks(rows: list[Document], columns: list[Document], output: int) -> list[Document]:
    """Pairs that lie side by side in one matrix.

    Args:
        rows: variables with `name`, `extent` and `shape` of what is differentiated.
        columns: likewise by which.
        output: index of the matrix among the graph's outputs.

    Returns:
        The pairs, row after row.
    """
    return [
        {
            "out_var": out["name"],
            "in_var": wrt["name"],
            "out_base_shape": out["shape"],
            "in_base_shape": wrt["shape"],
            "output": output,
            "row_offset": row,
            "col_offset": column,
        }
        for row, out in zip(_offsets([v["extent"] for v in rows]), rows, strict=True)
        for column, wrt in zip(_offsets([v["extent"] for v in columns]), columns, strict=True)
    ]


def _flat_forward(segment: Node) -> Document:
    """A forward segment whose Jacobian is one matrix over all outputs and inputs."""
    rows, columns = (
        [
            {"name": text(v.at("name")), "extent": whole(v.at("var_size")), "shape": base_shape(v)}
            for v in segment.at(key).items()
        ]
        for key in ("outputs", "inputs")
    )
    return {"jacobian_pairs": _blocks(rows, columns, 0), **segment.value}


def _flat_implicit(segment: Node) -> Document:
    """An implicit segment that takes its unknowns as one vector, its givens as another, and returns the new iterate."""
    unknowns, givens = ([_flat_variable(v) for v in segment.at(key).items()] for key in ("unknowns", "givens"))
    # The file does not name the residuals; there is one for each unknown, of the same size.
    groups = {"unknown": unknowns, "residual": unknowns, "given": givens}
    return {
        **segment.value,
        **{
            f"{kind}_group_infos": [{"structure": "dense", "per_var_info": members}] for kind, members in groups.items()
        },
        "unknowns": unknowns,
        "givens": givens,
        "ift_cells": [{"row_structure": "dense", "col_structure": "dense", "row_vars": unknowns, "col_vars": givens}],
        "step_returns": "iterate",
    }


def _flat_variable(variable: Node) -> Document:
    """A variable of an implicit segment, whose shape is given with its sites in front."""
    natural, base = list(shape(variable.at("unflattened_shape"))), base_shape(variable)
    sites = len(natural) - len(base)
    if sites < 0 or natural[sites:] != base or prod(natural) != whole(variable.at("var_size")):
        entries = whole(variable.at("var_size"))
        raise variable.at("unflattened_shape").fail(f"the shape of {entries} entries that ends in {base}")
    return {**variable.value, "base_shape": base, "sub_batch_shape": natural[:sites]}


def _unordered(segment: Node) -> Document:
    """A forward segment whose graphs may take promoted parameters among its inputs."""
    promoted = "param_inputs" in segment and bool(names(segment.at("param_inputs")))
    return {**segment.value, "parameters_among_inputs": promoted}


def _celled(segment: Node) -> Document:
    """An implicit segment with one matrix of derivatives per pair of groups, and with its own Newton settings."""
    pairs = []
    for output, cell in enumerate(segment.at("ift_cells").items() if "ift_cells" in segment else []):
        if any(_summed(v, cell.at("col_structure").value) for v in cell.at("col_vars").items()):
            continue
        rows, columns = (
            [_cell_variable(v, cell.at(f"{side}_structure").value) for v in cell.at(f"{side}_vars").items()]
            for side in ("row", "col")
        )
        pairs += _blocks(rows, columns, output)
    settings = {key: segment.value[key] for key in ("atol", "rtol", "miters") if key in segment}
    if "linesearch" in segment:
        search = {"type": "ls_type", "max_iters": "ls_max_iters", "cutback": "ls_cutback", "c": "ls_c"}
        given = segment.at("linesearch")
        settings |= {new: given.at(old).value for old, new in search.items() if old in given}
    return {**segment.value, "newton": settings, **({"jacobian_pairs": pairs} if pairs else {})}


def _summed(given: Node, structure: object) -> bool:
    """Whether cells hold only the sum of the derivatives by all sites of a given: 3.0.3 sums over a block's columns."""
    return structure == "block" and "sub_batch_shape" in given and bool(shape(given.at("sub_batch_shape")))


def _differentiable(document: Node) -> dict[str, list[str]]:
    """Of each output, the inputs by which the graphs give its derivative: all but those that sums stand between."""
    inputs = [text(v.at("name")) for v in document.at("inputs").items()]
    reaching = {name: {name} for name in inputs}
    lost: dict[str, set[str]] = {name: set() for name in inputs}
    for segment in segments_of(document):
        if segment.at("kind").value == "implicit":
            groups = segment.at("given_group_infos").items()
            givens = {
                text(v.at("name")): _summed(v, group.value.get("structure"))
                for group in groups
                for v in group.at("per_var_info").items()
            }
            found = names(segment.at("unknowns"))
        else:
            givens, found = dict.fromkeys(names(segment.at("inputs")), False), names(segment.at("outputs"))
        through = set().union(*(reaching.get(name, set()) for name in givens))
        gone = set().union(*((reaching if summed else lost).get(name, set()) for name, summed in givens.items()))
        reaching |= dict.fromkeys(found, through)
        lost |= dict.fromkeys(found, gone)
    outputs = [text(v.at("name")) for v in document.at("outputs").items()]
    return {out: [name for name in inputs if name not in lost.get(out, set())] for out in outputs}


def _cell_variable(variable: Node, structure: object) -> Document:
    """A variable as a row or column of a cell: all its sites on a dense side, one of them on a block side."""
    base = shape(variable.at("base_shape"))
    sites = shape(variable.at("sub_batch_shape")) if "sub_batch_shape" in variable else ()
    if structure == "block":
        return {"name": text(variable.at("name")), "extent": prod(base), "shape": list(base)}
    return {"name": text(variable.at("name")), "extent": prod(sites + base), "shape": list(sites + base)}
