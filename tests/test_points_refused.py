"""What `Points` refuses: clear errors that leave the state as it was."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import references
from neml2_aoti_plugin import (
    AOTIError,
    ArtifactNotFoundError,
    DerivativeNotCompiledError,
    InputError,
    InputTypeError,
    Points,
    UnknownNameError,
)
from neml2_aoti_plugin.points import PointsState
from point_cases import Array, Exported, N, begun, read_only, stepped, strains, unchanged

Call = Callable[[Points], Any]

ZERO, SAME, ALL = np.zeros((N, 6)), np.zeros((N, 6)), np.ones(N, bool)
ZEROS = torch.zeros(N, 6).double()
PAIR = ("stress", "strain")
# The third one is not symmetric.
TENSORS = np.eye(9)[[0, 4, 1, 8]].reshape(N, 3, 3)


def update(*values: Any, **changes: Any) -> Call:
    """An update that is right but for some of what it is given."""
    given = {"strain": ZERO, "t": 2.0, **changes}
    return lambda p: p.update(*values, **{name: value for name, value in given.items() if value is not ...})


def out(value: Any) -> Call:
    """An update with an array for the stress."""
    return update(out={"stress": value})


def then(keep: Any, **changes: Any) -> Call:
    """An update with a commit."""

    def call(points: Points) -> None:
        update(**changes)(points)
        points.commit(keep)

    return call


def restore(change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The restore of a state with other values."""
    return lambda p: p.restore(PointsState({n: change(x) for n, x in p.state().values.items()}, p.model.digest, N))


def state_of(name: str, n: int = N, **options: Any) -> Call:
    """The restore of a state of other points."""
    return lambda p: p.restore(Points(references.case(name).model, n).state(), **options)


def form(strain: Array, **options: Any) -> Call:
    """An update of points in another form."""

    def call(_: Points) -> None:
        points = stepped(**options)
        with unchanged(points):
            points.update(strain=strain, t=2.0)

    return call


def override(values: Any) -> Call:
    """An update of elastic points with other parameters."""
    return lambda _: Points(references.case("promoted").model, N).update(strain=ZERO, param_overrides=values)


def made(**options: Any) -> Call:
    """Points that are made with these options."""
    return lambda _: Points(**{"model": references.case("viscoplasticity").model, "n": N, **options})


def tangent(*keys: str, pairs: Any = None, **options: Any) -> Call:
    """What is asked of the tangent of an update."""
    return lambda _: functools.reduce(getitem, keys, begun(pairs=pairs).update(strain=ZERO, t=2.0, **options).tangent)


def strided(*strides: int) -> Array:
    found: Array = np.lib.stride_tricks.as_strided(np.zeros(50), (N, 6), strides)
    return found


def dual(points: Points) -> None:
    with forward_ad.dual_level():
        points.update(strain=forward_ad.make_dual(ZEROS, ZEROS), t=2.0)


def mapped(points: Points) -> Any:
    return torch.func.vmap(lambda x: points.update(strain=x, t=2.0).outputs["stress"])(ZEROS[None])


class Tracer:
    """What has DLPack, and raises what it likes."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AttributeError("a tracer")

    __dlpack_device__ = __dlpack__


with torch.inference_mode():
    AT_INFERENCE = torch.zeros(N, 6).double()

SHARED = r"out\[stress\] has entries that share memory"
FLOAT32 = "has dtype float32, expected float64"
TWO = {"strain": ZERO[:2]}

CALLS: dict[type[Exception], list[tuple[Call, str]]] = {
    InputError: [
        # the strain and the time
        (update(strain=np.zeros((5, 6))), r"expected \(4, 6\), or \(6,\) for all points .* there are 4 points"),
        (update(strain=0.0), r"'strain' has shape \(\)"),
        (update(t=np.zeros(3)), r"'t' has shape \(3,\), expected \(4,\), or \(\) for all points alike"),
        (update(t=np.zeros((N, 1))), r"'t' has shape \(4, 1\)"),
        (update(t=10**400), "'t' is a whole number larger"),
        (dual, "'strain' carries a forward-mode tangent"),
        (form(ZERO, notation="tensor"), r"expected \(4, 3, 3\).*convert\(strain, 'mandel', 'tensor'\)"),
        (form(TENSORS, notation="voigt"), r"convert\(strain, 'tensor', 'voigt strain'\)"),
        (form(TENSORS, notation="tensor"), r"a 3 x 3 tensor at \[2\] is not sym"),
        (form(ZERO, dimension="plane strain"), r"expected \(4, 3\).*xx, yy, xy in .*dimension="),
        (form(ZERO, dimension="axisymmetric"), r"expected \(4, 4\).*rr, zz, tt, rz in .*dimension="),
        (
            form(np.ones((N, 3, 3)), dimension="axisymmetric", notation="tensor"),
            "'strain': an axisymmetric tensor has no shears rt and zt.*whole=",
        ),
        # parameters
        (override({"promoted.E": np.ones(5)}), r"'promoted.E' has shape \(5,\), expected \(4,\), a value for each"),
        (override({"promoted.E": np.ones((4, 6))}), r"'promoted.E' has shape \(4, 6\)"),
        # arrays for results
        (out(np.zeros((3, 6))), r"out\[stress\] has shape \(3, 6\), expected \(4, 6\)"),
        (out(read_only(ZERO)), r"out\[stress\] is a ndarray that is read-only"),
        (out(Exported(read_only(ZERO))), r"out\[stress\] is a Exported that is read-only"),
        (out(strided(0, 8)), SHARED),
        (out(strided(16, 8)), SHARED),
        (out(ZEROS[0].expand(N, 6)), SHARED),
        (out(ZEROS.clone().requires_grad_()), "requires grad and must not be written to"),
        (out(AT_INFERENCE), r"out\[stress\] was made under torch.inference_mode"),
        (out(torch.zeros(N, 6, dtype=torch.complex128).conj().imag), "memory does not hold its values"),
        (
            update(out={"stress": SAME, "equivalent_plastic_strain": SAME[:, 5]}),
            r"out\[stress\] and out\[equivalent_plastic_strain\] share memory",
        ),
        # points that are chosen
        (update(points=[0, 1]), r"'strain' has shape \(4, 6\), expected \(2, 6\)"),
        (update(**TWO, points=[1, 1]), "points holds a point twice"),
        (update(**TWO, points=[0, 4]), "points has indices from 0 to 4"),
        (update(**TWO, points=[0.0, 1.0]), "points has shape .* dtype float64"),
        (then([[0], [1, 2]]), "keep is no array"),
        (then(slice("a", "b")), "keep is no array of points .*indices or a slice"),
        (then(np.ones(3, bool)), r"keep has shape \(3,\) and dtype bool, expected"),
        (then([0, 4]), "keep has indices from 0 to 4, expected 0 to 3"),
        (then(np.ones(N)), "dtype float64"),
        # states
        (lambda p: p.initial(stress=np.zeros((N, 3))), r"'stress' has shape \(4, 3\), expected \(4, 6\)"),
        (lambda p: p.initial(stress=ZERO * np.nan), "not finite"),
        (lambda p: p.initial(stress=ZEROS[0].clone().requires_grad_()), "'stress' requires grad, and"),
        (state_of("viscoplasticity", 3), "one of 3 points, expected 4"),
        (state_of("calibration"), "one of another artifact.*other_artifact=True"),
        (restore(lambda _: torch.zeros(N).double()), "'strain~1' has shape"),
        (restore(lambda x: x * np.nan), "holds other than finite numbers"),
        (restore(lambda x: x > 0), r"other than finite numbers \(torch.bool\)"),
        (
            lambda p: PointsState({"t~1": torch.tensor([torch.inf])}, p.model.digest, 1).save("state.npz"),
            "'t~1' holds other than finite numbers",
        ),
        # how points are made, and what their tangent has
        (made(n=-1), "n is -1, expected a whole number"),
        (made(notation="Voigt"), "notation is 'Voigt', expected one of mandel, voigt, tensor"),
        (made(dimension=2), "dimension is 2, expected one of 3, 'plane strain', 'plane stress', 'axi"),
        (tangent("stress", pairs=[]), r"Points\(..., pairs=\[\('stress', 'strain'\)\]\)"),
        (tangent("stress", tangent=False), r"Call update\(..., tangent=True\)"),
    ],
    InputTypeError: [
        (update(strain=ZERO.astype(np.float32)), f"'strain' {FLOAT32}"),
        (update(strain=ZEROS.float()), f"'strain' {FLOAT32}"),
        (update(strain=ZERO.astype(int)), "dtype int64"),
        (update(strain=ZERO.astype(">f8")), "dtype >f8"),
        (update(strain=[[0.0] * 6] * N), r"a list.*numpy.asarray\(strain"),
        (update(strain=None), "'strain' is a NoneType"),
        (update(strain=ZEROS.to("meta")), "on device meta, expected cpu"),
        (update(strain=np.ma.masked_array(ZERO, ZERO == 0)), r"is a masked array.*strain.filled\("),
        (update(strain=Tracer()), r"is a Tracer, which DLPack does not hand over \(AttributeError: a tracer\)"),
        (update(t=np.ma.masked), "'t' is a masked array"),
        (update(t=True), "'t' is a bool"),
        (mapped, "'strain' is a value inside torch.vmap"),
        (update(ZERO), "values are a ndarray, expected a dict by name"),
        (update(out=ZERO), "out is a ndarray, expected a dict"),
        (out(ZEROS.to_sparse()), r"'out\[stress\]' has the layout torch.sparse_coo"),
        (out(np.ma.masked_array(ZERO.copy(), ZERO == 0)), r"'out\[stress\]' is a masked array"),
        (out(ZERO.astype(np.float32)), r"'out\[stress\]' has dtype float32"),
        (out([0.0]), r"out\[stress\] is a list"),
        (then(np.ma.masked_array(ALL, [True, False, False, False])), "'keep' is a masked array"),
        (lambda p: p.restore({}), "state is a dict"),  # type: ignore[arg-type]
        (override([1.0]), "param_overrides are a list, expected a dict"),
        (override({"promoted.E": np.ones(4, np.float32)}), "'promoted.E' has dtype float32"),
        (override({"promoted.E": "1"}), "'promoted.E' is a str"),
        (made(n=2.0), "n is 2.0, expected a whole number"),
        (made(n=True), "n is True"),
        (made(pairs=PAIR), "pairs hold 'stress', expected pairs of names"),
        (made(model=3), "model is a int, expected a Model or the path"),
    ],
    UnknownNameError: [
        (update(t=...), "missing 't'.*driven inputs are: strain, t"),
        (update(temperature=300.0), "unknown 'temperature'"),
        (update({"stress~1": ZERO}), "'stress~1' is kept by the points"),
        (update(out={"sress": ZERO}), r"out holds 'sress'.*'stress', "),
        (update(tangent=False, out={PAIR: np.zeros((N, 6, 6))}), "no result of this update"),
        (lambda p: p.initial(back_stress=0.0), "unknown 'back_stress'.*kept are: strain, t,"),
        (lambda p: p.committed("stress", 2), "unknown 'stress~2'"),
        (lambda p: (update()(p), p.trial("sigma")), "unknown 'sigma'"),
        (state_of("substepping", other_artifact=True), "missing 'stress~1'; unknown 'plastic_strain~1'"),
        (
            lambda p: p.restore(PointsState.from_dict({"t~1": np.zeros(N)}, p.model.digest, N)),
            "the state: missing 'strain~1'",
        ),
        (override({"promoted.G": 1.0}), "param_overrides: unknown 'promoted.G'.*promoted parameters are:"),
        (made(pairs=[("stress", "strian")]), "unknown 'strian'. Did you mean 'strain'"),
        (tangent("sress"), "unknown 'sress'"),
        (tangent("stress", "strian"), "unknown 'strian'. Did you mean 'strain'"),
    ],
    DerivativeNotCompiledError: [
        (made(pairs=[("stress", "t")]), r"d\(stress\)/d\(t\) was not.*-d stress:t"),
        (made(pairs=[("stress", "strain~1")]), "'strain~1' is kept.* by a driven input"),
        (tangent("stress", "t"), r"d\(stress\)/d\(t\) was not.*-d stress:t"),
        (tangent("equivalent_plastic_strain"), "-d equivalent_plastic_strain:"),
        (tangent("stress", "strain~1"), "'strain~1' is kept by the points"),
    ],
    ArtifactNotFoundError: [(made(model="/nowhere/at/all"), "nowhere")],
    AOTIError: [
        (lambda p: p.commit(), "no update since the last commit"),
        (then(None, strain=ZERO * np.nan), "4 of 4 points failed"),
        (
            then(None, **TWO, points=slice(2)),
            r"2 of 4 points were not updated since the last commit and can't be .*: 2, 3. Call update\(..., points",
        ),
        (then([1, 2], **TWO, points=[3, 1]), "1 of 4 points were not updated .*: 2"),
    ],
}


@pytest.mark.parametrize(("call", "error", "words"), [(c, e, w) for e, told in CALLS.items() for c, w in told])
def test_a_call_is_refused_and_leaves_the_state(call: Call, error: type[Exception], words: str) -> None:
    points = stepped()
    with unchanged(points), pytest.raises(error, match=words) as raised:
        call(points)
    assert type(raised.value) is error


def test_an_error_leaves_the_last_update() -> None:
    points = stepped()
    points.update(strain=2 * strains(), t=2.0)
    with pytest.raises(InputError):
        points.update(strain=np.zeros((5, 6)), t=2.0)
    points.commit()
    assert np.array_equal(points.committed("strain"), 2 * strains())


def test_an_interrupt_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    points = stepped()

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(points.model, "solve", interrupted)
    with unchanged(points), pytest.raises(KeyboardInterrupt):
        points.update(strain=ZERO, t=2.0)


def test_values_of_another_number_of_points_in_the_model() -> None:
    model = references.case("promoted").load()
    model.set_parameter("promoted.E", torch.full((5,), 1e5).double())
    for n in (1, N):
        with pytest.raises(InputError, match=rf"'promoted.E' has shape \(5,\), expected \({n},\)"):
            Points(model, n).update(strain=strains()[:n])


def test_a_derivative_by_a_parameter_that_was_not_compiled(tmp_path: Path) -> None:
    model = references.altered("promoted", tmp_path, parameter_derivatives=[["stress", "promoted.E"]])
    pairs, tangent = [("stress", "promoted.E")], Points(model, N).update(strain=strains()).tangent["stress"]
    assert Points(model, N, pairs=pairs, dimension="plane stress").pairs == tuple(pairs)
    for call in (lambda: Points(model, N, pairs=[("stress", "promoted.nu")]), lambda: tangent["promoted.nu"]):
        with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(promoted.nu\) was not.*-d stress:"):
            call()
    with pytest.raises(InputError, match=r"Points\(..., pairs=\[\('stress', 'promoted.E'\)\]\)"):
        tangent["promoted.E"]


def test_without_derivatives_the_tangent_gives_the_command(tmp_path: Path) -> None:
    model = references.altered("viscoplasticity", tmp_path, derivatives=[])
    found = begun(model).update(strain=strains(), t=1.0).tangent
    with pytest.raises(DerivativeNotCompiledError) as expected:
        model.jacobian({name: torch.zeros(v.base_shape).double() for name, v in model.inputs.items()})
    with pytest.raises(DerivativeNotCompiledError) as raised:
        found["stress"]
    assert str(raised.value) == str(expected.value) and "neml2-compile INPUT.i" in str(raised.value)
    assert found == {} and found.get("stress") is None and "stress" not in found


def test_results_can_be_copied_and_pickled() -> None:
    found = stepped().update(strain=strains(), t=2.0)
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert np.array_equal(again.tangent["stress"]["strain"], found.tangent["stress"]["strain"])
