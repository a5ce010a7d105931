"""Lead a metadata document of any released schema to the newest form, one step per schema.

A step takes a document in the form of one schema and gives one in that of the next, both as plain dicts; a form is
checked before it, so that it finds what it needs. What the newest JSON has no keys for is left in those that `schema`
reads beside them. What an old file lacks is derived where that is possible, else it is an error by name.

Schemas 2 and 3 give the types of variables instead of their shapes. Neither lists what derivatives were asked for:
there are all that the graphs can give. Both keep Newton settings in each implicit segment, and lay the derivatives of
unknowns by givens into one matrix per pair of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import prod
from typing import Any

from ..errors import ArtifactError
from .document import DocumentForm, Name, Shape, Unfit, Whole, convert
from .files import shown
from .schema import BASE_SHAPES, GroupInfo, Variable

Document = dict[str, Any]
BOUNDARY = ("inputs", "outputs")
# Lists in segments of names, or of objects with a name.
NAMES = (*BOUNDARY, "param_inputs", "param_vjp_params", "param_vjp_outputs", "predictor_inputs", "predictor_outputs")
# A variable's name, and a shape.
Sized = tuple[str, list[int]]

NEWEST = 14
RELEASES = {2: "3.0.0 to 3.0.2", 3: "3.0.3", 7: "3.0.4 to 3.0.6", 12: "3.0.7", 14: "3.1.0"}


def upgrade(document: Document, file: str, *, as_written: bool = False) -> Document:
    """A document in the form that `schema` reads, or as neml2 writes the newest one; the given one is not changed."""
    written = released_form(document, file)
    for schema, (form, step) in STEPS.items():
        if written <= schema and not (as_written and schema == NEWEST):
            convert(document, form, file)
            document = step(document)
    return document


def released_form(document: Document, file: str) -> int:
    """The released schema in whose form a document is: its own, or the one below an unreleased one."""
    written = document.get("schema_version")
    if not isinstance(written, int) or isinstance(written, bool):
        raise ArtifactError(
            f"{file}: schema_version is {shown(written)}, expected a whole number. Is this neml2-compile's file?"
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


# -- what the steps need of old documents ------------------------------------------------------------------------------


class _Typed(DocumentForm, frozen=True, kw_only=True):
    """A variable whose shape follows from its type."""

    name: Name
    var_type: Name
    var_size: Whole
    base_shape: Shape | None = None
    unflattened_shape: Shape | None = None  # with its sites in front

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_shape is None and self.var_type not in BASE_SHAPES:
            of = f"the file has no shape for {self.name!r}, which has type {self.var_type!r}"
            raise Unfit("var_type", f"one of {', '.join(BASE_SHAPES)}: {of}")
        base = BASE_SHAPES[self.var_type] if self.base_shape is None else list(self.base_shape)
        if self.unflattened_shape is None:
            if prod(base) != self.var_size:
                raise Unfit("var_size", f"{prod(base)}, the number of entries of a {self.var_type}")
            return
        natural = list(self.unflattened_shape)
        if natural[max(0, len(natural) - len(base)) :] != base or prod(natural) != self.var_size:
            raise Unfit("unflattened_shape", f"the shape of {self.var_size} entries that ends in {base}")


class _Flat(_Typed, frozen=True, kw_only=True):
    """A variable of an implicit segment of schema 2."""

    unflattened_shape: Shape


class _Explicit2(DocumentForm, frozen=True, tag_field="kind", tag="forward"):
    inputs: tuple[_Typed, ...]
    outputs: tuple[_Typed, ...]


class _Implicit2(DocumentForm, frozen=True, tag_field="kind", tag="implicit"):
    unknowns: tuple[_Flat, ...]
    givens: tuple[_Flat, ...]


class _Schema2(DocumentForm, frozen=True):
    segments: tuple[_Explicit2 | _Implicit2, ...]


class _Cell(DocumentForm, frozen=True):
    row_vars: tuple[Variable, ...]
    col_vars: tuple[Variable, ...]
    row_structure: str
    col_structure: str


class _Named(DocumentForm, frozen=True):
    name: Name


_Names = tuple[Name | _Named, ...]


class _Explicit3(DocumentForm, frozen=True, tag_field="kind", tag="forward"):
    inputs: _Names
    outputs: _Names


class _Implicit3(DocumentForm, frozen=True, tag_field="kind", tag="implicit"):
    unknowns: _Names
    given_group_infos: tuple[GroupInfo, ...]
    ift_cells: tuple[_Cell, ...] | None = None
    linesearch: Document | None = None


class _Schema3(DocumentForm, frozen=True):
    inputs: tuple[_Typed, ...]
    outputs: tuple[_Typed, ...]
    segments: tuple[_Explicit3 | _Implicit3, ...]


# -- the steps ---------------------------------------------------------------------------------------------------------


def from_2(document: Document) -> Document:
    """Schema 2 to 3: flat vectors become one dense group each, and the one matrix of derivatives one cell or blocks."""
    segments = []
    for segment in document["segments"]:
        if segment["kind"] == "forward":
            rows, columns = ([(v["name"], _base_shape(v)) for v in segment[key]] for key in ("outputs", "inputs"))
            segments.append({"jacobian_pairs": _blocks(rows, columns, 0), **segment})
            continue
        unknowns, givens = ([_sited(variable) for variable in segment[key]] for key in ("unknowns", "givens"))
        # The file does not name the residuals; there is one for each unknown, of the same size.
        groups = {"unknown": unknowns, "residual": unknowns, "given": givens}
        cell = {"row_structure": "dense", "col_structure": "dense", "row_vars": unknowns, "col_vars": givens}
        found = {"unknowns": unknowns, "givens": givens, "ift_cells": [cell], "step_returns": "iterate"}
        for kind, group in groups.items():
            found[f"{kind}_group_infos"] = [{"structure": "dense", "per_var_info": group}]
        segments.append({**segment, **found})
    return {**document, "segments": segments}


def from_3(document: Document) -> Document:
    """Schema 3 to 7: shapes come from types, all pairs that can be are derivatives, cells become pairs."""
    segments = []
    for segment in document["segments"]:
        if segment["kind"] == "implicit":
            segments.append(_celled(segment))
        else:
            # Its graphs may take promoted parameters among its inputs.
            segments.append({**segment, "parameters_among_inputs": bool(segment.get("param_inputs"))})
    found = _changed(document, lambda v: {**v, "base_shape": _base_shape(v)}, *BOUNDARY)
    # Whatever was promoted, the graphs were traced with its value in double precision.
    found = _changed(found, lambda parameter: {**parameter, "dtype": "float64"}, "parameters")
    derivatives = {"derivatives": _differentiable(document), "parameter_derivatives": []}
    return {**derivatives, **found, "segments": segments}


def from_7(document: Document) -> Document:
    """Schema 7 to 12: two words changed; Newton settings stay at their defaults where the stub gives none."""
    renamed = {"rhs_package": "residual_package"}
    found = _changed(document, lambda v: {**v, "var_type": "MRP"} if v.get("var_type") == "Rot" else v, *BOUNDARY)
    return _changed(found, lambda s: {renamed.get(key, key): value for key, value in s.items()}, "segments")


def from_14(document: Document) -> Document:
    """Schema 14 to what `schema` reads: lists of bare names, a place for each pair, settings in each segment."""
    config = document.get("solver_config", {})
    krylov = config.get("krylov", {}) if isinstance(config, dict) else {}

    def plain(segment: Document) -> Document:
        found = _changed(segment, lambda item: item.get("name", item), *NAMES)
        for key, linear in (("jacobian_pairs", "input_sensitivity"), ("param_jacobian_pairs", "param_sensitivity")):
            solver, places = segment.get(linear), count()
            iterative = isinstance(solver, dict) and solver.get("kind") == "krylov"
            found = _changed(found, partial(_placed, places, iterative), key)
        return {**found, "newton": found.get("newton", config), "krylov": krylov}

    # What is wrong with the settings is named where they stand in the file, which is read first.
    return {"solver_config": config, **_changed(document, plain, "segments")}


# By the schema that a step starts from, what it needs and what it does. From 12 to 14 there is nothing to do; the role
# `incremental`, which 14 writes no more, is one that the runtime has.
STEPS: dict[int, tuple[type[DocumentForm], Callable[[Document], Document]]] = {
    2: (_Schema2, from_2),
    3: (_Schema3, from_3),
    7: (DocumentForm, from_7),
    14: (DocumentForm, from_14),
}


# -- parts of them -----------------------------------------------------------------------------------------------------


def _changed(document: Document, change: Callable[[Document], Any], *keys: str) -> Document:
    """A document with the objects changed that are listed under some keys; what is no object, the decoder refuses."""
    found = dict(document)
    for key in keys:
        if isinstance(found.get(key), list):
            found[key] = [change(item) if isinstance(item, dict) else item for item in found[key]]
    return found


def _names(found: list[Any]) -> list[str]:
    return [item if isinstance(item, str) else item["name"] for item in found]


def _base_shape(variable: Document) -> list[int]:
    base = variable.get("base_shape")
    return BASE_SHAPES[variable["var_type"]] if base is None else list(base)


def _sited(variable: Document) -> Document:
    natural, base = variable["unflattened_shape"], _base_shape(variable)
    return {**variable, "base_shape": base, "sub_batch_shape": natural[: len(natural) - len(base)]}


def _placed(outputs: Iterator[int], iterative: bool, pair: Document) -> Document:
    """A pair with its place; an iterative solve has one matrix for all of them, which is cut by their offsets."""
    if iterative:
        return {"row_offset": 0, "col_offset": 0, **pair, "output": 0}
    if "output" in pair:
        return {"row_offset": 0, "col_offset": 0, **pair}
    return {**pair, "output": next(outputs), "row_offset": None, "col_offset": None}


def _celled(segment: Document) -> Document:
    """An implicit segment with one matrix of derivatives per pair of groups, and with its own Newton settings."""
    pairs = []
    for output, cell in enumerate(segment.get("ift_cells") or []):
        if any(_is_summed(variable, cell["col_structure"]) for variable in cell["col_vars"]):
            continue
        rows, columns = (
            [(v["name"], _stored_shape(v, cell[f"{side}_structure"])) for v in cell[f"{side}_vars"]]
            for side in ("row", "col")
        )
        pairs += _blocks(rows, columns, output)
    settings = {key: segment[key] for key in ("atol", "rtol", "miters") if segment.get(key) is not None}
    given = segment.get("linesearch") or {}
    search = {"type": "ls_type", "max_iters": "ls_max_iters", "cutback": "ls_cutback", "c": "ls_c"}
    settings |= {new: given[old] for old, new in search.items() if given.get(old) is not None}
    return {**segment, "newton": settings, **({"jacobian_pairs": pairs} if pairs else {})}


def _is_summed(given: Document, structure: object) -> bool:
    """Whether cells hold only the sum of the derivatives by all sites of a given: 3.0.3 sums over a block's columns."""
    return structure == "block" and bool(given.get("sub_batch_shape"))


def _stored_shape(variable: Document, structure: object) -> list[int]:
    """The shape of a row or column of a cell: all sites of a variable on a dense side, one of them on a block side."""
    sites = [] if structure == "block" else variable.get("sub_batch_shape") or []
    return [*sites, *variable["base_shape"]]


def _blocks(rows: list[Sized], columns: list[Sized], output: int) -> list[Document]:
    """Pairs that lie side by side in the matrix that is this output, row after row."""
    found, row = [], 0
    for out, out_shape in rows:
        column = 0
        for wrt, wrt_shape in columns:
            found.append(
                {
                    **{"out_var": out, "in_var": wrt, "out_base_shape": out_shape, "in_base_shape": wrt_shape},
                    **{"output": output, "row_offset": row, "col_offset": column},
                }
            )
            column += prod(wrt_shape)
        row += prod(out_shape)
    return found


def _differentiable(document: Document) -> list[list[str]]:
    """Of each output, the inputs by which the graphs give its derivative: all but those that sums stand between."""
    inputs = [variable["name"] for variable in document["inputs"]]
    reaching = {name: {name} for name in inputs}
    lost: dict[str, set[str]] = {name: set() for name in inputs}
    for segment in document["segments"]:
        if segment["kind"] == "implicit":
            givens = {
                variable["name"]: _is_summed(variable, group.get("structure"))
                for group in segment["given_group_infos"]
                for variable in group["per_var_info"]
            }
            found = _names(segment["unknowns"])
        else:
            givens, found = dict.fromkeys(_names(segment["inputs"]), False), _names(segment["outputs"])
        through = set().union(*(reaching.get(name, set()) for name in givens))
        gone = set().union(*((reaching if summed else lost).get(name, set()) for name, summed in givens.items()))
        reaching |= dict.fromkeys(found, through)
        lost |= dict.fromkeys(found, gone)
    outputs = _names(document["outputs"])
    return [[out, name] for out in outputs for name in inputs if name not in lost.get(out, set())]
