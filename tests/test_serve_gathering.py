"""Requests that come at once, to the application alone: for models of every kind, each gets what it would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from neml2_aoti_plugin import ConvergenceError, Model
from neml2_aoti_plugin.serve import app
from serving import DTYPES, Array, Ask, artifact, encode, infer, reference, running, same, step, strain

STUBS = (
    *("calibration", "cross_group", "krylov", "predictor_loop", "promoted", "substepping"),
    *("chaboche", "composed", "crystal", "elasticity_float32", "elasticity_rank2", "elasticity_static"),
    *("mixed_control", "porous", "promoted_implicit", "rate_independent", "renamed", "cohesive"),
)
REQUESTS, FAILING = 12, 4
# Steps of time of the same length: with others, some models have several solutions at random inputs.
TIMES = {"t": 1.0, "t~1": 0.0, "t~2": -1.0}
INFER = infer("model")


def serving(use: Callable[[Ask], Awaitable[None]], model: Any, **limits: Any) -> None:
    """Use an application that serves a model."""

    async def run() -> None:
        async with running(app({"model": model}, **limits)) as ask:
            await use(ask)

    asyncio.run(asyncio.wait_for(run(), 250))


async def at_once(ask: Ask, bodies: list[Any]) -> Any:
    """The answers to requests that come at once."""
    return await asyncio.gather(*(ask("POST", INFER, *body) for body in bodies))


async def require_count(ask: Ask, metric: str, count: float, operation: str = "forward") -> None:
    metrics = (await ask("GET", "/metrics")).body.decode()
    assert f'{metric}{{model="model",operation="{operation}"}} {float(count)}' in metrics, metrics


def requests(model: Model, takes: Any) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """Inputs and overrides: small numbers at random, a step of time, and a NaN in one request."""
    rng = np.random.default_rng(0)
    own = {name: value.detach().numpy() for name, value in model.named_parameters().items()}
    tangents = [known for known in takes["optional_inputs"] if known["name"].startswith("tangent:")]
    found = []
    for place in range(REQUESTS):
        rows, given, overrides = int(rng.integers(1, 4)), dict[str, Array](), dict[str, Array]()
        for known in (*takes["inputs"], *tangents):
            name, shape = known["name"], (rows, *known["shape"][1:])
            value = np.full(rows, TIMES[name]) if name in TIMES else 1e-3 * rng.standard_normal(shape)
            given[name] = value.astype(DTYPES[known["datatype"]])
        if own and place % 3:
            first, *_, last = [*own, *own]
            overrides[first] = own[first] * 1.1
            if place % 3 == 2:
                overrides[last] = own[last] * rng.uniform(0.9, 1.1, (rows, *([1] * own[last].ndim)))
        found.append((given, overrides))
    next(iter(found[FAILING][0].values()))[0] = np.nan
    return found


def wanted_of(model: Model, operation: str, given: dict[str, Array], overrides: dict[str, Array]) -> Any:
    """What answers a request, or the rows of it that fail."""
    try:
        wanted = reference(model, operation, given, overrides)
    except ConvergenceError as error:
        return error.rows.tolist()  # type: ignore[attr-defined]
    if operation == "solve" or all(np.isfinite(value).all() for value in wanted.values()):
        return wanted
    # Explicit models give NaN for NaN.
    return [row for row, x in enumerate(next(iter(given.values()))) if not np.isfinite(x).all()]


@pytest.mark.parametrize("stub", STUBS)
def test_each_gets_what_it_would_get_alone(stub: str) -> None:
    model = Model(artifact(stub))
    # Those with values of parameters of their own, and those without; one call each where that cannot be per row.
    bases = model.parameter_base_shapes
    per_row = all(list(x.shape) == bases[name] for name, x in model.named_parameters().items())
    calls = (2 if bases else 1) if per_row else REQUESTS

    async def use(ask: Ask) -> None:
        operations = (await ask("GET", "/v2/models/model")).document["parameters"]["operations"]
        for operation, takes in operations.items():
            asked, bodies = requests(model, takes), []
            for place, (given, overrides) in enumerate(asked):
                values = {name: value.tolist() for name, value in overrides.items()}
                more = {"parameter_overrides": values} if values else {}
                bodies.append(encode(given, place % 2 == 0, {"operation": operation, **more}))
            answers = await at_once(ask, bodies)
            await require_count(ask, "neml2_gathered_rows_count", calls, operation)
            for answer, one in zip(answers, asked, strict=True):
                wanted = wanted_of(model, operation, *one)
                if isinstance(wanted, list):
                    assert answer.status == 422 and answer.document["rows"] == wanted
                else:
                    same(answer.arrays, wanted)

    serving(use, model)


def test_where_a_gathered_call_raises_each_is_evaluated_alone() -> None:
    model = Model(artifact("viscoplasticity"))
    asked = [{**step(2, seed), "stress": np.zeros((2, 6))} for seed in range(6)]
    # An initial guess, found only when the model is called, which raises for the call as a whole.
    asked[3]["stress"][1] = np.nan

    async def use(ask: Ask) -> None:
        for place, answer in enumerate(await at_once(ask, [encode(one) for one in asked])):
            if place == 3:
                assert answer.status == 400 and "'stress' is not finite" in answer.error
            else:
                same(answer.arrays, reference(model, "forward", asked[place]))

    serving(use, model)


def test_a_parameter_may_get_values_along_the_batch_while_it_serves() -> None:
    """Rows that were gathered before have one value each from then on, and each request is a call of its own."""
    model = Model(artifact("promoted"))
    asked = [strain(2, seed) for seed in range(3)]
    bodies = [encode(one) for one in asked]

    async def use(ask: Ask) -> None:
        assert (await ask("POST", INFER, *bodies[0])).status == 200
        # As many values as a request has rows, and then as three of them gathered have.
        model.set_parameter("promoted.E", torch.tensor([1e5, 2e5]).double())
        for answer, one in zip(await at_once(ask, bodies), asked, strict=True):
            same(answer.arrays, reference(model, "forward", one))
        await require_count(ask, "neml2_gathered_rows_count", 4)
        model.set_parameter("promoted.E", torch.linspace(1e5, 2e5, 6).double())
        assert [answer.status for answer in await at_once(ask, bodies)] == [400] * 3

    serving(use, model)


@pytest.mark.parametrize(
    ("limits", "calls"),
    [({"wait_ms": 500}, 1), ({"wait_ms": 60_000, "gather_rows": 4}, 1), ({"gather_rows": 1}, 2)],
    ids=["for some time", "until there are enough", "not at all"],
)
def test_requests_wait_for_others(limits: dict[str, Any], calls: int) -> None:
    async def use(ask: Ask) -> None:
        first = asyncio.create_task(ask("POST", INFER, *encode(strain(2))))
        await asyncio.sleep(0.05)
        second = await ask("POST", INFER, *encode(strain(2), False))
        same((await first).arrays, second.arrays)
        await require_count(ask, "neml2_call_seconds_count", calls)

    serving(use, artifact("elasticity"), **limits)


def test_a_client_that_has_gone_costs_nothing() -> None:
    async def use(ask: Ask) -> None:
        gone = asyncio.create_task(ask("POST", INFER, *encode(strain(50)), leaves=True))
        stayed = await ask("POST", INFER, *encode(strain(2)))
        same(stayed.arrays, reference(Model(artifact("elasticity")), "forward", strain(2)))
        assert (await gone).status == 499
        await require_count(ask, "neml2_rows_total", 2)

    serving(use, artifact("elasticity"), wait_ms=300)
