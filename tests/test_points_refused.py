"""What `Points` refuses: clear errors that leave the state as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
from viscoplastic_points import Array, Exported, N, begun, read_only, strains


def _as_strided(strides: tuple[int, int]) -> Array:
    found: Array = np.lib.stride_tricks.as_strided(np.zeros(50), (N, 6), strides)
    return found


def _at_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(N, 6, dtype=torch.float64)


def _dual(points: Points) -> None:
    with forward_ad.dual_level():
        points.update(strain=forward_ad.make_dual(torch.zeros(N, 6), torch.ones(N, 6)), t=2.0)


class _Tracer:
    """What has DLPack, and raises what it likes."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AttributeError("a tracer")

    __dlpack_device__ = __dlpack__


def tensor_of(entry: float) -> Array:
    """Tensors of which one is not symmetric."""
    found = np.zeros((N, 3, 3))
    found[2, 0, 1] = entry
    return found


def state_of(points: Points, change: Callable[[torch.Tensor], torch.Tensor]) -> PointsState:
    """The state with other values."""
    return PointsState({n: change(x) for n, x in points.state().values.items()}, points.model.digest, N)


def committed(points: Points, strain: Array, keep: Any = None) -> None:
    """A step with a commit."""
    points.update(strain=strain, t=2.0)
    points.commit(keep)


ZERO, SAME = np.zeros((N, 6)), np.zeros((N, 6))
DTYPE = "has dtype float32, expected float64"
SHARED = r"out\[stress\] has entries that share memory"

# Values of the strain: what the points are made with, the value, the error and its words.
STRAINS: list[tuple[dict[str, Any], Callable[[], Any], type[Exception], str]] = [
    ({}, lambda: np.zeros((5, 6)), InputError, r"expected \(4, 6\), or \(6,\) for all points .* there are 4 points"),
    ({"notation": "tensor"}, lambda: ZERO, InputError, r"expected \(4, 3, 3\).*convert\(strain, 'mandel', 'tensor'\)"),
    ({"notation": "voigt"}, lambda: np.zeros((N, 3, 3)), InputError, r"convert\(strain, 'tensor', 'voigt strain'\)"),
    ({"dimension": "plane strain"}, lambda: ZERO, InputError, r"expected \(4, 3\).*xx, yy, xy in .*dimension="),
    ({"dimension": "axisymmetric"}, lambda: ZERO, InputError, r"expected \(4, 4\).*rr, zz, tt, rz in .*dimension="),
    (
        {"dimension": "axisymmetric", "notation": "tensor"},
        lambda: np.full((N, 3, 3), 1e-3),
        InputError,
        "'strain': an axisymmetric tensor has no shears rt and zt.*whole=",
    ),
    (
        {"notation": "tensor"},
        lambda: tensor_of(2e-3),
        InputError,
        r"'strain': a 3 x 3 tensor at \[2\] is not sym",
    ),
    ({}, lambda: ZERO.astype(np.float32), InputTypeError, f"'strain' {DTYPE}"),
    ({}, lambda: torch.zeros(N, 6), InputTypeError, f"'strain' {DTYPE}"),
    ({}, lambda: ZERO.astype(int), InputTypeError, "dtype int64"),
    ({}, lambda: ZERO.astype(">f8"), InputTypeError, "dtype >f8"),
    ({}, lambda: [[0.0] * 6] * N, InputTypeError, r"a list.*numpy.asarray\(strain"),
    ({}, lambda: None, InputTypeError, "'strain' is a NoneType"),
    ({}, lambda: torch.zeros(N, 6, device="meta").double(), InputTypeError, "on device meta, expected cpu"),
    ({}, lambda: 0.0, InputError, r"'strain' has shape \(\)"),
    ({}, lambda: np.ma.masked_array(ZERO, ZERO == 0), InputTypeError, r"is a masked array.*strain.filled\("),
    ({}, _Tracer, InputTypeError, r"is a _Tracer, which DLPack does not hand over \(AttributeError: a tracer\)"),
]

# Values of the time.
TIMES: list[tuple[Any, type[Exception], str]] = [
    (np.zeros(3), InputError, r"'t' has shape \(3,\), expected \(4,\), or \(\) for all points alike"),
    (np.zeros((N, 1)), InputError, r"'t' has shape \(4, 1\)"),
    (np.ma.masked, InputTypeError, "'t' is a masked array"),
    (10**400, InputError, "'t' is a whole number larger"),
    (True, InputTypeError, "'t' is a bool"),
]

# Arrays for the stress.
OUTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: np.zeros((3, 6)), InputError, r"out\[stress\] has shape \(3, 6\), expected \(4, 6\)"),
    (lambda: read_only(ZERO), InputError, r"out\[stress\] is a ndarray that is read-only"),
    (lambda: Exported(read_only(ZERO)), InputError, r"out\[stress\] is a Exported that is read-only"),
    (lambda: _as_strided((0, 8)), InputError, SHARED),
    (lambda: _as_strided((16, 8)), InputError, SHARED),
    (lambda: torch.zeros(6, dtype=torch.float64).expand(N, 6), InputError, SHARED),
    (lambda: torch.zeros(N, 6).double().requires_grad_(), InputError, "requires grad and must not be written to"),
    (lambda: _at_inference(), InputError, r"out\[stress\] was made under torch.inference_mode"),
    (lambda: torch.zeros(N, 6, dtype=torch.complex128).conj().imag, InputError, "memory does not hold its values"),
    (lambda: torch.from_numpy(ZERO).to_sparse(), InputTypeError, r"'out\[stress\]' has the layout torch.sparse_coo"),
    (lambda: np.ma.masked_array(ZERO.copy(), ZERO == 0), InputTypeError, r"'out\[stress\]' is a masked array"),
    (lambda: ZERO.astype(np.float32), InputTypeError, r"'out\[stress\]' has dtype float32"),
    (lambda: [0.0], InputTypeError, r"out\[stress\] is a list"),
]


def in_part(points: Points, part: Any, keep: Any) -> None:
    points.update(strain=ZERO[:2], t=2.0, points=part)
    points.commit(keep)


# Any other calls.
CALLS: list[tuple[Callable[[Points], Any], type[Exception], str]] = [
    (lambda p: p.update(strain=ZERO), UnknownNameError, "missing 't'.*driven inputs are: strain, t"),
    (lambda p: p.update(strain=ZERO, t=2.0, temperature=300.0), UnknownNameError, "unknown 'temperature'"),
    (lambda p: p.update({"stress~1": ZERO}, strain=ZERO, t=2.0), UnknownNameError, "'stress~1' is kept by the points"),
    (lambda p: p.update(cast(Any, ZERO), t=2.0), InputTypeError, "values are a ndarray, expected a dict by name"),
    (lambda p: p.update(strain=ZERO, t=2.0, out={"sress": ZERO}), UnknownNameError, r"out holds 'sress'.*'stress', "),
    (
        lambda p: p.update(strain=ZERO, t=2.0, tangent=False, out={("stress", "strain"): np.zeros((N, 6, 6))}),
        UnknownNameError,
        "no result of this update",
    ),
    (
        lambda p: p.update(strain=ZERO, t=2.0, out={"stress": SAME, "equivalent_plastic_strain": SAME[:, 5]}),
        InputError,
        r"out\[stress\] and out\[equivalent_plastic_strain\] share memory",
    ),
    (lambda p: p.update(strain=ZERO, t=2.0, out=cast(Any, ZERO)), InputTypeError, "out is a ndarray, expected a dict"),
    (_dual, InputError, "'strain' carries a forward-mode tangent"),
    (
        lambda p: torch.func.vmap(lambda x: p.update(strain=x, t=2.0).outputs["stress"])(torch.zeros(1, N, 6).double()),
        InputTypeError,
        "'strain' is a value inside torch.vmap",
    ),
    (lambda p: p.commit(), AOTIError, "no update since the last commit"),
    (lambda p: committed(p, np.full((N, 6), np.nan)), AOTIError, "4 of 4 points failed"),
    (
        lambda p: committed(p, ZERO, np.ma.masked_array(np.ones(N, bool), [True, False, False, False])),
        InputTypeError,
        "'keep' is a masked array",
    ),
    (lambda p: committed(p, ZERO, [[0], [1, 2]]), InputError, "keep is no array"),
    (lambda p: committed(p, ZERO, slice("a", "b")), InputError, "keep is no array of points .*indices or a slice"),
    (
        lambda p: p.update(strain=ZERO, t=2.0, points=[0, 1]),
        InputError,
        r"'strain' has shape \(4, 6\), expected \(2, 6\)",
    ),
    (lambda p: p.update(strain=ZERO[:2], t=2.0, points=[1, 1]), InputError, "points holds a point twice"),
    (lambda p: p.update(strain=ZERO[:2], t=2.0, points=[0, 4]), InputError, "points has indices from 0 to 4"),
    (lambda p: p.update(strain=ZERO[:2], t=2.0, points=[0.0, 1.0]), InputError, "points has shape .* dtype float64"),
    (
        lambda p: in_part(p, slice(2), None),
        AOTIError,
        r"2 of 4 points were not updated since the last commit and can't be committed: 2, 3. Call update\(..., points",
    ),
    (
        lambda p: in_part(p, [3, 1], [1, 2]),
        AOTIError,
        "1 of 4 points were not updated .*: 2",
    ),
    (lambda p: committed(p, ZERO, np.ones(3, bool)), InputError, r"keep has shape \(3,\) and dtype bool, expected"),
    (lambda p: committed(p, ZERO, [0, 4]), InputError, "keep has indices from 0 to 4, expected 0 to 3"),
    (lambda p: committed(p, ZERO, np.ones(N)), InputError, "dtype float64"),
    (lambda p: p.initial(back_stress=0.0), UnknownNameError, "unknown 'back_stress'.*kept are: strain, t,"),
    (lambda p: p.initial(stress=np.zeros((N, 3))), InputError, r"'stress' has shape \(4, 3\), expected \(4, 6\)"),
    (lambda p: p.initial(stress=ZERO * np.nan), InputError, "not finite"),
    (lambda p: p.initial(stress=torch.zeros(6).double().requires_grad_()), InputError, "'stress' requires grad, and"),
    (lambda p: p.committed("stress", 2), UnknownNameError, "unknown 'stress~2'"),
    (lambda p: (p.update(strain=ZERO, t=2.0), p.trial("sigma")), UnknownNameError, "unknown 'sigma'"),
    (lambda p: p.restore(cast(Any, {})), InputTypeError, "state is a dict"),
    (lambda p: p.restore(Points(p.model, 3).state()), InputError, "one of 3 points, expected 4"),
    (
        lambda p: p.restore(Points(references.case("calibration").model, N).state()),
        InputError,
        "one of another artifact.*other_artifact=True",
    ),
    (
        lambda p: p.restore(Points(references.case("substepping").model, N).state(), other_artifact=True),
        UnknownNameError,
        "missing 'stress~1'; unknown 'plastic_strain~1'",
    ),
    (lambda p: p.restore(state_of(p, lambda _: torch.zeros(N).double())), InputError, "'strain~1' has shape"),
    (
        lambda p: p.restore(PointsState.from_dict({"t~1": np.zeros(N)}, p.model.digest, N)),
        UnknownNameError,
        "the state: missing 'strain~1'",
    ),
    (lambda p: p.restore(state_of(p, lambda x: x * np.nan)), InputError, "holds other than finite numbers"),
    (lambda p: p.restore(state_of(p, lambda x: x > 0)), InputError, r"other than finite numbers \(torch.bool\)"),
    (
        lambda p: PointsState({"t~1": torch.tensor([torch.inf])}, p.model.digest, 1).save("state.npz"),
        InputError,
        "'t~1' holds other than finite numbers",
    ),
]


def refused(points: Points, call: Callable[[Points], Any], error: type[Exception], words: str) -> None:
    """A call that is refused, and leaves the state as it was."""
    before = points.state()
    with pytest.raises(error, match=words) as raised:
        call(points)
    assert type(raised.value) is error
    after = points.state()
    assert all(torch.equal(after.values[key], value) for key, value in before.values.items())


@pytest.mark.parametrize(("options", "strain", "error", "words"), STRAINS)
def test_a_strain_is_refused(
    options: dict[str, Any], strain: Callable[[], Any], error: type[Exception], words: str
) -> None:
    refused(begun(**options), lambda p: p.update(strain=strain(), t=2.0), error, words)


@pytest.mark.parametrize(("time", "error", "words"), TIMES)
def test_a_time_is_refused(time: Any, error: type[Exception], words: str) -> None:
    refused(begun(), lambda p: p.update(strain=ZERO, t=time), error, words)


@pytest.mark.parametrize(("out", "error", "words"), OUTS)
def test_an_array_for_a_result_is_refused(out: Callable[[], Any], error: type[Exception], words: str) -> None:
    refused(begun(), lambda p: p.update(strain=ZERO, t=2.0, out={"stress": out()}), error, words)


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_a_call_is_refused(call: Callable[[Points], Any], error: type[Exception], words: str) -> None:
    refused(begun(), call, error, words)


def test_an_error_leaves_the_last_update() -> None:
    points = begun()
    points.update(strain=2 * strains(), t=2.0)
    with pytest.raises(InputError):
        points.update(strain=np.zeros((5, 6)), t=2.0)
    points.commit()
    assert np.array_equal(points.committed("strain"), 2 * strains())


def test_an_interrupt_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    points = begun()
    before = points.state()

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(points.model, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        points.update(strain=strains(), t=2.0)
    assert torch.equal(points.state().values["stress~1"], before.values["stress~1"])


def test_update_needs_a_state() -> None:
    points = Points(references.case("viscoplasticity").model, N)
    with pytest.raises(AOTIError, match=r"no state yet, and the model needs strain~1.*Call initial\(\)"):
        points.update(strain=strains(), t=1.0)


class TestConstruction:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"n": -1}, InputError, "n is -1, expected a whole number"),
            ({"n": 2.0}, InputTypeError, "n is 2.0, expected a whole number"),
            ({"n": True}, InputTypeError, "n is True"),
            ({"notation": "Voigt"}, InputError, "notation is 'Voigt', expected one of mandel, voigt, tensor"),
            ({"dimension": 2}, InputError, "dimension is 2, expected one of 3, 'plane strain', 'plane stress', 'axi"),
            ({"pairs": [("stress", "t")]}, DerivativeNotCompiledError, r"d\(stress\)/d\(t\) was not.*-d stress:t"),
            ({"pairs": [("stress", "strain~1")]}, DerivativeNotCompiledError, "'strain~1' is kept.* by a driven input"),
            ({"pairs": [("stress", "strian")]}, UnknownNameError, "unknown 'strian'. Did you mean 'strain'"),
            ({"pairs": ("stress", "strain")}, InputTypeError, "pairs hold 'stress', expected pairs of names"),
            ({"model": 3}, InputTypeError, "model is a int, expected a Model or the path"),
            ({"model": "/nowhere/at/all"}, ArtifactNotFoundError, "nowhere"),
        ],
    )
    def test_is_refused(self, options: dict[str, Any], error: type[Exception], words: str) -> None:
        given = {"model": references.case("viscoplasticity").model, "n": N, **options}
        with pytest.raises(error, match=words):
            Points(given.pop("model"), given.pop("n"), **given)

    def test_a_derivative_by_a_parameter_that_was_not_compiled(self, tmp_path: Path) -> None:
        model = references.altered("promoted", tmp_path, parameter_derivatives=[["stress", "promoted.E"]])
        pairs = [("stress", "promoted.E")]
        assert Points(model, N, pairs=pairs, dimension="plane stress").pairs == tuple(pairs)
        with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(promoted.nu\) was not.*-d stress:"):
            Points(model, N, pairs=[("stress", "promoted.nu")])
        with pytest.raises(DerivativeNotCompiledError, match=r"d\(stress\)/d\(promoted.nu\) was not.*-d stress:"):
            Points(model, N).update(strain=strains()).tangent["stress"]["promoted.nu"]
        with pytest.raises(InputError, match=r"Points\(..., pairs=\[\('stress', 'promoted.E'\)\]\)"):
            Points(model, N).update(strain=strains()).tangent["stress"]["promoted.E"]


class TestParameters:
    @pytest.mark.parametrize(
        ("values", "error", "words"),
        [
            ({"promoted.G": 1.0}, UnknownNameError, "param_overrides: unknown 'promoted.G'.*promoted parameters are:"),
            ([1.0], InputTypeError, "param_overrides are a list, expected a dict"),
            (
                {"promoted.E": np.ones(5)},
                InputError,
                r"'promoted.E' has shape \(5,\), expected \(4,\), a value for each",
            ),
            ({"promoted.E": np.ones((4, 6))}, InputError, r"'promoted.E' has shape \(4, 6\)"),
            ({"promoted.E": np.ones(4, np.float32)}, InputTypeError, "'promoted.E' has dtype float32"),
            ({"promoted.E": "1"}, InputTypeError, "'promoted.E' is a str"),
        ],
    )
    def test_overrides_that_are_refused(self, values: Any, error: type[Exception], words: str) -> None:
        points = Points(references.case("promoted").model, N)
        refused(points, lambda p: p.update(strain=strains(), param_overrides=values), error, words)

    def test_values_of_another_number_of_points_in_the_model(self) -> None:
        model = references.case("promoted").load()
        model.set_parameter("promoted.E", torch.full((5,), 1e5).double())
        for n in (1, N):
            with pytest.raises(InputError, match=rf"'promoted.E' has shape \(5,\), expected \({n},\)"):
                Points(model, n).update(strain=strains()[:n])


class TestTangentThatIsNotThere:
    def test_without_derivatives_the_tangent_gives_the_command(self, tmp_path: Path) -> None:
        model = references.altered("viscoplasticity", tmp_path, derivatives=[])
        points = Points(model, N)
        points.initial()
        found = points.update(strain=strains(), t=1.0)
        with pytest.raises(DerivativeNotCompiledError) as expected:
            model.jacobian({name: torch.zeros(v.base_shape).double() for name, v in model.inputs.items()})
        with pytest.raises(DerivativeNotCompiledError) as raised:
            found.tangent["stress"]
        assert str(raised.value) == str(expected.value) and "neml2-compile INPUT.i" in str(raised.value)
        assert found.tangent == {} and found.tangent.get("stress") is None and "stress" not in found.tangent

    @pytest.mark.parametrize(
        ("options", "update", "out", "by", "error", "words"),
        [
            ({}, {}, "stress", "t", DerivativeNotCompiledError, r"d\(stress\)/d\(t\) was not.*-d stress:t"),
            ({}, {}, "equivalent_plastic_strain", None, DerivativeNotCompiledError, "-d equivalent_plastic_strain:"),
            ({}, {}, "stress", "strain~1", DerivativeNotCompiledError, "'strain~1' is kept by the points"),
            ({}, {}, "sress", None, UnknownNameError, "unknown 'sress'"),
            ({}, {}, "stress", "strian", UnknownNameError, "unknown 'strian'. Did you mean 'strain'"),
            ({"pairs": []}, {}, "stress", None, InputError, r"Points\(..., pairs=\[\('stress', 'strain'\)\]\)"),
            ({}, {"tangent": False}, "stress", None, InputError, r"Call update\(..., tangent=True\)"),
        ],
    )
    def test_is_told_why(
        self, options: Any, update: Any, out: str, by: str | None, error: type[Exception], words: str
    ) -> None:
        tangent = begun(**options).update(strain=strains(), t=2.0, **update).tangent
        with pytest.raises(error, match=words):
            tangent[out][by] if by is not None else tangent[out]

    def test_results_can_be_copied_and_pickled(self) -> None:
        found = begun().update(strain=strains(), t=2.0)
        for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert np.array_equal(again.tangent["stress"]["strain"], found.tangent["stress"]["strain"])
