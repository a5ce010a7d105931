"""Real artifacts of every released schema against those that neml2 3.1.0 compiled from the same input.

The artifacts are built on first use, which takes long: `python -m legacy.build -j 2` does it ahead of
`python -m pytest -m legacy`. `make legacy` runs the tests of one scenario, `multi`, and `make legacy-all` all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import neml2
import pytest
import torch
from torch import Tensor

import references
from data import collect
from legacy import build
from legacy.catalogue import EVERY, SCENARIOS, pairs, release_named
from neml2_aoti_plugin import DerivativeNotCompiledError, Model
from neml2_aoti_plugin._artifact.compatibility import check
from neml2_aoti_plugin._artifact.decode import read_metadata
from neml2_aoti_plugin._artifact.locate import locate
from neml2_aoti_plugin._artifact.schema import ExplicitInfo, ImplicitInfo, Metadata
from references import Tensors

pytestmark = [pytest.mark.legacy, pytest.mark.timeout(3600)]

NEWEST = "3.1.0"
OLD = [release for release in EVERY if release != NEWEST]
# Relative to the largest entry of a tensor.
SAME = 1e-12
SINGLE = 1e-6
DIFFERENCES = 1e-6
ROWS = 5


def each(some: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """A test for each (release, scenario)."""
    return pytest.mark.parametrize(("release", "scenario"), some, ids=["-".join(pair) for pair in some])


every = each(pairs(OLD))
# The driver's tensors are double precision, which the float32 artifact refuses.
driven = each([pair for pair in pairs(OLD) if SCENARIOS[pair[1]].driver and pair[1] != "static_float32"])


def having(scenario: str, *without: str) -> pytest.MarkDecorator:
    """A test for each old release that builds a scenario."""
    return pytest.mark.parametrize("release", [r for r, _ in pairs(OLD, [scenario]) if r not in without])


def entry(release: str, scenario: str) -> Path:
    """The folder or file that a user of that release would name."""
    metadata = build.metadata(release, scenario)
    return metadata if release_named(release).schema < 12 else metadata.parent


@functools.cache
def described(release: str, scenario: str) -> Metadata:
    return read_metadata(locate(entry(release, scenario)))


def implicit(release: str, scenario: str) -> list[ImplicitInfo]:
    return [segment for segment in described(release, scenario).segments if isinstance(segment, ImplicitInfo)]


@functools.cache
def model(release: str, scenario: str) -> Model:
    """The model with the Newton settings of the newest release, wherever its own release kept them."""
    newton = [asdict(segment.newton) for segment in implicit(NEWEST, scenario)]
    return Model(entry(release, scenario), solver=newton[0] if newton else None)


# What an input means decides what values make sense; all others are small numbers.
SCALES = {"t": (1.5, 0.1), "t~1": (0.4, 0.1), "temperature": (330.0, 30.0), "overstress": (120.0, 80.0)}


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    middle, width = SCALES.get(name, (0.0, spread))
    return (middle + width * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@functools.cache
def lone(scenario: str) -> frozenset[str]:
    """Inputs that not every release has: initial guesses of unknowns, and the old value of an incremental variable."""
    found: set[str] = set()
    for part in implicit(NEWEST, scenario):
        packed = {v.name for group in part.givens for v in group.variables}
        found |= {v.name for v in part.unknown_variables} | ({g.name for g in part.roles} - packed)
    return frozenset(found)


def inputs(release: str, scenario: str, batch: tuple[int, ...] = (ROWS,)) -> Tensors:
    """Inputs by name, the same for all releases; zero for those that not every release has."""
    of, spread, found = model(release, scenario), 2e-3 if scenario == "multi" else 0.3, {}
    for name, variable in of.inputs.items():
        given = value(name, (*batch, *variable.natural_shape), of.dtype, spread)
        found[name] = torch.zeros_like(given) if name in lone(scenario) else given
    return found


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry wanted."""
    found, wanted = torch.broadcast_tensors(found, wanted)
    return references.difference(found, wanted, least=1e-30)


def largest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert set(found) == set(wanted)
    return max(difference(found[name], wanted[name]) for name in wanted)


def tolerance(of: Model) -> float:
    return SAME if of.dtype == torch.float64 else SINGLE


# -- numbers -------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("batch", [(), (1,), (ROWS,), (2, 3)], ids=str)
def test_values(release: str, scenario: str, batch: tuple[int, ...]) -> None:
    old, new = model(release, scenario), model(NEWEST, scenario)
    found, wanted = old.forward(inputs(release, scenario, batch)), new.forward(inputs(NEWEST, scenario, batch))
    assert largest(found, wanted) <= tolerance(new)


@every
def test_derivatives(release: str, scenario: str) -> None:
    """Those of the newest release; and others, between sites, that later releases refuse to compile, of differences."""
    old, new, at = model(release, scenario), model(NEWEST, scenario), inputs(release, scenario)
    if not old.derivative_pairs:
        assert not new.derivative_pairs and release_named(release).schema >= 7
        return
    outputs, blocks = old.jacobian(at)
    _, wanted = new.jacobian(inputs(NEWEST, scenario)) if new.derivative_pairs else ({}, {})
    common = [(out, by) for out, by in new.derivative_pairs if by in old.inputs]
    assert set(common) <= set(old.derivative_pairs)
    assert all(difference(blocks[out][by], wanted[out][by]) <= tolerance(new) for out, by in common)
    along = {name: value(f"d{name}", tuple(x.shape), old.dtype) for name, x in at.items()}
    pushed = {}
    for out, by in old.derivative_pairs:
        block = blocks[out][by].expand(*outputs[out].shape, *along[by].shape[1:])
        rows = block.reshape(ROWS, -1, along[by][0].numel())
        pushed[out, by] = (rows @ along[by].reshape(ROWS, -1, 1)).view_as(outputs[out])
    step = 1e-6
    for out, by in set(old.derivative_pairs) - set(new.derivative_pairs):
        ahead, behind = (old.forward({**at, by: at[by] + s * along[by]})[out] for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        assert references.difference(pushed[out, by], slope, least=1.0) <= DIFFERENCES
    # Along a direction they add up.
    outs = {out for out, _ in old.derivative_pairs}
    names = [by for by in old.inputs if all((out, by) in pushed for out in outs)]
    found = old.jvp(at, {name: along[name] for name in names})[1] if names else {}
    for out in outs & set(found):
        assert difference(found[out], torch.stack([pushed[out, by] for by in names]).sum(0)) <= tolerance(old)


@every
def test_derivatives_by_parameters(release: str, scenario: str) -> None:
    old, new = model(release, scenario), model(NEWEST, scenario)
    if not new.parameter_derivative_pairs:
        pytest.skip("no derivative by a parameter compiled")
    at, new_at = inputs(release, scenario), inputs(NEWEST, scenario)
    if release_named(release).schema < 7:
        with pytest.raises(DerivativeNotCompiledError, match="without derivatives by parameters"):
            old.param_jacobian(at)
        return
    outputs, found = old.param_jacobian(at)
    _, wanted = new.param_jacobian(new_at)
    assert max(difference(found[o][p], wanted[o][p]) for o, p in new.parameter_derivative_pairs) <= tolerance(new)
    cotangents = {out: value(out, tuple(x.shape), old.dtype) for out, x in outputs.items()}
    assert largest(old.param_vjp(at, cotangents), new.param_vjp(new_at, cotangents)) <= tolerance(new)


@every
def test_parameters_common_to_the_batch_or_not(release: str, scenario: str) -> None:
    """Whether a graph takes a parameter once or per row shows in its package, and the caller sees no difference."""
    old, new = model(release, scenario), model(NEWEST, scenario)
    if not new.named_parameters():
        pytest.skip("no parameter promoted")
    for factor in (torch.tensor(1.1, dtype=new.dtype), torch.linspace(0.8, 1.2, ROWS, dtype=new.dtype)):
        changed = {n: p * factor for n, p in new.named_parameters().items()}
        wanted = new.forward(inputs(NEWEST, scenario), changed)
        # Releases before 3.0.4 leave the block of a lone model out of a parameter's name.
        own = {n if n in old.named_parameters() else n.rpartition(".")[2]: p for n, p in changed.items()}
        assert largest(old.forward(inputs(release, scenario), own), wanted) <= tolerance(new)


# -- stubs and drivers ---------------------------------------------------------------------------------------------


@every
def test_the_stub(release: str, scenario: str) -> None:
    """With its own Newton settings, and at the path it was not compiled in: the build moves the folder."""
    found = {}
    for which in (release, NEWEST):
        typed = neml2.load_model(build.stub(which, scenario), SCENARIOS[scenario].model)
        found[which] = dict(zip(typed.output_spec, typed(*inputs(which, scenario).values()), strict=True))
    old, new = found[release], found[NEWEST]
    assert list(old) == list(new) or release_named(release).schema < 7
    assert {name: type(x) for name, x in old.items()} == {name: type(x) for name, x in new.items()}
    assert all(difference(old[name].data, x.data) <= tolerance(model(NEWEST, scenario)) for name, x in new.items())


@driven
def test_the_driver(release: str, scenario: str) -> None:
    name, dtype, found = str(SCENARIOS[scenario].driver), model(NEWEST, scenario).dtype, {}
    for which in (release, NEWEST):
        driver = neml2.load_input(build.stub(which, scenario), dtype=dtype).get_driver(name)
        assert driver.run()
        found[which] = {key: x for key, x in driver.result().items() if key.startswith("output")}
    wanted = found[NEWEST]
    assert wanted and largest({k: found[release][k] for k in wanted}, wanted) <= tolerance(model(NEWEST, scenario))


# -- traps ---------------------------------------------------------------------------------------------------------


@having("promoted_provider")
def test_a_parameter_ahead_of_the_input(release: str) -> None:
    checked = check(described(release, "promoted_provider"), locate(entry(release, "promoted_provider")))
    first = checked.metadata.segments[0]
    assert isinstance(first, ExplicitInfo)
    ahead = ("young.value", "strain") if release_named(release).schema < 7 else ("strain", "young.value")
    assert (first.taken, first.inputs, first.parameters) == (ahead, ("strain",), ("young.value",))


@having("unreached")
@pytest.mark.parametrize("scenario", ["unreached", "unreached_forward"])
def test_a_pair_without_a_path_is_zero(release: str, scenario: str) -> None:
    old = model(release, scenario)
    assert ("early", "f") in old.derivative_pairs
    _, blocks = old.jacobian(inputs(release, scenario))
    assert blocks["early"]["f"].shape == (ROWS,) and not blocks["early"]["f"].any()
    late = next(i for o, i in old.derivative_pairs if o == "late")
    assert blocks["late"][late].abs().min() > 0


@having("unreached")
def test_a_segment_off_every_path_has_no_derivative_graph(release: str) -> None:
    forward = [s for s in described(release, "unreached_forward").segments if isinstance(s, ExplicitInfo)]
    assert implicit(release, "unreached")[0].sensitivity is None
    assert any(s.jacobian is None for s in forward) and any(s.jacobian is not None for s in forward)


@having("cross_group", "3.0.6", "3.0.7")
def test_sums_over_sites_are_no_derivatives(release: str) -> None:
    """3.0.3 sums the derivatives by a block group's givens over its sites; what needs them is not offered."""
    old, at = model(release, "cross_group"), inputs(release, "cross_group")
    assert {i for _, i in old.derivative_pairs} == set(old.inputs) - {"pull", "site~1"}
    with pytest.raises(DerivativeNotCompiledError, match="pull"):
        old.jvp(at, {"pull": at["pull"]})


@having("pinned")
@pytest.mark.parametrize("scenario", ["pinned", "rank2"])
def test_traced_batch_axes_are_read_from_the_package(release: str, scenario: str) -> None:
    free, old = model(NEWEST, "forward"), model(release, scenario)
    for rows in (1, 2, 3, 4, 7):
        strain = {"strain": inputs(NEWEST, "forward", (rows,))["strain"]}
        (found, blocks), (wanted, right) = old.jacobian(strain), free.jacobian(strain)
        assert largest(found, wanted) <= SAME and largest(blocks["stress"], right["stress"]) <= SAME
        assert largest(old.forward(strain), wanted) <= SAME


@having("static_float32")
def test_the_dtype_is_a_label(release: str) -> None:
    old, double = model(release, "static_float32"), model(NEWEST, "forward")
    strain = inputs(release, "static_float32")["strain"]
    found = old.forward({"strain": strain})["stress"]
    assert old.dtype == found.dtype == torch.float32
    assert difference(found, double.forward({"strain": strain.double()})["stress"]) <= SINGLE


# One less than substep.i sets.
MOST_UPDATES = 6


@having("substep")
def test_an_incremental_variable_is_shared_out(release: str) -> None:
    """Schema 12 gives each substep its share; 3.1.0 changed what it does with such a variable."""
    old = Model(entry(release, "substep"))

    def increment(x: float, start: float, end: float, strain: float) -> Tensors:
        """A step from `x`, which is the initial guess as well."""
        given = {"x": x, "x~1": x, "t": end, "t~1": start, "dstrain": strain}
        return {name: torch.tensor(given[name], dtype=torch.float64) for name in old.inputs}

    for size in (-0.25 * k for k in range(1, 40)):
        whole = old.solve(increment(0.1, 0.0, 1.0, size))
        if int(whole.iterations) <= MOST_UPDATES or not bool(whole.converged):
            continue
        first = old.solve(increment(0.1, 0.0, 0.5, size / 2))
        second = old.solve(increment(float(first.outputs["x"]), 0.5, 1.0, size / 2))
        if max(int(first.iterations), int(second.iterations)) <= MOST_UPDATES:
            assert difference(whole.outputs["x"], second.outputs["x"]) <= SAME
            return
    pytest.fail("no increment that needs to be halved once")


@each(collect.WANTED)
def test_the_metadata_in_the_repository_is_what_the_release_writes(release: str, scenario: str) -> None:
    assert collect.document(release, scenario) == json.loads(build.metadata(release, scenario).read_text())
