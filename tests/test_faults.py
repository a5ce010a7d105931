"""Damaged files, odd numbers and odd sizes: a clear error or a right answer, never a crash or a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import references
from attacks import documents
from attacks.children import run
from neml2_aoti_plugin import AOTIError, ArtifactError
from neml2_aoti_plugin._artifact import decode

WORKER = "import sys; from attacks import worker; sys.exit(worker.main())"
RELEASED = sorted((Path(__file__).parent / "data").glob("*.json"))

# The long run takes ten thousand mutations of metadata and a thousand of packages over models of every kind.
KINDS = ["elasticity", "promoted", "promoted_implicit", "composed", "cross_group", "krylov", "predictor_loop"]
KINDS += ["substepping", "viscoplasticity", "renamed"]
# Kind of damage, artifact, seed and count.
SHORT = [("metadata", "elasticity", 1, 120), ("metadata", "calibration", 2, 120)]
SHORT += [("archive", "elasticity", 3, 30), ("archive", "calibration", 4, 30)]
LONG = [(kind, name, *rest) for kind, *rest in (("metadata", 100, 1050), ("archive", 200, 110)) for name in KINDS]
FOR_LONG = (pytest.mark.long, pytest.mark.timeout(1800))


@pytest.mark.parametrize(
    ("kind", "name", "seed", "count"), [*SHORT, *(pytest.param(*damage, marks=FOR_LONG) for damage in LONG)]
)
def test_damaged_artifacts(kind: str, name: str, seed: int, count: int, tmp_path: Path) -> None:
    """A worker damages an artifact and loads it, many times, and tells how that ended."""
    limit = 100 if count < 1000 and seed < 100 else 1700
    out = run(WORKER, kind, references.case(name).artifact, tmp_path, seed, count, limit=limit)
    found = json.loads(out[out.rindex('{"ends"') :])
    assert found["wrong"] == [] and found["escapes"] == [] and found["strays"] == []
    ends: dict[str, int] = found["ends"]
    # Both must happen, else the mutations are too tame or too wild to tell anything.
    assert ends["loads"] > count // 20 and ends["ArtifactError"] > count // 5, ends
    # hypothesis draws some documents that it does not count.
    assert ends["mutations"] >= count * (0.95 if limit > 100 else 1.0)


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.stem)
def test_damaged_metadata_of_every_schema_is_read_or_refused(file: Path) -> None:
    original = json.loads(file.read_text())

    @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(documents.mutations(original))
    def one(found: tuple[dict[str, Any], list[str]]) -> None:
        document = json.loads(json.dumps(found[0]))
        try:
            decode.metadata(document, "file")
        except AOTIError as error:
            assert "file" in str(error)

    one()


@pytest.mark.parametrize("depth", [100, 400, 5000, 200_000])
def test_deep_nesting_is_refused_or_has_no_effect(depth: int, artifact: Path) -> None:
    out = run(
        """
        import sys
        from pathlib import Path
        from neml2_aoti_plugin import ArtifactError, Model
        file, depth = Path(sys.argv[1]) / "metadata.json", int(sys.argv[2])
        text = file.read_text()
        for opening, closing in ("[]", ('{"a":', "}")):
            value = opening * depth + ("1" if closing == "}" else "") + closing * depth
            file.write_text(text.replace("{", '{"new": ' + value + ",", 1))
            try:
                print(Model(file).input_names)
            except ArtifactError as error:
                print(error)
        """,
        artifact,
        depth,
    )
    assert len(out.splitlines()) == 2
    assert all(line == "['strain']" or "metadata.json" in line for line in out.splitlines())


REMOVED = object()
IN_BOTH = [(f"segments.{i}.jacobian_pairs.0.{key}", i) for i in (0, 1) for key in ("out_var", "in_var")]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (
            "solver_config.miters",
            2**31,
            "solver_config.miters is 2147483648, expected a whole number of at most 100000",
        ),
        ("solver_config.rtol", -1.0, "solver_config.rtol is -1.0, expected a number of at least 0"),
        ("solver_config.atol", float("nan"), "solver_config.atol is nan, expected a number of at least 0"),
        ("solver_config.ls_type", "x", "ls_type is a str, expected one of BACKTRACKING, STRONG_WOLFE"),
        ("segments.0.kind", "\ud800", "half a character"),
        ("inputs.0.base_shape", [2**40] * 2, "inputs[0].base_shape is a list, expected a shape of a sensible size"),
        ("outputs", [], "outputs is a list, expected a list of at least one entry"),
        ("derivatives.0", ["stress"], "derivatives[0] is a list, expected a list of length 2"),
        ("boundary_aliases", {"inputs": {"t": "a", "t~1": "a"}}, "boundary names that are all diff"),
        ("segments.1.givens.0.role", "none", "segments[1].givens[0].role is a str, expected one of old_state, old_f"),
        ("segments.1.max_substepping_level", 31, "level is 31, expected a whole number of at most 30"),
        ("segments.1.unknown_group_infos.0.per_var_info", [], "_infos is a list, expected at least one unknown"),
        ("segments.1.predictor_inputs", ["t", "t"], "segments[1].predictor_inputs"),
        ("segments.1.predictor_inputs", REMOVED, "segments[1] has no key 'predictor_inputs'; it has kind, "),
        ("segments.1.solve_ift_package", REMOVED, "segments[1] has no key 'solve_ift_package'"),
        ("segments.0.jacobian_pairs", REMOVED, "segments[0] has no key 'jacobian_pairs'"),
        *((place, "x", f"segments[{i}] has a derivative of ") for place, i in IN_BOTH),
    ],
)
def test_what_does_not_fit_is_named_by_its_key(place: str, value: object, words: str) -> None:
    document = json.loads((Path(__file__).parent / "data" / "3.1.0-multi.json").read_text())
    *path, key = (int(part) if part.isdigit() else part for part in place.split("."))
    parent = documents.at(document, tuple(path))
    parent[key] = value
    if value is REMOVED:
        del parent[key]
    with references.reported(ArtifactError, words, "neml2-compile") as raised:
        decode.metadata(document, "file")
    assert str(raised.value).startswith("file: ")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=64), min_size=6, max_size=18).map(lambda x: x[: len(x) // 6 * 6]))
def test_any_number_at_all_spoils_no_other_row(numbers: list[float]) -> None:
    model = references.case("elasticity").model
    sound = torch.tensor([[1e-3, 2e-3, 3e-3, 0.0, 0.0, 1e-3]], dtype=torch.float64)
    odd = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 6)
    found = model.forward({"strain": torch.cat([odd, sound])})["stress"]
    assert torch.equal(found[-1:], model.forward({"strain": sound})["stress"])
    bad = ~odd.isfinite().all(-1)
    assert (~found[:-1][bad].isfinite()).any(-1).all()


A_MILLION = [
    "elasticity",
    pytest.param("promoted_implicit", marks=[pytest.mark.long, pytest.mark.wide, pytest.mark.timeout(1200)]),
]


@pytest.mark.parametrize("name", A_MILLION)
def test_a_million_rows(name: str) -> None:
    case = references.case(name)
    rows = case.rows()
    count = next(iter(rows.values())).shape[0]
    times = -(-1_000_000 // count)
    once = case.model.forward(rows)
    many = case.model.forward({n: x.repeat(times, *(1 for _ in x.shape[1:])) for n, x in rows.items()})
    for name, value in once.items():
        assert torch.equal(many[name].reshape(times, *value.shape), value.expand(times, *value.shape))
