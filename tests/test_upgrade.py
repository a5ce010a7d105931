"""Documents of old schemas, cut out of what the real compilers wrote, read into the newest form."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from data.collect import document
from neml2_aoti_plugin._artifact import decode, upgrade
from neml2_aoti_plugin._artifact.locate import locate
from neml2_aoti_plugin._artifact.package import Argument, GraphSignature, parse_kinds
from neml2_aoti_plugin._artifact.schema import ExplicitInfo, FusedStep, ImplicitInfo, Metadata, PairGraph, Segment
from neml2_aoti_plugin._artifact.wiring import argument_order, with_argument_order
from neml2_aoti_plugin.errors import ArtifactError, InputError
from neml2_aoti_plugin.settings import NewtonSettings
from references import reported

SCHEMAS = {"3.0.0": 2, "3.0.3": 3, "3.0.6": 7, "3.0.7": 12, "3.1.0": 14}
*OLD, NEWEST = SCHEMAS
# What multi.i sets; 3.0.0 keeps no line search, and 3.0.6 leaves all of it to the stub.
SET = {"atol": 1e-14, "rtol": 1e-13, "miters": 30, "ls_max_iters": 4}

typed_releases = pytest.mark.parametrize("release", ["3.0.0", "3.0.3"])


def read(written: dict[str, Any], **solver: Any) -> Metadata:
    return decode.metadata(written, "meta.json", solver=solver)


def explicit(metadata: Metadata) -> ExplicitInfo:
    return next(s for s in metadata.segments if isinstance(s, ExplicitInfo))


def implicit(metadata: Metadata) -> ImplicitInfo:
    return next(s for s in metadata.segments if isinstance(s, ImplicitInfo))


def pairs_of(segment: ImplicitInfo) -> tuple[Any, ...]:
    return segment.sensitivity.pairs if segment.sensitivity is not None else ()


# -- what all schemas have in common -------------------------------------------------------------------------------


@pytest.mark.parametrize("release", OLD)
def test_schemas_agree_on_the_model(release: str) -> None:
    written = document(release)
    upgrade.upgrade(written, "meta.json")
    assert written == document(release)
    old, new = read(written), read(document(NEWEST))
    assert (old.schema, old.inputs, old.outputs) == (SCHEMAS[release], new.inputs, new.outputs)
    assert set(old.derivatives) == set(new.derivatives)
    assert [*map(signature, old.segments)] == [*map(signature, new.segments)]


def signature(segment: Segment) -> object:
    """What a segment takes and gives, without the names of residuals, which 3.0.0 does not tell, and of types."""
    if isinstance(segment, ExplicitInfo):
        return segment.inputs, segment.outputs, segment.taken, segment.order
    groups = [
        [(g.structure, [(v.name, v.natural_shape) for v in g.variables]) for g in some]
        for some in (segment.unknowns, segment.givens)
    ]
    residuals = [[v.natural_shape for v in g.variables] for g in segment.residuals]
    return groups, residuals, segment.predictor, {(p.out, p.wrt) for p in pairs_of(segment)}


@pytest.mark.parametrize("release", SCHEMAS)
def test_newton_settings_come_from_where_the_release_put_them_and_from_the_caller(release: str) -> None:
    expected = {"3.0.0": {**SET, "ls_max_iters": 1}, "3.0.6": {}}.get(release, SET)
    own = implicit(read(document(release))).newton
    assert own == NewtonSettings(**expected)  # type: ignore[arg-type]
    found = implicit(read(document(release), atol=1e-5, ls_type="STRONG_WOLFE")).newton
    assert asdict(found) == {**asdict(own), "atol": 1e-5, "ls_type": "STRONG_WOLFE"}
    with reported(InputError, "abs_tol", *(f.name for f in fields(NewtonSettings))):
        read(document(release), abs_tol=1e-5)
    with reported(InputError, "atol", "-1.0"):
        read(document(release), atol=-1.0)


# -- schemas 2 and 3 -----------------------------------------------------------------------------------------------


@typed_releases
def test_all_pairs_are_derivatives(release: str) -> None:
    metadata = read(document(release))
    assert metadata.derivatives == tuple((o.name, i.name) for o in metadata.outputs for i in metadata.inputs)
    assert metadata.parameter_derivatives == ()


def test_schema_2_cuts_blocks_out_of_one_matrix() -> None:
    metadata = read(document("3.0.0"))
    matrix, sensitivity = explicit(metadata).jacobian, implicit(metadata).sensitivity
    assert matrix is not None and covered(matrix.pairs) == (7, 7)
    assert isinstance(sensitivity, PairGraph) and covered(sensitivity.pairs) == (7, 16)


def covered(pairs: tuple[Any, ...]) -> tuple[int, int]:
    """The size of the matrix that the pairs cover without a gap or an overlap."""
    height, width = max(p.row + p.rows for p in pairs), max(p.column + p.columns for p in pairs)
    hits = torch.zeros(height, width, dtype=torch.int64)
    for pair in pairs:
        assert pair.output == 0
        hits[pair.row : pair.row + pair.rows, pair.column : pair.column + pair.columns] += 1
    assert bool((hits == 1).all())
    return height, width


@pytest.mark.parametrize(("release", "iterate"), [("3.0.0", True), ("3.0.3", False), ("3.0.6", False)])
def test_only_schema_2_returns_the_iterate(release: str, iterate: bool) -> None:
    step = implicit(read(document(release))).step
    assert isinstance(step, FusedStep) and step.returns_iterate is iterate


def test_schema_3_cells_are_cut_by_what_their_sides_store() -> None:
    segment = implicit(read(document("3.0.3", "cross_group_folded")))
    columns = {p.wrt: p.columns for p in pairs_of(segment) if p.out == "all"}
    # Three sites of a symmetric tensor are 18 columns of a dense group.
    wide = [v for g in segment.givens for v in g.variables if v.sub_batch_shape]
    assert wide and all(columns[v.name] == prod(v.natural_shape) == 18 for v in wide)
    for output in {pair.output for pair in pairs_of(segment)}:
        covered(tuple(replace(pair, output=0) for pair in pairs_of(segment) if pair.output == output))


@typed_releases
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"var_type": "R5"}, r"inputs\[1\]\.var_type .*SR2.*'strain', which has type 'R5'"),
        ({"var_size": 9}, r"inputs\[1\]\.var_size is 9, expected 6"),
    ],
)
def test_a_type_that_is_not_known_or_does_not_fit_is_named(release: str, change: dict[str, Any], words: str) -> None:
    written = document(release)
    written["inputs"][1].update(change)
    with pytest.raises(ArtifactError, match=words):
        read(written)


@pytest.mark.parametrize("release", ["3.0.0", "3.0.3", "3.0.6"])
def test_the_rotation_of_old_is_the_mrp_of_today(release: str) -> None:
    written = document(release)
    shape = {"base_shape": [3]} if release == "3.0.6" else {}
    written["inputs"].append({"name": "R", "var_size": 3, "var_type": "Rot", **shape})
    found = read(written).inputs[-1]
    assert (found.name, found.type, found.base_shape) == ("R", "MRP", (3,))


# -- numbers that were never released, and damage -------------------------------------------------------------------


@pytest.mark.parametrize(("release", "numbers"), [("3.0.3", (4, 5, 6)), ("3.0.6", (8, 9, 10, 11)), ("3.0.7", (13,))])
def test_an_unreleased_schema_is_read_like_the_one_below(release: str, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        found = read({**document(release), "schema_version": number})
        assert replace(found, schema=0) == replace(read(document(release)), schema=0)


def test_an_unreleased_schema_that_does_not_fit_says_so(tmp_path: Path) -> None:
    written = {**document("3.0.3"), "schema_version": 5}
    del written["segments"][1]["given_group_infos"]
    (tmp_path / "bar_meta.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match=r"schema 5, which no .* wrote; read like schema 3.*given_group_infos"):
        decode.read_metadata(locate(tmp_path))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (15, "schema 15.*up to 14.*pip install -U neml2-aoti-plugin"),
        (1, "schema 1, which no neml2 release wrote.*3.0.0 to 3.0.2"),
        (0, "schema 0, which no neml2 release wrote"),
        (-3, "schema -3, which no neml2 release wrote"),
        ("7", "schema_version is a str, expected a whole number"),
        (True, "schema_version is True, expected a whole number"),
        (None, "schema_version is None, expected a whole number"),
    ],
)
def test_a_schema_that_is_not_known_is_refused(number: object, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        read({**document("3.0.3"), "schema_version": number})


@pytest.mark.parametrize("path", ["solver_config", "solver_config.krylov", "segments.1.input_sensitivity"])
def test_null_in_the_place_of_an_object(path: str) -> None:
    *above, last = path.split(".")
    written: Any = document(NEWEST)
    place = written
    for step in above:
        place = place[int(step) if step.isdigit() else step]
    place[last] = None
    with pytest.raises(ArtifactError, match=f"{last} is None, expected an object"):
        read(written)


# -- the order of arguments ----------------------------------------------------------------------------------------

SR2, SCALAR = "neml2.types.SR2", "neml2.types.Scalar"
PARAMETER = ((), "")


def taking(*arguments: tuple[tuple[int | None, ...], str]) -> GraphSignature:
    return GraphSignature(tuple(Argument(torch.float64, extents, kind) for extents, kind in arguments), 1)


BEHIND, AHEAD = taking(((None, 6), SR2), PARAMETER), taking(PARAMETER, ((None, 6), SR2))


def order(signature: GraphSignature | None, inputs: tuple[str, ...] = ("strain",)) -> tuple[str, ...]:
    segment = ExplicitInfo(
        value="a.pt2", inputs=inputs, outputs=("stress",), parameters=("E",), parameters_among_inputs=True
    )
    return argument_order(segment, {"strain": (6,), "T": (), "E": ()}, signature)


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (BEHIND, ("strain", "E")),
        (AHEAD, ("E", "strain")),
        # 3.0.0 hands all of them over as plain tensors; a parameter has no free axis.
        (taking(((None, 6), ""), PARAMETER), ("strain", "E")),
        (taking(PARAMETER, ((None, 6), "")), ("E", "strain")),
        # A pinned batch has no free axis; 3.0.3, which first pins it, has types.
        (taking(PARAMETER, ((2, 6), SR2)), ("E", "strain")),
        # Inputs keep their own order around a parameter.
        (taking(((None,), SCALAR), PARAMETER, ((None, 6), SR2)), ("T", "E", "strain")),
    ],
)
def test_the_package_tells_the_order(signature: GraphSignature, expected: tuple[str, ...]) -> None:
    assert order(signature, tuple(name for name in expected if name != "E")) == expected


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        (None, "does not tell its arguments"),
        (taking(((None, 6), SR2)), "takes 1 arguments, expected 2"),
        (taking(((2, 6), ""), PARAMETER), "2 of its 2 arguments look like parameters, expected 1"),
        (taking(((None, 6), SR2), ((None,), SCALAR)), "0 of its 2 arguments look like parameters, expected 1"),
        (taking(((None, 3), SR2), PARAMETER), r"where 'strain' of shape \(6,\) would stand it takes \(None, 3\)"),
        (taking(((None, 6), SR2), ((6,), "")), r"where 'E' of shape \(\) would stand it takes \(6,\)"),
    ],
)
def test_an_order_that_does_not_show_is_refused(signature: GraphSignature | None, words: str) -> None:
    with pytest.raises(ArtifactError, match=f"does not show in which order.*strain.*E.*{words}"):
        order(signature)


def test_kinds_come_from_the_call_spec() -> None:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    typed = {"type": SR2, "context": '[["data"], []]', "children_spec": [leaf]}
    given = {"type": "builtins.tuple", "children_spec": [leaf, typed]}
    call = {"type": "builtins.tuple", "children_spec": [given, leaf]}
    source = f'    in_spec_ = R"({json.dumps([1, call])})";\n    out_spec_ = R"([])";'
    assert parse_kinds(source, 2) == ["", SR2]
    assert parse_kinds(source, 3) == ["", "", ""]
    assert parse_kinds("no spec", 2) == ["", ""]


@typed_releases
def test_promotion_leaves_the_order_open_until_the_package_is_read(release: str) -> None:
    first = explicit(read(document(release, "promoted_provider")))
    assert first.parameters_among_inputs and first.parameters == ("young.value",) and first.jacobian is not None
    metadata = replace(read(document(release, "promoted_provider")), segments=(first,))

    files = first.value, first.jacobian.file

    def ordered(*packages: GraphSignature | None) -> tuple[ExplicitInfo, tuple[tuple[str, str], ...]]:
        found, faults = with_argument_order(metadata, dict(zip(files, packages, strict=False)))
        return explicit(found), tuple(faults)

    for package, found in ((BEHIND, None), (AHEAD, (1, 0))):
        settled, faults = ordered(package, package)
        assert not faults and settled.order == found and not settled.parameters_among_inputs
    ((file, fault),) = ordered(AHEAD, BEHIND)[1]
    assert file == first.value and "another order" in fault
    settled, ((file, fault),) = ordered(None)
    assert settled is first and file == first.value and "does not show" in fault
    # A package that is missing or damaged has a fault of its own.
    assert ordered() == (first, ())
