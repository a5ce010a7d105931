"""Lead a metadata document of any released schema to the newest form, one step per schema.

A step takes the form of one schema and gives that of the next; what the newest JSON has no keys for is left in those
that `parse` reads beside them. What an old file lacks is derived where it can be told, else it is an error by name.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from itertools import accumulate
from math import prod
from typing import Any

from ..errors import ArtifactError, InputError
from ..settings import NewtonSettings, newton_settings
from .reading import Node, names, shape, text, whole

Document = dict[str, Any]

NEWEST = 14
RELEASES = {2: "3.0.0 to 3.0.2", 3: "3.0.3", 7: "3.0.4 to 3.0.6", 12: "3.0.7", 14: "3.1.0"}

# Schemas 2 and 3 write the type of a variable and not its shape; `Rot` became `MRP` in 3.0.6.
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


def upgrade(document: Document, file: str, solver: dict[str, Any] | None = None) -> Document:
    """Bring a document to the newest form.

    Args:
        document: the decoded metadata; it is not changed.
        file: its path, for messages.
        solver: Newton settings that take the place of the file's, by the field names of `NewtonSettings`.

    Returns:
        The document in the form that `parse` reads.

    Raises:
        ArtifactError: the schema is not known, or the document does not fit it.
        InputError: there is no such Newton setting.
    """
    written = released_form(document, file)
    found = deepcopy(document)
    for schema, step in STEPS.items():
        if schema >= written:
            found = step(Node(found, "", file))
    return with_solver(Node(found, "", file), solver) if solver else found


def released_form(document: Document, file: str) -> int:
    """The released schema in whose form a document is: its own, or the one below an unreleased one."""
    written = document.get("schema_version")
    if not isinstance(written, int) or isinstance(written, bool):
        raise ArtifactError(
            f"{file}: schema_version is {written!r}, expected a whole number. Is this neml2-compile's file?"
        )
    if written > NEWEST:
        raise ArtifactError(
            f"{file}: written in schema {written}; this plugin reads schemas up to {NEWEST}. "
            "Update it: pip install -U neml2-aoti-plugin."
        )
    if written < min(RELEASES):
        known = ", ".join(f"{schema} (neml2 {release})" for schema, release in RELEASES.items())
        raise ArtifactError(
            f"{file}: written in schema {written}, which no neml2 release wrote; this plugin reads {known}. Compile "
            "the model again with neml2-compile."
        )
    return max(schema for schema in RELEASES if schema <= written)


def from_2(document: Node) -> Document:
    """Schema 2 to 3: flat vectors become one dense group each, and the one matrix of derivatives one cell or blocks."""
    segments = [
        _flat_implicit(s) if s.at("kind").value == "implicit" else _flat_forward(s) for s in _segments(document)
    ]
    return {**document.value, "segments": segments}


def from_3(document: Node) -> Document:
    """Schema 3 to 7: shapes come from types, all pairs are derivatives, cells become pairs, settings get one form."""
    inputs, outputs = ([_with_base_shape(v) for v in document.at(key).items()] for key in ("inputs", "outputs"))
    segments = [_celled(s) if s.at("kind").value == "implicit" else _unordered(s) for s in _segments(document)]
    pairs = [
        [text(o.at("name")), text(i.at("name"))]
        for o in document.at("outputs").items()
        for i in document.at("inputs").items()
    ]
    # Whatever was promoted, the graphs were traced with its value in double precision.
    parameters = [{**p.value, "dtype": "float64"} for p in document.at("parameters").items()]
    changed = {"inputs": inputs, "outputs": outputs, "segments": segments, "parameters": parameters}
    return {"derivatives": pairs, "parameter_derivatives": [], **document.value, **changed}


def from_7(document: Node) -> Document:
    """Schema 7 to 12: two words changed; Newton settings stay at their defaults where the stub gives none."""
    found = {
        **document.value,
        "segments": [_renamed(s.value, "rhs_package", "residual_package") for s in _segments(document)],
    }
    for key in ("inputs", "outputs"):
        found[key] = [
            {**v.value, "var_type": "MRP"} if v.value.get("var_type") == "Rot" else v.value
            for v in document.at(key).items()
        ]
    return found


def from_12(document: Node) -> Document:
    """Schema 12 to 14: nothing; the role `incremental`, which 14 writes no more, is one that the runtime has."""
    found: Document = document.value
    return found


STEPS: dict[int, Callable[[Node], Document]] = {2: from_2, 3: from_3, 7: from_7, 12: from_12}


def with_solver(document: Node, solver: dict[str, Any]) -> Document:
    """The document with other Newton settings in all its implicit segments."""
    known = [field.name for field in fields(NewtonSettings)]
    unknown = sorted(set(solver) - set(known))
    if unknown:
        raise InputError(f"solver has no setting {', '.join(unknown)}; there are {', '.join(known)}.")
    newton_settings(**solver)
    segments = [
        {**s.value, "newton": {**s.at("newton").value, **solver}} if "newton" in s else s.value
        for s in _segments(document)
    ]
    config = {**(document.value.get("solver_config") or {}), **solver}
    return {**document.value, "solver_config": config, "segments": segments}


def _segments(document: Node) -> list[Node]:
    """The segments, each of them an object with a kind."""
    found = document.at("segments").items()
    for segment in found:
        text(segment.at("kind"))
    return found


def _renamed(entries: Document, old: str, new: str) -> Document:
    return {new if key == old else key: value for key, value in entries.items()}


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
    base = variable.value["base_shape"] if "base_shape" in variable else base_shape(variable)
    if whole(variable.at("var_size")) != prod(base):
        raise variable.at("var_size").fail(f"{prod(base)}, the number of entries of a {variable.at('var_type').value}")
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
        entries = variable.at("var_size").value
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


def _cell_variable(variable: Node, structure: object) -> Document:
    """A variable as a row or column of a cell: all its sites on a dense side, one of them on a block side."""
    base = shape(variable.at("base_shape"))
    sites = shape(variable.at("sub_batch_shape")) if "sub_batch_shape" in variable else ()
    if structure == "block":
        return {"name": text(variable.at("name")), "extent": prod(base), "shape": list(base)}
    return {"name": text(variable.at("name")), "extent": prod(sites + base), "shape": list(sites + base)}
