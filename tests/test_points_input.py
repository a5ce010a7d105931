"""What `Points` takes and gives: arrays of every kind, and states as files and values."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import references
from neml2_aoti_plugin import (
    AOTIError,
    InputError,
    InputTypeError,
    Points,
)
from neml2_aoti_plugin.points import PointsState
from viscoplastic_points import Array, Exported, N, begun, read_only, strains


class TestArrays:
    @pytest.mark.parametrize(
        "kind",
        [
            lambda x: x,
            np.asfortranarray,
            lambda x: np.repeat(x, 2, 0)[::2],
            lambda x: x[::-1].copy()[::-1],
            lambda x: read_only(x),
            lambda x: Exported(torch.from_numpy(x)),
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
        with torch.no_grad():
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
        other.update(strain=2 * strains(), t=2.0)
        for value in (strain, time, *out.values(), *found.outputs.values(), found.converged, found.iterations):
            value.fill(0)
        points.commit()
        other.commit()
        for name, value in other.state().values.items():
            assert torch.equal(points.state().values[name], value)
        assert np.array_equal(points.committed("strain"), 2 * strains())

    def test_results_may_be_written_over_what_was_given(self) -> None:
        points, mine = begun(), 2 * strains()
        points.update(strain=mine, t=2.0, out={"stress": mine})
        assert np.array_equal(mine, begun().update(strain=2 * strains(), t=2.0).outputs["stress"])
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

    def test_results_in_parts_of_one_array(self) -> None:
        points, whole = begun(), np.full((N, 44), 7.0)
        out: dict[Any, Any] = {"stress": whole[:, 37:43], ("stress", "strain"): whole[:, :36].reshape(N, 6, 6)}
        out["equivalent_plastic_strain"] = torch.from_numpy(whole)[:, 36]
        found = points.update(strain=2 * strains(), t=2.0, out=out)
        expected = begun().update(strain=2 * strains(), t=2.0)
        assert np.array_equal(whole[:, 37:43], expected.outputs["stress"])
        assert np.array_equal(whole[:, 36], expected.outputs["equivalent_plastic_strain"])
        assert np.array_equal(found.tangent["stress"]["strain"], expected.tangent["stress"]["strain"])
        assert (whole[:, 43] == 7.0).all()

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: Exported(torch.from_numpy(x))])
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


class TestFiles:
    @pytest.mark.parametrize("name", ["state.npz", "state.safetensors", "state"])
    def test_go_there_and_back(self, name: str, tmp_path: Path) -> None:
        points, file = begun(), tmp_path / name
        points.update(strain=2 * strains(), t=2.0)
        points.save(file)
        expected = points.update(strain=2 * strains(), t=2.0)
        for other in (
            Points(references.case("viscoplasticity").artifact, N, notation="voigt"),
            Points(points.model, N),
        ):
            other.load(str(file))
            for key, value in points.state().values.items():
                assert torch.equal(other.state().values[key], value)
        assert np.allclose(other.update(strain=2 * strains(), t=2.0).outputs["stress"], expected.outputs["stress"])
        assert sorted(os.listdir(tmp_path)) == [name]
        if name == "state.safetensors":
            with safe_open(file, "np") as opened:
                found = {**opened.metadata(), **{key: opened.get_tensor(key) for key in opened.keys()}}  # noqa: SIM118
        else:
            with np.load(file, allow_pickle=False) as archive:
                found = dict(archive)
        assert str(found["digest"]) == points.model.digest and int(found["n"]) == N
        assert str(found["axes/stress~1"]) == "point component" and str(found["axes/t~1"]) == "point"
        assert np.array_equal(found["value/stress~1"], points.state().values["stress~1"])

    def test_as_a_dict_of_arrays_and_back(self) -> None:
        points = begun()
        before = points.state()
        arrays = before.to_dict()
        assert {name: value.shape for name, value in arrays.items()} == {
            "strain~1": (N, 6),
            "t~1": (N,),
            "equivalent_plastic_strain~1": (N,),
            "stress~1": (N, 6),
        }
        assert all(len(before.axes[name]) == value.ndim for name, value in arrays.items())
        state = PointsState.from_dict(arrays, points.model.digest, N)
        for value in arrays.values():
            value.fill(7.0)
        points.restore(state)
        assert all(torch.equal(points.state().values[name], value) for name, value in before.values.items())
        tensors = PointsState.from_dict(before.values, points.model.digest, N)
        assert torch.equal(tensors.values["t~1"], before.values["t~1"])
        with pytest.raises(InputTypeError, match="the state's 't~1' is no array of numbers"):
            PointsState.from_dict({"t~1": [None]}, points.model.digest, N)

    def test_names_of_axes_with_a_sub_batch(self) -> None:
        points = Points(references.case("cross_group").model, 2)
        assert points.state().axes["branch_strain~1"] == ("point", "site", "component")

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
        (tmp_path / "pickle").write_bytes(pickle.dumps({"format": "neml2-aoti-plugin points 1"}))
        (tmp_path / "cut off").write_bytes(file.read_bytes()[:1000])
        np.savez(tmp_path / "other.npz", a=np.zeros(3))
        np.savez(tmp_path / "newer.npz", format="neml2-aoti-plugin points 2", digest="", n=4)
        np.savez(tmp_path / "objects.npz", format=np.array([{}], dtype=object))
        np.save(tmp_path / "single.npy", np.zeros(3))
        for bad in tmp_path.iterdir():
            if bad != file:
                with pytest.raises(InputError, match=r"is not a state of points \(Points.save\)"):
                    points.load(bad)
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
