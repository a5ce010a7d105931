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
from neml2_aoti_plugin import AOTIError, InputError, InputTypeError, Points
from neml2_aoti_plugin.points import PointsResult, PointsState
from point_cases import Array, Exported, N, begun, read_only, require_state, stepped, strains, unchanged

STRAIN = 2 * strains()


def result() -> PointsResult:
    """What arrays of NumPy give that are as plain as can be."""
    return stepped().update(strain=STRAIN.copy(), t=np.full(N, 2.0))


class TestArrays:
    @pytest.mark.parametrize(
        "kind",
        [
            np.asfortranarray,
            lambda x: np.repeat(x, 2, 0)[::2],
            lambda x: x[::-1].copy()[::-1],
            read_only,
            lambda x: Exported(torch.from_numpy(x)),
        ],
        ids=["column-major", "strided", "negative strides", "read-only", "DLPack"],
    )
    def test_of_numpy_in_and_out(self, kind: Callable[[Array], Any]) -> None:
        found = stepped().update(strain=kind(STRAIN), t=2.0)
        assert isinstance(found.outputs["stress"], np.ndarray) and found.outputs["stress"].dtype == np.float64
        assert isinstance(found.converged, np.ndarray) and found.converged.dtype == np.bool_
        assert np.array_equal(found.outputs["stress"], result().outputs["stress"])

    def test_of_torch_in_and_out(self) -> None:
        with torch.no_grad():
            found = stepped().update(strain=torch.from_numpy(STRAIN).requires_grad_(), t=2)
        for value in (found.outputs["stress"], found.tangent["stress"]["strain"], found.converged, found.outcome):
            assert isinstance(value, torch.Tensor) and not value.requires_grad
        assert np.array_equal(found.outputs["stress"].numpy(), result().outputs["stress"])

    def test_reach_the_model_without_a_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points, seen, given = stepped(), list[int](), STRAIN.copy()
        solve = points.model.solve

        def noted(inputs: Any, *rest: Any, **options: Any) -> Any:
            seen.append(inputs["strain"].data_ptr())
            return solve(inputs, *rest, **options)

        monkeypatch.setattr(points.model, "solve", noted)
        for strain in (given, torch.from_numpy(given)):
            points.update(strain=strain, t=2.0)
        assert seen == [given.ctypes.data] * 2

    def test_one_value_for_all_points_and_numbers(self) -> None:
        found, expected = (
            stepped().update(strain=strain, t=time)
            for strain, time in ((STRAIN[0], np.float64(2.0)), (np.tile(STRAIN[0], (N, 1)), np.full(N, 2.0)))
        )
        assert np.array_equal(found.outputs["stress"], expected.outputs["stress"])

    def test_callers_may_use_their_arrays_again(self) -> None:
        points, other, strain, time = stepped(), stepped(), STRAIN.copy(), np.full(N, 2.0)
        out: dict[Any, Array] = {"stress": np.empty((N, 6)), ("stress", "strain"): np.empty((N, 6, 6))}
        found = points.update(strain=strain, t=time, out=out)
        for value in (strain, time, *out.values(), *found.outputs.values(), found.converged, found.iterations):
            value.fill(0)
        points.commit()
        other.update(strain=STRAIN, t=2.0)
        other.commit()
        require_state(points, other.state())

    def test_what_is_shown_is_a_copy(self) -> None:
        points = stepped()
        with unchanged(points):
            points.update(strain=strains(), t=2.0)
            for value in (points.committed("stress"), points.committed("t"), points.trial("stress")):
                value.fill(7.0)
            for tensor in points.state().values.values():
                tensor.fill_(7.0)

    def test_results_may_be_written_over_what_was_given(self) -> None:
        points, mine = stepped(), STRAIN.copy()
        points.update(strain=mine, t=2.0, out={"stress": mine})
        assert np.array_equal(mine, result().outputs["stress"])
        points.commit()
        assert np.array_equal(points.committed("strain"), STRAIN)

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: Exported(torch.from_numpy(x))])
    def test_results_in_parts_of_one_array(self, kind: Callable[[Array], Any]) -> None:
        whole = np.full((2 * N, 44), 7.0)
        rows = whole[::2]
        parts: dict[str, Any] = {"stress": np.s_[:, 37:43], "equivalent_plastic_strain": np.s_[:, 36]}
        out: dict[Any, Any] = {name: kind(rows[part]) for name, part in parts.items()}
        tangent = np.full((2 * N, 6, 6), 7.0)
        found = stepped().update(strain=STRAIN, t=2.0, out={**out, ("stress", "strain"): kind(tangent[::2])})
        expected = result()
        for name, part in parts.items():
            assert np.array_equal(rows[part], expected.outputs[name])
            assert np.array_equal(found.outputs[name], expected.outputs[name])
        assert np.array_equal(tangent[::2], expected.tangent["stress"]["strain"])
        assert (tangent[1::2] == 7.0).all() and (whole[1::2] == 7.0).all() and (rows[:, 43] == 7.0).all()

    def test_initial_values(self) -> None:
        points = Points(references.case("viscoplasticity").artifact, N, notation="voigt")
        strain, stress = np.array([1e-3, 0, 0, 0, 0, 2e-3]), np.arange(1.0, 7.0)
        points.initial({"stress~1": np.tile(stress, (N, 1))}, strain=strain, equivalent_plastic_strain=0.01)
        for name, value in (("stress", stress), ("strain", strain), ("equivalent_plastic_strain", 0.01), ("t", 0.0)):
            assert np.allclose(points.committed(name), np.broadcast_to(value, (N, *np.shape(value))), rtol=1e-15)
        assert np.allclose(points.state().values["strain~1"][0, 5], np.sqrt(2.0) * 1e-3)


class TestFiles:
    @pytest.mark.parametrize("name", ["state.npz", "state.safetensors", "state"])
    def test_go_there_and_back(self, name: str, tmp_path: Path) -> None:
        points, file = stepped(), tmp_path / name
        points.update(strain=STRAIN, t=2.0)
        points.save(file)
        for notation in ("voigt", "mandel"):
            other = Points(points.model, N, notation=notation)
            other.load(str(file))
            require_state(other, points.state())
        assert np.allclose(other.update(strain=STRAIN, t=2.0).outputs["stress"], result().outputs["stress"])
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
        points = stepped()
        before = points.state()
        arrays = before.to_dict()
        scalars, vectors = ["t~1", "equivalent_plastic_strain~1"], ["strain~1", "stress~1"]
        shapes = {**dict.fromkeys(scalars, (N,)), **dict.fromkeys(vectors, (N, 6))}
        assert {name: value.shape for name, value in arrays.items()} == shapes
        assert all(len(before.axes[name]) == value.ndim for name, value in arrays.items())
        for values in (arrays, before.values):
            state = PointsState.from_dict(values, points.model.digest, N)
            for value in arrays.values():
                value.fill(7.0)
            points.restore(state)
            require_state(points, before)
        with pytest.raises(InputTypeError, match="the state's 't~1' is no array of numbers"):
            PointsState.from_dict({"t~1": [None]}, points.model.digest, N)

    def test_a_sub_batch_has_a_name(self) -> None:
        points = begun("cross_group", 2)
        assert points.state().axes["branch_strain~1"] == ("point", "site", "component")
        assert points.committed("branch_strain").shape == (2, 3, 6)

    def test_of_another_artifact_with_the_same_variables(self, tmp_path: Path) -> None:
        file, other = tmp_path / "state.npz", Points(references.case("calibration").model, N)
        stepped().save(file)
        with pytest.raises(InputError, match="another artifact"):
            other.load(file)
        with pytest.raises(AOTIError, match=r"no state yet, and the model needs strain~1.*Call initial\(\)"):
            other.update(strain=strains(), t=2.0)
        other.load(file, other_artifact=True)
        assert np.allclose(other.update(strain=STRAIN, t=2.0).outputs["stress"], result().outputs["stress"], rtol=1e-8)

    def test_damaged_and_other_files(self, tmp_path: Path) -> None:
        points, file = stepped(), tmp_path / "state.npz"
        points.save(file)
        (tmp_path / "pickle").write_bytes(pickle.dumps({"format": "neml2-aoti-plugin points 1"}))
        (tmp_path / "cut off").write_bytes(file.read_bytes()[:1000])
        np.savez(tmp_path / "other.npz", a=np.zeros(3))
        np.savez(tmp_path / "newer.npz", format="neml2-aoti-plugin points 2", digest="", n=4)
        np.savez(tmp_path / "objects.npz", format=np.array([{}], dtype=object))
        np.save(tmp_path / "single.npy", np.zeros(3))
        file.unlink()
        said = {path.name: r"is not a state of points \(Points.save\)" for path in tmp_path.iterdir()}
        for name, why in (("absent.npz", "No such file or directory"), (".", "not a file but a folder")):
            said[name] = rf"cannot be read \({why}\). Give a state of points \(Points.save\)"
        with unchanged(points):
            for name, words in said.items():
                with pytest.raises(InputError, match=words):
                    points.load(tmp_path / name)

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        points, file = stepped(), tmp_path / "state.npz"
        points.save(file)
        before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(InputError, match=r"cannot be written \(File too large\)"):
                points.save(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == before and os.listdir(tmp_path) == ["state.npz"]
