"""Requests read and evaluated together, without HTTP: for models of every kind, each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neml2_aoti_plugin import ConvergenceError, Model
from neml2_aoti_plugin.serve._evaluation import call_first, evaluate
from neml2_aoti_plugin.serve._limits import Limits, Refused
from neml2_aoti_plugin.serve._requests import read_call, write_answer
from neml2_aoti_plugin.serve._served import Served, Signature
from serving import Answer, Array, artifact, encode
from test_serve import reference

STUBS = (
    *("cross_group", "krylov", "predictor_loop", "promoted", "substepping"),
    *("chaboche", "composed", "crystal", "elasticity_float32", "elasticity_rank2", "elasticity_static"),
    *("mixed_control", "porous", "promoted_implicit", "rate_independent", "renamed"),
)
REQUESTS = 12
# Steps of time of the same length: with others, some models have several solutions at random inputs.
TIMES = {"t": 1.0, "t~1": 0.0, "t~2": -1.0}


Asked = tuple[dict[str, Array], dict[str, Any]]


def requests(model: Model, operation: Signature, rng: np.random.Generator) -> list[Asked]:
    """Inputs and overrides: small numbers at random, a step of time, and a NaN in one request."""
    dtype = {torch.float64: np.float64, torch.float32: np.float32}[model.dtype]
    own = {name: value.detach().numpy() for name, value in model.named_parameters().items()}
    found: list[Asked] = []
    names = list(operation.inputs)
    names += [name for name in operation.optional if name.startswith("tangent:")]
    for place in range(REQUESTS):
        rows = int(rng.integers(1, 4))
        given = {
            name: 1e-3 * rng.standard_normal((rows, *{**operation.inputs, **operation.optional}[name].shape))
            for name in names
        }
        given |= {name: np.full(rows, time) for name, time in TIMES.items() if name in given}
        overrides: dict[str, Any] = {}
        if own and place % 3:
            first, *_, last = [*own, *own]
            overrides[first] = (own[first] * 1.1).tolist()
            if place % 3 == 2:
                overrides[last] = (own[last] * rng.uniform(0.9, 1.1, (rows, *([1] * own[last].ndim)))).tolist()
        found.append(({name: value.astype(dtype) for name, value in given.items()}, overrides))
    found[4][0][names[0]][0] = np.nan
    return found


@pytest.mark.parametrize("stub", [*STUBS, pytest.param("cohesive", marks=pytest.mark.wide)])
def test_each_gets_what_it_would_get_alone(stub: str) -> None:
    model = Model(artifact(stub))
    served = Served(stub, model)
    call_first(served)
    for operation in served.signatures.values():
        asked = requests(model, operation, np.random.default_rng(0))
        calls = []
        for given, overrides in asked:
            parameters = {"operation": operation.name, **({"parameter_overrides": overrides} if overrides else {})}
            body, headers = encode(given, True, parameters)
            calls.append(read_call(served, body, headers["Inference-Header-Content-Length"].encode(), Limits()))
        keys: dict[Any, list[int]] = {}
        for place, call in enumerate(calls):
            keys.setdefault(call.key, []).append(place)
        # Those with other values of parameters, and those without.
        assert len(keys) == (2 if model.parameter_base_shapes else 1)
        for places in keys.values():
            answers = evaluate(served, [calls[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                given, overrides = asked[place]
                values = {n: np.array(x) for n, x in overrides.items()}
                try:
                    wanted = reference(model, operation.name, given, values)
                    failed = []
                    if operation.name != "solve" and not all(bool(x.isfinite().all()) for x in wanted.values()):
                        # Explicit models give NaN for NaN.
                        failed = [
                            k for k, x in enumerate(given[next(iter(operation.inputs))]) if not np.isfinite(x).all()
                        ]
                except ConvergenceError as error:
                    failed = error.rows.tolist()  # type: ignore[attr-defined]
                if failed:
                    assert isinstance(answer, Refused) and answer.status == 422 and answer.rows == failed
                    continue
                assert not isinstance(answer, Exception), answer
                told = Answer(200, *write_answer(stub, calls[place], answer)).arrays
                assert told.keys() == wanted.keys()
                for name, value in wanted.items():
                    _close(told[name], value.numpy(), operation.name)


@pytest.mark.wide
@pytest.mark.parametrize("operation", ["forward", "jacobian", "jvp"])
def test_a_rate_where_no_time_passes_fails_its_own_request(operation: str) -> None:
    """In an explicit model, where no solve fails: refused by name, and gathered neighbours are right."""
    model = Model(artifact("cohesive"))
    served = Served("cohesive", model)
    known = served.signatures[operation]
    rng = np.random.default_rng(0)
    asked = []
    for place in range(3):
        names = [*known.inputs, *(name for name in known.optional if name.startswith("tangent:"))]
        given = {name: rng.uniform(0.1, 0.5, (2, *{**known.inputs, **known.optional}[name].shape)) for name in names}
        given |= {"t": np.array([2.0, 3.0]), "t~1": np.array([1.0, 3.0 if place == 1 else 2.0])}
        asked.append(given)
    calls = []
    for given in asked:
        body, headers = encode(given, True, {"operation": operation})
        calls.append(read_call(served, body, headers["Inference-Header-Content-Length"].encode(), Limits()))
    before, refused, after = evaluate(served, calls)
    assert isinstance(refused, Refused) and (refused.status, refused.rows) == (422, [1])
    assert "1 of 2 rows failed (not finite: 1). 't' equals 't~1' in 1 of these rows" in refused.message
    for given, answer in ((asked[0], before), (asked[2], after)):
        assert not isinstance(answer, Exception)
        for name, value in reference(model, operation, given, {}).items():
            _close(answer[name], value.numpy(), operation)


def _close(found: Array, wanted: Array, operation: str) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    # Sums over rows, and what is zero by cancellation, have the rounding of their largest terms.
    scale = float(np.abs(np.nan_to_num(wanted)).max(initial=0.0))
    relative = 1e-12 if wanted.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=relative * max(scale, 1e-6), err_msg=operation)
