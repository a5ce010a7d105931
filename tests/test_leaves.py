"""Leaves of an artifact beside each other: which belong to the metadata, and what is said of those that do not."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import references
from attacks.archives import edited
from commands import answer, printed
from neml2_aoti_plugin import ArtifactError, Model, seal
from neml2_aoti_plugin._artifact.files import Folder
from neml2_aoti_plugin._artifact.kinship import of_one_source, read_generated

STRAIN = torch.tensor([1e-3, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
# Of linear elasticity with E = 205000 and nu = 0.29.
STRESS = 205000.0 / (1.29 * 0.42) * 0.71 * 1e-3
PACKAGES = ("elasticity.pt2", "elasticity_jvp.pt2")

# The same code with other constants, as a compile of another modulus gives it. The library differs then too.
longer = edited(".so", lambda data: data + b"\0")
stiffer = edited(".cpp", lambda text: text.replace(b"158914.7286", b"317829.4573"))
other_code = edited(".cpp", lambda text: b"int other;\n" + text)
# As another torch generates it, which names its headers by what is in them.
other_compiler = edited(".cpp", lambda text: text.replace(b"precompiled_headers/", b"precompiled_headers/other"))


def set_times(leaf: Path, start: float) -> float:
    """Give the packages of a leaf the times of a compile that began then; return the time of the last one."""
    for k, name in enumerate(PACKAGES):
        os.utime(leaf / name, (start + 8.0 * k, start + 8.0 * k))
    return start + 8.0 * (len(PACKAGES) - 1)


@pytest.fixture
def two_leaves(tmp_path: Path) -> Path:
    """An artifact of two leaves of one source, the float32 one compiled first."""
    artifact = references.copied("elasticity", tmp_path)
    shutil.copytree(artifact / "cpu/float64", artifact / "cpu/float32")
    set_times(artifact / "cpu/float32", 1.7e9)
    end = set_times(artifact / "cpu/float64", 1.7e9 + 60.0)
    os.utime(artifact / "metadata.json", (end + 0.004, end + 0.004))
    return artifact


def change(leaf: Path, *changes: Callable[[bytes], bytes]) -> None:
    """Change the packages of a leaf; their times stay."""
    for name in PACKAGES:
        file = leaf / name
        times = file.stat()
        for make in changes:
            file.write_bytes(make(file.read_bytes()))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def stress(artifact: Path, dtype: str) -> float:
    model = Model(artifact, dtype=dtype)
    return model.forward({"strain": STRAIN.to(model.dtype)})["stress"][0].item()


def without_times(artifact: Path) -> Path:
    """A copy as git, or a copy without times, makes it."""
    folder = artifact.parent / "copy" / artifact.name
    copy = Path(shutil.copytree(artifact, folder, copy_function=shutil.copyfile))
    for file in copy.rglob("*.*"):
        os.utime(file, (1.8e9, 1.8e9))
    return copy


def test_leaves_of_one_source_load_whichever_was_compiled_first(two_leaves: Path) -> None:
    copy = without_times(two_leaves)
    for artifact in (two_leaves, copy):
        for dtype in ("float64", "float32"):
            assert stress(artifact, dtype) == pytest.approx(STRESS, rel=1e-6)
    # Nor does a damaged one keep the other from loading.
    (copy / "cpu/float32/elasticity.pt2").write_bytes(b"no package")
    assert stress(copy, "float64") == pytest.approx(STRESS, rel=1e-12)


@pytest.mark.parametrize("changes", [[stiffer, longer], [stiffer, longer, other_code]])
def test_a_leaf_of_an_earlier_compile_of_another_source_is_refused(
    two_leaves: Path, changes: list[Callable[[bytes], bytes]]
) -> None:
    change(two_leaves / "cpu/float32", *changes)
    with pytest.raises(ArtifactError, match=r"cpu/float32: is of an earlier compile.*--device cpu --dtype float32"):
        Model(two_leaves, dtype="float32")
    assert stress(two_leaves, "float64") == pytest.approx(STRESS, rel=1e-12)
    # A seal of what does not belong together changes nothing.
    seal(two_leaves)
    with pytest.raises(ArtifactError, match="is of an earlier compile"):
        Model(two_leaves, dtype="float32")


def test_where_times_do_not_tell_the_earlier_leaf_it_is_warned_of_both(two_leaves: Path) -> None:
    change(two_leaves / "cpu/float32", stiffer, longer)
    copy = without_times(two_leaves)
    # The metadata was written again since.
    os.utime(two_leaves / "metadata.json")
    for artifact, dtype in itertools.product((copy, two_leaves), ("float64", "float32")):
        with pytest.warns(UserWarning, match=rf"cpu/{dtype}: is of another source.*compile all leaves again") as given:
            Model(artifact, dtype=dtype)
        assert given[0].filename == __file__


def test_code_of_another_torch_with_the_same_constants_is_no_reason_to_warn(two_leaves: Path) -> None:
    change(two_leaves / "cpu/float32", other_code, other_compiler, longer)
    copy = without_times(two_leaves)
    for dtype in ("float64", "float32"):
        assert stress(copy, dtype) == pytest.approx(STRESS, rel=1e-6)


def test_where_code_constants_and_compiler_differ_it_is_warned_until_the_artifact_is_sealed(two_leaves: Path) -> None:
    change(two_leaves / "cpu/float32", stiffer, longer, other_code, other_compiler)
    copy = without_times(two_leaves)
    with pytest.warns(UserWarning, match=r"cpu/float32: may be of another source.*neml2-aoti seal"):
        Model(copy, dtype="float32")
    seal(copy)
    Model(copy, dtype="float32")


def test_inspect_and_doctor_report_every_leaf(two_leaves: Path) -> None:
    change(two_leaves / "cpu/float32", stiffer, longer)
    shutil.copy(two_leaves / "cpu/float64/elasticity.pt2", two_leaves / "cpu/float64/elasticity_pvjp.pt2")
    leaves = {leaf["dtype"]: leaf for leaf in answer("inspect", two_leaves)["leaves"]}
    assert "is of an earlier compile" in leaves["float32"]["fault"] and not leaves["float64"]["fault"]
    assert leaves["float64"]["left"] == ["elasticity_pvjp.pt2"] and not leaves["float32"]["left"]
    text, _ = printed("inspect", two_leaves)
    assert "is of an earlier compile" in text and "not named by the metadata: elasticity_pvjp.pt2" in text
    # What is asked for runs; the leaf beside it does not belong there all the same.
    found = answer("doctor", two_leaves, status=1)
    assert found["artifact"]["runs"]
    (problem,) = (f for f in found["findings"] if f["level"] == "problem")
    assert "is of an earlier compile" in problem["says"] and "--dtype float32" in problem["says"]
    assert any("elasticity_pvjp.pt2, which the metadata does not name" in f["says"] for f in found["findings"])
    assert not answer("doctor", two_leaves, "--dtype", "float32", status=1)["artifact"]["runs"]


def test_devices_of_old_layouts_are_compared_too(two_leaves: Path) -> None:
    """Each has its own metadata there, so that neither is refused."""
    root = two_leaves.parent / "old" / "elasticity"
    document = {**json.loads((two_leaves / "metadata.json").read_text()), "schema_version": 7, "dtype": "float64"}
    for device, leaf in (("cpu", "cpu/float64"), ("cuda", "cpu/float32")):
        shutil.copytree(two_leaves / leaf, root / device)
        (root / device / "elasticity_meta.json").write_text(json.dumps({**document, "device": device}))
    assert [leaf["doubt"] for leaf in answer("inspect", root)["leaves"]] == ["", ""]
    change(root / "cuda", stiffer, longer)
    with pytest.warns(UserWarning, match=r"cpu: is of another source than .*cuda"):
        Model(root, "cpu")


def test_a_graph_that_gives_other_tensors_than_the_metadata_takes_is_refused(two_leaves: Path) -> None:
    document = json.loads((two_leaves / "metadata.json").read_text())
    document["segments"][0]["jacobian_pairs"] *= 2
    (two_leaves / "metadata.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"elasticity_jvp.pt2: gives 2 tensors, where the metadata takes 3 from it"):
        Model(two_leaves)


@pytest.mark.wide
def test_real_compiles_of_one_source_and_of_another_are_told_apart(tmp_path: Path) -> None:
    """The packages that neml2-compile writes for each dtype, from the same source and with another modulus."""
    same, stiff = (references.case(f"elasticity_{n}").artifact / "cpu/float32" for n in ("float32", "stiff"))
    artifact = references.copied("elasticity", tmp_path)
    for name in PACKAGES:
        leaves = (artifact / "cpu/float64", same, stiff)
        one, own, other = (read_generated(leaf / name, Folder(leaf.resolve())) for leaf in leaves)
        assert one is not None and own is not None and other is not None
        assert of_one_source(one, own, same_device=True) is of_one_source(one, own, same_device=False) is True
        assert of_one_source(one, other, same_device=True) is False
    for leaf in (stiff, same):
        shutil.copytree(leaf, artifact / "cpu/float32", dirs_exist_ok=True)
        set_times(artifact / "cpu/float32", 1.7e9)
        if leaf == stiff:
            with pytest.raises(ArtifactError, match="is of an earlier compile"):
                Model(artifact, dtype="float32")
    assert stress(artifact, "float32") == pytest.approx(STRESS, rel=1e-6)
