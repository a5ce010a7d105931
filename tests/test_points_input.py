"""What `Points` takes and gives: arrays of every kind, files, and clear errors that leave the state as it was."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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

Array = NDArray[np.float64]
N = 4


def strains(size: float = 5e-3) -> Array:
    found: Array = size * np.random.default_rng(2).normal(size=(N, 6))
    return found


def begun(**options: Any) -> Points:
    """Points with a state that is not zero."""
    points = Points(references.case("viscoplasticity").model, N, **options)
    points.initial()
    given = strains()
    if options.get("notation") == "tensor":
        given = np.zeros((N, 3, 3))
        given[:, 0, 0] = 5e-3
    if options.get("dimension", 3) != 3:
        given = given[:, :3]
    points.update(strain=given, t=1.0)
    points.commit()
    return points


class TestArrays:
    @pytest.mark.parametrize(
        "kind",
        [
            lambda x: x,
            np.asfortranarray,
            lambda x: np.repeat(x, 2, 0)[::2],
            lambda x: x[::-1].copy()[::-1],
            lambda x: _read_only(x),
            lambda x: _Exported(torch.from_numpy(x)),
        ],
        ids=["plain", "column-major", "strided", "negative strides", "read-only", "DLPack"],
    )
    def test_of_numpy_in_and_out(self, kind: Callable[[Array], Any]) -> None:
        one, other = begun(), begun()
        expected = one.update(strain=2 * strains(), t=np.full(N, 2.0))
        found = other.update(strain=kind(2 * strains()), t=2.0)
        assert isinstance(found.outputs["stress"], np.ndarray) and found.outputs["stress"].dtype == np.float64
        assert isinstance(found.converged, np.ndarray) and found.converged.dtype == np.bool_
        assert np.array_equal(found.outputs["stress"], expected.outputs["stress"])

    def test_of_torch_in_and_out(self) -> None:
        one, other = begun(), begun()
        expected = one.update(strain=2 * strains(), t=2.0)
        strain = torch.from_numpy(2 * strains()).requires_grad_()
        found = other.update(strain=strain, t=2)
        for value in (found.outputs["stress"], found.tangent["stress"]["strain"], found.converged, found.outcome):
            assert isinstance(value, torch.Tensor) and not value.requires_grad
        assert np.array_equal(found.outputs["stress"].numpy(), expected.outputs["stress"])

    def test_reach_the_model_without_a_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = begun()
        seen: list[int] = []
        solve = points.model.solve

        def noted(inputs: Any, *rest: Any, **options: Any) -> Any:
            seen.append(inputs["strain"].data_ptr())
            return solve(inputs, *rest, **options)

        monkeypatch.setattr(points.model, "solve", noted)
        strain, tensor = strains(), torch.from_numpy(strains())
        points.update(strain=strain, t=2.0)
        points.update(strain=tensor, t=2.0)
        assert seen == [strain.ctypes.data, tensor.data_ptr()]

    def test_one_value_for_all_points_and_numbers(self) -> None:
        points = begun()
        found = points.update(strain=strains()[0], t=np.float64(2.0))
        points.revert()
        expected = points.update(strain=np.tile(strains()[0], (N, 1)), t=np.full(N, 2.0))
        assert np.array_equal(found.outputs["stress"], expected.outputs["stress"])

    def test_callers_may_use_their_arrays_again(self) -> None:
        points, other = begun(), begun()
        strain, time = 2 * strains(), np.full(N, 2.0)
        out: dict[Any, Array] = {"stress": np.empty((N, 6)), ("stress", "strain"): np.empty((N, 6, 6))}
        found = points.update(strain=strain, t=time, out=out)
        expected = other.update(strain=2 * strains(), t=2.0)
        for value in (strain, time, *out.values(), *found.outputs.values(), found.converged, found.iterations):
            value.fill(0)
        points.commit()
        other.commit()
        for name, value in other.state().values.items():
            assert torch.equal(points.state().values[name], value)
        assert np.array_equal(points.committed("strain"), 2 * strains())
        del expected

    def test_results_may_be_written_over_what_was_given(self) -> None:
        points, other = begun(), begun()
        mine = 2 * strains()
        points.update(strain=mine, t=2.0, out={"stress": mine})
        expected = other.update(strain=2 * strains(), t=2.0)
        assert np.array_equal(mine, expected.outputs["stress"])
        points.commit()
        assert np.array_equal(points.committed("strain"), 2 * strains())

    def test_what_is_shown_is_a_copy(self) -> None:
        points = begun()
        before = points.state()
        points.update(strain=strains(), t=2.0)
        for value in (points.committed("stress"), points.committed("t"), points.trial("stress")):
            value.fill(7.0)
        for name, value in points.state().values.items():
            assert torch.equal(value, before.values[name])
        for tensor in points.state().values.values():
            tensor.fill_(7.0)
        assert torch.equal(points.state().values["stress~1"], before.values["stress~1"])

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: _Exported(torch.from_numpy(x))])
    def test_out(self, kind: Callable[[Array], Any]) -> None:
        points, stress = begun(), np.full((N, 6), 7.0)
        strided = np.full((2 * N, 6, 6), 7.0)
        found = points.update(
            strain=2 * strains(), t=2.0, out={"stress": kind(stress), ("stress", "strain"): strided[::2]}
        )
        expected = begun().update(strain=2 * strains(), t=2.0)
        assert np.array_equal(stress, expected.outputs["stress"])
        assert np.array_equal(found.outputs["stress"], stress)
        assert np.array_equal(strided[::2], expected.tangent["stress"]["strain"]) and (strided[1::2] == 7.0).all()

    def test_initial_values(self) -> None:
        points = Points(references.case("viscoplasticity").artifact, N, notation="voigt")
        strain = np.array([1e-3, 0, 0, 0, 0, 2e-3])
        points.initial(
            {"stress~1": np.tile([1.0, 2, 3, 4, 5, 6], (N, 1))}, strain=strain, equivalent_plastic_strain=0.01
        )
        assert np.allclose(points.committed("stress"), [1, 2, 3, 4, 5, 6])
        assert np.allclose(points.committed("strain"), np.tile(strain, (N, 1)))
        assert np.array_equal(points.committed("equivalent_plastic_strain"), np.full(N, 0.01))
        assert np.allclose(points.state().values["strain~1"][0, 5], np.sqrt(2.0) * 1e-3)
        assert not points.committed("t").any()


class _Exported:
    """What is neither an array of NumPy nor of torch, and has DLPack."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def __dlpack__(self, **options: Any) -> Any:
        return self._value.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()


def _read_only(value: Array) -> Array:
    value = value.copy()
    value.flags.writeable = False
    return value


def tensor_of(entry: float) -> Array:
    """Tensors of which one is not symmetric."""
    found = np.zeros((N, 3, 3))
    found[2, 0, 1] = entry
    return found


def committed(points: Points, strain: Array, keep: Any = None) -> None:
    """A step with a commit."""
    points.update(strain=strain, t=2.0)
    points.commit(keep)


ZERO = np.zeros((N, 6))
# Calls of points in the forms given, the error and its words.
WRONG: dict[str, tuple[dict[str, Any], Callable[[Points], Any], type[Exception], str]] = {
    "wrong number of points": (
        {},
        lambda p: p.update(strain=np.zeros((5, 6)), t=2.0),
        InputError,
        r"'strain' has shape \(5, 6\), expected \(4, 6\), or \(6,\) for all points alike: there are 4 points",
    ),
    "one time too few": (
        {},
        lambda p: p.update(strain=ZERO, t=np.zeros(3)),
        InputError,
        r"'t' has shape \(3,\), expected \(4,\), or \(\) for all points alike",
    ),
    "a column": ({}, lambda p: p.update(strain=ZERO, t=np.zeros((N, 1))), InputError, r"'t' has shape \(4, 1\)"),
    "Voigt where tensors were said": (
        {"notation": "tensor"},
        lambda p: p.update(strain=ZERO, t=2.0),
        InputError,
        r"'strain' has shape \(4, 6\), expected \(4, 3, 3\).*symmetric tensors in components.*notation=",
    ),
    "tensors where Voigt was said": (
        {"notation": "voigt"},
        lambda p: p.update(strain=np.zeros((N, 3, 3)), t=2.0),
        InputError,
        r"\(4, 3, 3\), expected \(4, 6\).*xx, yy, zz, yz, xz, xy in the form 'voigt strain'",
    ),
    "three dimensions in the plane": (
        {"dimension": "plane strain"},
        lambda p: p.update(strain=ZERO, t=2.0),
        InputError,
        r"\(4, 6\), expected \(4, 3\).*xx, yy, xy in the form 'mandel'.*dimension=",
    ),
    "tensor that is not symmetric": (
        {"notation": "tensor"},
        lambda p: p.update(strain=tensor_of(2e-3), t=2.0),
        InputError,
        r"'strain': a 3 x 3 tensor at \[2\] is not symmetric.*half of the engineering shear strain",
    ),
    "missing input": ({}, lambda p: p.update(strain=ZERO), UnknownNameError, r"missing \['t'\].*it takes strain, t"),
    "unknown input": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, temperature=300.0),
        UnknownNameError,
        r"unknown \['temperature'\]",
    ),
    "input that is kept": (
        {},
        lambda p: p.update({"stress~1": ZERO}, strain=ZERO, t=2.0),
        UnknownNameError,
        "'stress~1': kept by the points themselves",
    ),
    "single precision": (
        {},
        lambda p: p.update(strain=ZERO.astype(np.float32), t=2.0),
        InputTypeError,
        "'strain' has dtype float32, expected float64",
    ),
    "single precision of torch": (
        {},
        lambda p: p.update(strain=torch.zeros(N, 6), t=2.0),
        InputTypeError,
        "'strain' has dtype float32, expected float64",
    ),
    "integers": ({}, lambda p: p.update(strain=ZERO.astype(int), t=2.0), InputTypeError, "dtype int64"),
    "other byte order": ({}, lambda p: p.update(strain=ZERO.astype(">f8"), t=2.0), InputTypeError, "dtype >f8"),
    "a list": ({}, lambda p: p.update(strain=[[0.0] * 6] * N, t=2.0), InputTypeError, r"a list.*numpy.asarray\(strain"),
    "no names": (
        {},
        lambda p: p.update(ZERO, t=2.0),  # type: ignore[arg-type]
        InputTypeError,
        r"values are a ndarray, expected names: update\(strain=",
    ),
    "nothing": ({}, lambda p: p.update(strain=None, t=2.0), InputTypeError, "'strain' is a NoneType"),
    "a tensor elsewhere": (
        {},
        lambda p: p.update(strain=torch.zeros(N, 6, dtype=torch.float64, device="meta"), t=2.0),
        InputTypeError,
        "'strain' is on device meta, expected cpu",
    ),
    "a number for a tensor": ({}, lambda p: p.update(strain=0.0, t=2.0), InputError, r"'strain' has shape \(\)"),
    "unknown result": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out={"sress": ZERO.copy()}),
        UnknownNameError,
        r"out holds 'sress'.*'stress', 'equivalent_plastic_strain', \('stress', 'strain'\)",
    ),
    "tangent that is not evaluated": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, tangent=False, out={("stress", "strain"): np.zeros((N, 6, 6))}),
        UnknownNameError,
        "no result of this update",
    ),
    "small array for a result": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out={"stress": np.zeros((3, 6))}),
        InputError,
        r"out\[stress\] has shape \(3, 6\), expected \(4, 6\)",
    ),
    "read-only array for a result": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out={"stress": _read_only(ZERO)}),
        InputError,
        r"out\[stress\] is read-only",
    ),
    "single precision for a result": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out={"stress": ZERO.astype(np.float32)}),
        InputTypeError,
        r"'out\[stress\]' has dtype float32",
    ),
    "list for a result": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out={"stress": [0.0]}),
        InputTypeError,
        r"out\[stress\] is a list",
    ),
    "no dict for results": (
        {},
        lambda p: p.update(strain=ZERO, t=2.0, out=ZERO),  # type: ignore[arg-type]
        InputTypeError,
        "out is a ndarray, expected a dict",
    ),
    "commit before update": ({}, lambda p: p.commit(), AOTIError, "no update since the last commit"),
    "commit after a failed update": (
        {},
        lambda p: committed(p, np.full((N, 6), np.nan)),
        AOTIError,
        "4 of 4 points failed",
    ),
    "mask of other points": (
        {},
        lambda p: committed(p, ZERO, np.ones(3, bool)),
        InputError,
        r"keep has shape \(3,\) and dtype bool, expected a mask of bool \(4,\)",
    ),
    "indices of other points": (
        {},
        lambda p: committed(p, ZERO, [0, 4]),
        InputError,
        "keep has indices from 0 to 4, expected 0 to 3",
    ),
    "numbers for points": (
        {},
        lambda p: committed(p, ZERO, np.ones(N)),
        InputError,
        "dtype float64",
    ),
    "initial value of an unknown name": (
        {},
        lambda p: p.initial(back_stress=0.0),
        UnknownNameError,
        "'back_stress' is not kept by these points; what is kept is: strain, t,",
    ),
    "initial value of another shape": (
        {},
        lambda p: p.initial(stress=np.zeros((N, 3))),
        InputError,
        r"'stress' has shape \(4, 3\), expected \(4, 6\)",
    ),
    "initial value that is not finite": ({}, lambda p: p.initial(stress=ZERO * np.nan), InputError, "not finite"),
    "value that is not kept": ({}, lambda p: p.committed("stress", 2), UnknownNameError, "'stress~2' is not kept"),
    "trial value that is not kept": (
        {},
        lambda p: (p.update(strain=ZERO, t=2.0), p.trial("sigma")),
        UnknownNameError,
        "'sigma' is not kept",
    ),
    "state of another kind": ({}, lambda p: p.restore({}), InputTypeError, "state is a dict"),  # type: ignore[arg-type]
    "state of other points": (
        {},
        lambda p: p.restore(Points(p.model, 3).state()),
        InputError,
        "one of 3 points, expected 4",
    ),
    "state of another artifact": (
        {},
        lambda p: p.restore(Points(references.case("calibration").model, N).state()),
        InputError,
        "one of another artifact.*other_artifact=True",
    ),
    "state of another model": (
        {},
        lambda p: p.restore(Points(references.case("substepping").model, N).state(), other_artifact=True),
        InputError,
        r"missing \['stress~1'\], unknown \['plastic_strain~1'\]",
    ),
    "state of another shape": (
        {},
        lambda p: p.restore(PointsState({n: torch.zeros(N, dtype=torch.float64) for n in p.kept}, p.model.digest, N)),
        InputError,
        r"state's 'strain~1' has shape \(4,\), expected \(4, 6\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told_and_leaves_the_state(name: str) -> None:
    options, call, error, words = WRONG[name]
    points = begun(**options)
    before = points.state()
    with pytest.raises(error, match=words) as raised:
        call(points)
    assert type(raised.value) is error
    after = points.state()
    assert all(torch.equal(after.values[key], value) for key, value in before.values.items())


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
            ({"n": -1}, InputTypeError, "n is -1, expected a number of points"),
            ({"n": 2.0}, InputTypeError, "n is 2.0, expected a number of points"),
            ({"n": True}, InputTypeError, "n is True"),
            ({"notation": "Voigt"}, InputError, "notation is 'Voigt', expected one of mandel, voigt, tensor"),
            ({"dimension": 2}, InputError, "dimension is 2, expected one of 3, 'plane strain', 'plane stress'"),
            ({"pairs": [("stress", "t")]}, DerivativeNotCompiledError, r"pairs= names \('stress', 't'\).*-d OUT:IN"),
            ({"pairs": [("stress", "strain~1")]}, DerivativeNotCompiledError, "by a driven input"),
            ({"model": 3}, InputTypeError, "model is a int, expected a Model or the path"),
            ({"model": "/nowhere/at/all"}, ArtifactNotFoundError, "nowhere"),
        ],
    )
    def test_is_refused(self, options: dict[str, Any], error: type[Exception], words: str) -> None:
        given = {"model": references.case("viscoplasticity").model, "n": N, **options}
        with pytest.raises(error, match=words):
            Points(given.pop("model"), given.pop("n"), **given)


class TestFiles:
    def test_go_there_and_back(self, tmp_path: Path) -> None:
        points, file = begun(), tmp_path / "state.npz"
        points.update(strain=2 * strains(), t=2.0)
        points.save(file)
        expected = points.update(strain=2 * strains(), t=2.0)
        other = Points(references.case("viscoplasticity").artifact, N, notation="voigt")
        other.load(file)
        for name, value in points.state().values.items():
            assert torch.equal(other.state().values[name], value)
        third = Points(points.model, N)
        third.load(str(file))
        assert np.allclose(third.update(strain=2 * strains(), t=2.0).outputs["stress"], expected.outputs["stress"])
        assert sorted(os.listdir(tmp_path)) == ["state.npz"]
        with np.load(file, allow_pickle=False) as found:
            assert str(found["digest"]) == points.model.digest and int(found["n"]) == N

    def test_a_state_is_no_pickle_and_restores_at_any_time(self) -> None:
        points = begun()
        before = points.state()
        points.update(strain=2 * strains(), t=2.0)
        points.commit()
        points.restore(before)
        with pytest.raises(AOTIError):
            points.commit()
        assert torch.equal(points.state().values["t~1"], before.values["t~1"])

    def test_of_another_artifact_with_the_same_variables(self, tmp_path: Path) -> None:
        points, file = begun(), tmp_path / "state.npz"
        points.save(file)
        other = Points(references.case("calibration").model, N)
        with pytest.raises(InputError, match="another artifact"):
            other.load(file)
        with pytest.raises(AOTIError, match="no state yet"):
            other.update(strain=strains(), t=2.0)
        other.load(file, other_artifact=True)
        found, expected = (p.update(strain=2 * strains(), t=2.0).outputs["stress"] for p in (other, points))
        assert np.allclose(found, expected, rtol=1e-8)

    def test_damaged_and_other_files(self, tmp_path: Path) -> None:
        points, file = begun(), tmp_path / "state.npz"
        before = points.state()
        points.save(file)
        whole = file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        assert "value/stress~1.npy" in names
        cases = {
            "cut off": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"stress",
            "pickle": pickle.dumps({"format": "neml2-aoti-plugin points 1"}),
            "flipped": whole.replace(b"NUMPY", b"NUMPX"),
        }
        for kind, data in cases.items():
            bad = tmp_path / f"{kind}.npz"
            bad.write_bytes(data)
            with pytest.raises(InputError, match=r"is not a state of points \(Points.save\)"):
                points.load(bad)
        np.savez(tmp_path / "other.npz", a=np.zeros(3))
        np.savez(tmp_path / "newer.npz", format="neml2-aoti-plugin points 2", digest="", n=4)
        np.savez(tmp_path / "objects.npz", format=np.array([{}], dtype=object))
        for name in ("other", "newer", "objects"):
            with pytest.raises(InputError, match="is not a state of points"):
                points.load(tmp_path / f"{name}.npz")
        np.save(tmp_path / "single.npy", np.zeros(3))
        with pytest.raises(InputError, match="is not a state of points"):
            points.load(tmp_path / "single.npy")
        for absent, why in (("absent.npz", "No such file or directory"), (".", "not a file but a folder")):
            with pytest.raises(InputError, match=rf"cannot be read \({why}\). Give a state of points \(Points.save\)"):
                points.load(tmp_path / absent)
        assert torch.equal(points.state().values["stress~1"], before.values["stress~1"])

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        points, file = begun(), tmp_path / "state.npz"
        points.save(file)
        before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot be written \(File too large\)"):
                points.save(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == before and os.listdir(tmp_path) == ["state.npz"]
