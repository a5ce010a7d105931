"""Write a metadata document of an older schema as neml2 3.1.0 does, where the graphs are the ones that it expects.

The graphs stay what they are, byte for byte. So a document can be rewritten only if each graph takes and gives what
neml2's C++ runtime expects of schema 14; else there is a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .upgrade import NEWEST, Document, released_form, upgrade

# Keys of schema 14, in the order in which it has them.
TOP = ("inputs", "outputs", "segments", "parameters", "derivatives", "parameter_derivatives")
TOP_OPTIONAL = ("boundary_aliases", "solver_config")
VARIABLE = ("name", "var_size", "var_type", "base_shape")
EXPLICIT = (
    *("kind", "package", "inputs", "outputs", "param_inputs", "jvp_package", "jacobian_pairs"),
    *("param_jacobian_package", "param_jacobian_pairs", "param_vjp_package", "param_vjp_params", "param_vjp_outputs"),
)
PAIR = ("out_var", "in_var", "out_base_shape", "in_base_shape", "in_sub_batch_shape", "batch_independent")
PARAMETER = ("name", "shape", "values", "origin", "param_base_shape")
# The first schema whose explicit segments take promoted parameters with a batch axis.
WITH_BATCH = 7
# The first schema with Newton's Jacobian and its solve in graphs of their own.
APART = 12


@dataclass(frozen=True)
class Rewritten:
    """A document in schema 14; or an empty one, and the reasons why there is none."""

    document: Document
    reasons: tuple[str, ...] = ()
    # Derivatives that the new document lacks, as `out:in`.
    dropped: tuple[str, ...] = ()


def rewrite(document: Document, file: str, *, drop_derivatives: bool = False) -> Rewritten:
    """Rewrite a document, which is not changed; derivatives whose graphs do not fit may be left out."""
    form = released_form(document, file)
    if form == NEWEST:
        return Rewritten(document)
    reasons = _reasons(document, form)
    if reasons:
        return Rewritten({}, tuple(reasons))
    if form >= APART:
        return Rewritten({**document, "schema_version": NEWEST})
    newest = upgrade(document, file, as_written=True)
    if not _has_flat_jacobian(document, newest):
        return Rewritten(_document(newest))
    if drop_derivatives:
        dropped = tuple(f"{out}:{by}" for out, by in newest["derivatives"])
        return Rewritten(_document(newest, keep_derivatives=False), (), dropped)
    reason = (
        "its derivatives are one matrix over all inputs and outputs; neml2's runtime expects a block for each pair "
        "(--drop-derivatives leaves them out)"
    )
    return Rewritten({}, (reason,))


def _reasons(document: Document, form: int) -> list[str]:
    """What stands in the way, but for derivatives."""
    implicit = [segment for segment in document["segments"] if segment.get("kind") == "implicit"]
    found = []
    if form >= APART:
        # Schema 12 differs from 14 in the treatment of incremental variables only.
        givens = [given for segment in implicit for given in segment.get("givens", [])]
        names = [str(given["name"]) for given in givens if given.get("role") == "incremental"]
        if names:
            found.append(
                f"substepping cuts the incremental variable(s) {', '.join(names)} in a way that schema {NEWEST} has not"
            )
        return found
    if implicit:
        found.append(
            "its Newton step is one graph; neml2's runtime expects the Jacobian and its solve in graphs of their own"
        )
    if form < WITH_BATCH and document.get("parameters"):
        found.append(
            "its graphs take promoted parameters without a batch axis; neml2's runtime gives them one value per row"
        )
    return found


def _has_flat_jacobian(document: Document, newest: Document) -> bool:
    """Whether derivatives are one matrix over several outputs, inputs or axes, as schema 2 has them."""
    if document["schema_version"] != 2:
        return False
    for segment in newest["segments"]:
        pairs = segment.get("jacobian_pairs", [])
        ranks = [len(pair[key]) for pair in pairs for key in ("out_base_shape", "in_base_shape")]
        if len(pairs) > 1 or any(rank != 1 for rank in ranks):
            return True
    return False


def _document(newest: Document, *, keep_derivatives: bool = True) -> Document:
    return {
        "schema_version": NEWEST,
        "type": "composed",
        **{key: newest[key] for key in TOP},
        **{key: newest[key] for key in TOP_OPTIONAL if key in newest},
        **{key: [_variable(variable) for variable in newest[key]] for key in ("inputs", "outputs")},
        "segments": [_explicit(segment, keep_derivatives) for segment in newest["segments"]],
        "parameters": [_parameter(parameter) for parameter in newest["parameters"]],
        "derivatives": newest["derivatives"] if keep_derivatives else [],
    }


def _variable(variable: Document) -> Document:
    kept = {key: variable[key] for key in VARIABLE} | {"var_size": prod(variable["base_shape"])}
    sites = variable.get("sub_batch_shape")
    return {**kept, "sub_batch_shape": sites} if sites else kept


def _explicit(segment: Document, keep_derivatives: bool) -> Document:
    left_out = () if keep_derivatives else ("jvp_package", "jacobian_pairs")
    kept = {key: segment[key] for key in EXPLICIT if key in segment and key not in left_out}
    for key in ("inputs", "outputs"):
        kept[key] = [{"name": variable["name"]} for variable in segment[key]]
    kept.setdefault("param_inputs", [])
    if "jacobian_pairs" in kept:
        absent = {"in_sub_batch_shape": [], "batch_independent": False}
        kept["jacobian_pairs"] = [{key: (absent | pair)[key] for key in PAIR} for pair in kept["jacobian_pairs"]]
    return kept


def _parameter(parameter: Document) -> Document:
    whole = {"param_base_shape": parameter["shape"], "origin": "parameter", **parameter}
    kept = {key: whole[key] for key in PARAMETER}
    # Schema 14 has a dtype for numbers without a fraction only; the others have that of the leaf.
    if not str(parameter.get("dtype", "float")).removeprefix("torch.").startswith("float"):
        kept["dtype"] = parameter["dtype"]
    return kept
