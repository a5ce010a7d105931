"""Write a metadata document of an older schema as neml2 3.1.0 does, where the graphs are the ones that it expects.

The graphs stay what they are, byte for byte. So a document can be rewritten only if each graph takes and gives what
neml2's C++ runtime expects of schema 14; else there is a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .document import DocumentForm
from .schema import DerivativePair, ExplicitInfo, Parameter, Variable
from .upgrade import NEWEST, Document, released_form, upgrade

# The first schema whose explicit segments take promoted parameters with a batch axis.
WITH_BATCH = 7
# The first schema with Newton's Jacobian and its solve in graphs of their own.
APART = 12
# Keys of the objects in `schema` that no release writes.
OURS = {"output", "row_offset", "col_offset", "parameters_among_inputs", "arguments"}


@dataclass(frozen=True)
class Rewritten:
    """A document in schema 14; or an empty one, and the reasons why there is none."""

    document: Document
    reasons: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()  # derivatives that the new document lacks, as `out:in`


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
    if form >= APART:
        # Schema 12 differs from 14 in the treatment of incremental variables only.
        givens = [given for segment in implicit for given in segment.get("givens", [])]
        names = ", ".join(str(given["name"]) for given in givens if given.get("role") == "incremental")
        cut = f"substepping cuts the incremental variable(s) {names} in a way that schema {NEWEST} has not"
        return [cut] if names else []
    found = []
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
    """What the newest release writes of a document with explicit segments alone."""
    found = {
        "schema_version": NEWEST,
        "type": "composed",
        "inputs": [_variable(variable) for variable in newest["inputs"]],
        "outputs": [_variable(variable) for variable in newest["outputs"]],
        "segments": [_explicit(segment, keep_derivatives) for segment in newest["segments"]],
        "parameters": [_parameter(parameter) for parameter in newest["parameters"]],
        "derivatives": newest["derivatives"] if keep_derivatives else [],
        "parameter_derivatives": newest["parameter_derivatives"],
    }
    return found | {key: newest[key] for key in ("boundary_aliases", "solver_config") if key in newest}


def _written(found: Document, form: type[DocumentForm]) -> Document:
    """The keys of an object that the newest release writes too."""
    return {key: found[key] for key in form.__struct_encode_fields__ if key in found and key not in OURS}


def _variable(variable: Document) -> Document:
    found = _written({**variable, "var_size": prod(variable["base_shape"])}, Variable)
    if not found.get("sub_batch_shape"):
        found.pop("sub_batch_shape", None)
    return found


def _explicit(segment: Document, keep_derivatives: bool) -> Document:
    found = {"kind": "forward", "param_inputs": [], **_written(segment, ExplicitInfo)}
    found |= {key: [{"name": variable["name"]} for variable in segment[key]] for key in ("inputs", "outputs")}
    if "jacobian_pairs" in found:
        absent = {"in_sub_batch_shape": [], "batch_independent": False}
        found["jacobian_pairs"] = [_written(absent | pair, DerivativePair) for pair in found["jacobian_pairs"]]
    left_out = () if keep_derivatives else ("jvp_package", "jacobian_pairs")
    return {key: value for key, value in found.items() if key not in left_out}


def _parameter(parameter: Document) -> Document:
    found = {"param_base_shape": parameter["shape"], "origin": "parameter", **parameter}
    kept = {**_written(found, Parameter), "origin": found["origin"]}
    # Schema 14 has a dtype for numbers without a fraction only; the others have that of the leaf.
    if str(kept.get("dtype", "float")).removeprefix("torch.").startswith("float"):
        kept.pop("dtype", None)
    return kept
