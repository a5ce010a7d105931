"""Write a metadata document of an older schema as neml2 3.1.0 does, where the graphs are the ones that it expects.

The graphs stay what they are, byte for byte. So a document can be rewritten only if each graph takes and gives what
neml2's C++ runtime expects of schema 14; else the reason is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .upgrade import NEWEST, Document, released_form, upgrade

# Keys of schema 14, in the order in which it has them.
TOP = ("inputs", "outputs", "segments", "parameters", "derivatives", "parameter_derivatives")
TOP_OPTIONAL = ("boundary_aliases", "solver_config")
VARIABLE = ("name", "var_size", "var_type", "base_shape")
FORWARD = (
    *("kind", "package", "inputs", "outputs", "param_inputs", "jvp_package", "jacobian_pairs"),
    *("param_jacobian_package", "param_jacobian_pairs", "param_vjp_package", "param_vjp_params", "param_vjp_outputs"),
)
PAIR = ("out_var", "in_var", "out_base_shape", "in_base_shape", "in_sub_batch_shape", "batch_independent")
PARAMETER = ("name", "shape", "values", "origin", "param_base_shape")
# The first schema whose forward graphs take promoted parameters with a batch axis.
WITH_BATCH = 7
# The first schema with Newton's Jacobian and its solve in graphs of their own.
APART = 12


@dataclass(frozen=True)
class Rewritten:
    """A document in the newest form, or why there is none.

    Args:
        document: in schema 14; empty where there is none.
        reasons: what stands in the way.
        dropped: derivatives that the new document lacks, as `out:in`.
    """

    document: Document
    reasons: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def rewrite(document: Document, file: str, *, drop_derivatives: bool = False) -> Rewritten:
    """Rewrite a metadata document.

    Args:
        document: of any released schema; it is not changed.
        file: its path, for messages.
        drop_derivatives: whether derivatives whose graphs do not fit may be left out.

    Returns:
        The document, or what stands in the way.

    Raises:
        ArtifactError: the document does not fit its own schema.
    """
    form = released_form(document, file)
    if form == NEWEST:
        return Rewritten(document)
    if form >= APART:
        return _from_12(document)
    reasons = _reasons(document, form)
    if reasons:
        return Rewritten({}, tuple(reasons))
    newest = upgrade(document, file)
    flat = _flat_jacobian(document, newest)
    dropped: tuple[str, ...] = ()
    if flat:
        dropped = tuple(f"{out}:{by}" for out, by in newest["derivatives"])
        if not drop_derivatives:
            return Rewritten({}, (flat,))
    return Rewritten(_document(newest, keep_derivatives=not flat), (), dropped)


def _from_12(document: Document) -> Rewritten:
    """Schema 12 differs from 14 in the treatment of incremental variables only."""
    names = [
        given["name"]
        for segment in document["segments"]
        for given in segment.get("givens", [])
        if given.get("role") == "incremental"
    ]
    if names:
        listed = ", ".join(map(str, names))
        return Rewritten(
            {}, (f"substepping cuts the incremental variable(s) {listed} in a way that schema {NEWEST} has not",)
        )
    return Rewritten({**document, "schema_version": NEWEST})


def _reasons(document: Document, form: int) -> list[str]:
    """What stands in the way of a document before schema 12."""
    found = []
    if any(segment.get("kind") == "implicit" for segment in document["segments"]):
        found.append(
            "its Newton step is one graph; neml2's runtime expects the Jacobian and its solve in graphs of their own"
        )
    if form < WITH_BATCH and document.get("parameters"):
        found.append(
            "its graphs take promoted parameters without a batch axis; neml2's runtime gives them one value per row"
        )
    return found


def _flat_jacobian(document: Document, newest: Document) -> str:
    """Why the derivatives of schema 2, one matrix over all outputs and inputs, are not what schema 14 expects."""
    if document["schema_version"] != 2:
        return ""
    for segment in newest["segments"]:
        pairs = segment.get("jacobian_pairs", [])
        ranks = [len(pair[key]) for pair in pairs for key in ("out_base_shape", "in_base_shape")]
        if len(pairs) > 1 or any(rank != 1 for rank in ranks):
            return (
                "its derivatives are one matrix over all inputs and outputs; neml2's runtime expects a block for each "
                "pair (--drop-derivatives leaves them out)"
            )
    return ""


def _document(newest: Document, *, keep_derivatives: bool) -> Document:
    found: Document = {"schema_version": NEWEST, "type": "composed"}
    found |= {key: newest[key] for key in TOP} | {key: newest[key] for key in TOP_OPTIONAL if key in newest}
    for key in ("inputs", "outputs"):
        found[key] = [_variable(variable) for variable in newest[key]]
    found["segments"] = [_forward(segment, keep_derivatives) for segment in newest["segments"]]
    found["parameters"] = [_parameter(parameter) for parameter in newest["parameters"]]
    if not keep_derivatives:
        found["derivatives"] = []
    return found


def _variable(variable: Document) -> Document:
    kept: Document = {key: variable[key] for key in VARIABLE}
    kept["var_size"] = prod(variable["base_shape"])
    if variable.get("sub_batch_shape"):
        kept["sub_batch_shape"] = variable["sub_batch_shape"]
    return kept


def _forward(segment: Document, keep_derivatives: bool) -> Document:
    kept = {key: segment[key] for key in FORWARD if key in segment}
    for key in ("inputs", "outputs"):
        kept[key] = [{"name": variable["name"]} for variable in segment[key]]
    kept.setdefault("param_inputs", [])
    if not keep_derivatives:
        return {key: value for key, value in kept.items() if key not in ("jvp_package", "jacobian_pairs")}
    if "jacobian_pairs" in kept:
        kept["jacobian_pairs"] = [_pair(pair) for pair in kept["jacobian_pairs"]]
    return kept


def _pair(pair: Document) -> Document:
    whole = {"in_sub_batch_shape": [], "batch_independent": False, **pair}
    return {key: whole[key] for key in PAIR}


def _parameter(parameter: Document) -> Document:
    whole = {"param_base_shape": parameter["shape"], "origin": "parameter", **parameter}
    kept = {key: whole[key] for key in PARAMETER}
    # A dtype is told of numbers without a fraction only; the others have that of the leaf.
    if not str(parameter.get("dtype", "float")).removeprefix("torch.").startswith("float"):
        kept["dtype"] = parameter["dtype"]
    return kept
