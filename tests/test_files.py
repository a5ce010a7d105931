"""How files of artifacts are opened: plain files in the artifact's own folder, and errors that show nothing of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import neml2
import pytest
import torch

import references
from attacks.archives import changed, edited, extra
from attacks.artifacts import INPUTS, old_metadata, package, refusal, runs
from attacks.children import run
from attacks.documents import SECRET, SIGN, with_secrets
from data.collect import document
from neml2_aoti_plugin import AOTIError, ArtifactError, ArtifactNotFoundError, InputError, Model, UnknownNameError, seal
from neml2_aoti_plugin._artifact import decode, files
from neml2_aoti_plugin._artifact.files import ROOTS, named, shown
from neml2_aoti_plugin.parallel import map_rows
from neml2_aoti_plugin.points import Points
from references import change_json, write_stub

LEAVES_IT = "out of the artifact's folder"

HOSTILE = """
import os, resource, signal, socket, sys
from pathlib import Path
from attacks.artifacts import old_metadata
from neml2_aoti_plugin import AOTIError, Model, seal

artifact = Path(sys.argv[1])
(artifact / "cpu/float64/old_meta.json").write_text(old_metadata(artifact))

def hostile(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        # The path of a socket must be short.
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "ring" else kind)

PLACES = {
    "../elasticity.sha256": lambda: Model(artifact),
    "metadata.json": lambda: Model(artifact),
    "./metadata.json": lambda: Model(artifact / "metadata.json"),
    "cpu/float64/old_meta.json": lambda: Model(artifact / "cpu/float64/old_meta.json"),
    "cpu/float64/elasticity.pt2": lambda: Model(artifact),
    "file to seal": lambda: seal(artifact),
}
for place, load in PLACES.items():
    for kind in ("pipe", "socket", "folder", "ring", "/dev/zero", "/dev/tty", "/proc/kmsg", "/proc/self/pagemap"):
        path = artifact / place
        kept = path.with_name(path.name + ".kept")
        if path.exists():
            path.rename(kept)
        hostile(path, kind)
        # A hang ends the process.
        signal.alarm(20)
        try:
            load()
            end = "loads"
        except AOTIError as error:
            end = type(error).__name__ + " " + str(error).replace("\\n", " ")
        signal.alarm(0)
        print(place, kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, end, sep="|", flush=True)
        path.rmdir() if kind == "folder" else path.unlink()
        (path.parent / (path.name + ".sha256")).unlink(missing_ok=True)
        if kept.exists():
            kept.rename(path)
print("end")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the devices are Linux's")
@pytest.mark.parametrize("roots", ["", "/"])
def test_pipes_sockets_and_devices_are_refused_at_once(artifact: Path, roots: str) -> None:
    *lines, last = run(HOSTILE, artifact, **{ROOTS: roots}, limit=200).splitlines()
    assert last == "end" and len(lines) == 48
    sizes = []
    for line in lines:
        place, kind, size, end = line.split("|", 3)
        sizes.append(int(size))
        # One more folder is no fault; what the system makes up has no bytes, and is sealed so where it is allowed.
        if place == "file to seal" and (kind == "folder" or (roots and kind.startswith("/proc"))):
            assert end == "loads"
        else:
            assert end.startswith(("ArtifactError", "ArtifactNotFoundError")) and str(artifact.parent) in end, line
    # In MB: nothing without end was read.
    assert max(sizes) - min(sizes) < 200


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("metadata.json", files.METADATA),
        ("cpu/float64/elasticity.pt2", files.PACKAGE),
        ("../elasticity.sha256", files.SEAL),
    ],
)
def test_a_file_that_is_too_large(artifact: Path, name: str, kind: files.Kind) -> None:
    if kind is files.SEAL:
        seal(artifact)
    os.truncate(artifact / name, kind.limit + 1)
    text = refusal(artifact)
    assert Path(name).name in text and f"larger than {kind.limit} bytes" in text


def test_a_file_that_shrinks_while_it_is_read() -> None:
    """The system gives this file a size that it does not have."""
    there = [path for path in (Path("/sys/kernel/uevent_seqnum"), Path("/sys/kernel/profiling")) if path.is_file()]
    if not there:
        pytest.skip("no file of a size that it does not have")
    with pytest.raises(ArtifactError, match=r"cannot be read \(ValueError\)"):
        files.read_file(there[0], files.ANY, None)


class TestLinks:
    """Without a root that allows it, nothing is opened outside of the artifact's real folder."""

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        return references.copied("elasticity", tmp_path / "outside")

    @pytest.mark.parametrize(
        "inside",
        ["metadata.json", "cpu/float64/elasticity.pt2", "cpu/float64/elasticity_jvp.pt2", "cpu/float64", "cpu"],
    )
    @pytest.mark.parametrize("relative", [False, True])
    def test_that_lead_out_are_refused(
        self, artifact: Path, outside: Path, inside: str, relative: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, target = artifact / inside, outside / inside
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(os.path.relpath(target, path.parent) if relative else target)
        text = refusal(artifact)
        assert LEAVES_IT in text and f"{ROOTS}={artifact.parent.parent}" in text
        # The cure that it names.
        monkeypatch.setenv(ROOTS, str(artifact.parent.parent))
        assert runs(artifact)
        monkeypatch.setenv(ROOTS, str(artifact.parent))
        assert "outside of the folders" in refusal(artifact)

    def test_that_lead_out_are_refused_in_the_old_layout_and_not_sealed(self, artifact: Path, outside: Path) -> None:
        package(artifact).unlink()
        package(artifact).symlink_to(package(outside))
        with pytest.raises(ArtifactError, match=LEAVES_IT):
            seal(artifact)
        (outside / "old_meta.json").write_text(old_metadata(artifact))
        (artifact / "metadata.json").unlink()
        (artifact / OLD).symlink_to(outside / "old_meta.json")
        assert LEAVES_IT in refusal(artifact / "cpu/float64")

    def test_that_stay_inside_are_followed(self, artifact: Path) -> None:
        file, link = package(artifact), artifact.with_name("link")
        (artifact / "store").mkdir()
        file.rename(artifact / "store" / "a")
        file.symlink_to("../../store/a")
        link.symlink_to(artifact)
        assert runs(artifact) and runs(link)

    def test_a_link_that_comes_up_while_it_is_opened(
        self, artifact: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at the path and the opening, a folder is exchanged for a link."""
        leaf = artifact / "cpu/float64"
        looked = os.path.realpath

        def exchanged(path: str | Path) -> str:
            found = looked(path)
            if str(path).endswith(".pt2") and not leaf.is_symlink():
                shutil.rmtree(leaf)
                leaf.symlink_to(outside / "cpu/float64")
            return found

        monkeypatch.setattr(os.path, "realpath", exchanged)
        with pytest.raises(ArtifactError, match="cannot be read"):
            files.read_file(leaf / "elasticity.pt2", files.PACKAGE, artifact)

    def test_the_name_of_a_package_does_not_lead_out(self, artifact: Path, outside: Path) -> None:
        """A variable's name that ends like a package's is no package."""

        def rename(document: Any) -> None:
            document["inputs"][0]["name"] = str(package(outside))
            document["segments"][0]["inputs"] = [str(package(outside))]

        change_json(artifact / "metadata.json", rename)
        text = refusal(artifact)
        assert LEAVES_IT in text or "derivative" in text


# -- what errors show --------------------------------------------------------------------------------------------------


def other_archive(data: bytes) -> bytes:
    """A zip archive that is no package."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(SECRET, "x")
    return out.getvalue()


def misnamed(data: bytes) -> bytes:
    """The library under another name before its bytes than in the directory; `zipfile` quotes both."""
    name = next(n for n in zipfile.ZipFile(io.BytesIO(data)).namelist() if n.endswith(".so")).encode()
    return data.replace(name, (SECRET * 9)[: len(name)].encode(), 1)


def calling(target: str) -> bytes:
    return json.dumps({"nodes": [{"node": {"target": target}}]}).encode()


TEXTS = [
    SECRET,
    json.dumps(SECRET),
    json.dumps([SECRET]),
    json.dumps({"schema_version": SECRET}),
    json.dumps({SECRET: 14}),
    json.dumps({"schema_version": 14, "type": SECRET}),
    json.dumps({"schema_version": 14, SECRET: 1}),
    f'{{"a": "\\{SECRET}"}}',
    f'{{"{SIGN}',
]
OLD = "cpu/float64/old_meta.json"
PACKAGE = "cpu/float64/elasticity.pt2"
# A file of an artifact, and how it comes to hold the secret.
HOLDS: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((name, lambda _, text=text: text.encode()) for name in ("metadata.json", OLD) for text in TEXTS),
    ("metadata.json", lambda _: SECRET.encode() + b"\xff\xfe"),
    (OLD, lambda data: json.dumps({**json.loads(data), "device": SECRET}).encode()),
    (OLD, lambda data: json.dumps({**json.loads(data), "dtype": SECRET}).encode()),
    ("../elasticity.sha256", lambda _: SECRET.encode()),
    ("../elasticity.sha256", lambda _: ("0" * 64 + "  " + SECRET).encode()),
    (PACKAGE, lambda _: SECRET.encode()),
    (PACKAGE, other_archive),
    (PACKAGE, extra(SECRET)),
    (PACKAGE, extra("../" + SECRET)),
    (PACKAGE, extra("{graph}" + SECRET + ".so")),
    (PACKAGE, edited("_metadata.json", lambda _: SECRET.encode())),
    (PACKAGE, edited("_metadata.json", lambda _: json.dumps(SECRET).encode())),
    (PACKAGE, edited("_metadata.json", lambda data: json.dumps(dict.fromkeys(json.loads(data), SECRET)).encode())),
    (PACKAGE, extra("{graph}x.wrapper.json", calling(SECRET))),
    (PACKAGE, extra("{graph}x.wrapper.json", SECRET.encode())),
    (PACKAGE, changed(lambda entries, _: [(info, SECRET.encode()) for info, _ in entries])),
    (PACKAGE, misnamed),
]


class TestSecrets:
    """An error shows numbers, names and types, and nothing else of what was read."""

    @pytest.mark.parametrize("name", ["3.0.0-multi", "3.0.3-cross_group", "3.0.6-multi", "3.0.7-multi", "3.1.0-multi"])
    def test_in_the_metadata_of_every_schema(self, name: str) -> None:
        refused = 0
        for where, written in with_secrets(document(*name.split("-"))):
            try:
                decode.metadata(written, "file")
            except AOTIError as error:
                refused += 1
                assert SIGN not in str(error), f"{where}: {error}"
        assert refused > 100

    def test_in_a_type_whose_size_is_wrong(self) -> None:
        written = document("3.0.3", "cross_group")
        written["inputs"][0].update(var_type=SECRET, base_shape=[6], var_size=5)
        with pytest.raises(ArtifactError, match="var_type is a str") as raised:
            decode.metadata(written, "file")
        assert SIGN not in str(raised.value)

    @pytest.mark.parametrize(("name", "make"), HOLDS)
    def test_in_a_file(self, artifact: Path, name: str, make: Callable[[bytes], bytes]) -> None:
        file = artifact / name
        if name == OLD:
            file.write_text(old_metadata(artifact))
        file.write_bytes(make(file.read_bytes() if file.exists() else b""))
        assert SIGN not in refusal(file if name == OLD else artifact)

    def test_what_may_be_shown(self) -> None:
        assert [shown(x) for x in (3, -2.5, True, None)] == ["3", "-2.5", "True", "None"]
        assert [shown(x) for x in ("14", ["a"], {"a": 1}, 10**30)] == ["a str", "a list", "a dict", "an int"]
        assert named("strain~1") == "'strain~1'" and named("a/b.pt2") == "'a/b.pt2'"
        assert named("a b") == "<3 characters that are no name>" and named("x" * 999).startswith("<999 characters")


class TestPaths:
    def test_too_long(self, tmp_path: Path) -> None:
        for path in (tmp_path / ("x" * 5000), Path("/x" * 5000), tmp_path / ("y" * 300) / "metadata.json"):
            text = refusal(path, ArtifactNotFoundError)
            assert "cannot be reached (File name too long)" in text and len(text) < 700
            with pytest.raises(ArtifactNotFoundError, match="File name too long"):
                seal(path)
        with pytest.raises(ArtifactNotFoundError, match=r"\[Models/bar\] in .*bar_aoti\.i"):
            neml2.load_model(write_stub(tmp_path / "bar_aoti.i", bar=f"/{'x' * 5000}"), "bar")

    def test_with_a_null_byte_and_in_a_ring(self, tmp_path: Path) -> None:
        (tmp_path / "ring").symlink_to("ring")
        for name in ("ring", "a\0b"):
            assert "cannot be reached" in refusal(tmp_path / name, ArtifactNotFoundError)

    def test_in_a_working_directory_that_is_gone(self, tmp_path: Path) -> None:
        out = run(
            """
            import os, sys
            from attacks.artifacts import refusal, runs
            from neml2_aoti_plugin import ArtifactNotFoundError
            folder = sys.argv[2]
            os.mkdir(folder)
            os.chdir(folder)
            os.rmdir(folder)
            print(refusal("elasticity", ArtifactNotFoundError))
            # An absolute path needs no working directory.
            assert runs(sys.argv[1])
            """,
            references.case("elasticity").artifact,
            tmp_path / "gone",
        )
        assert "the working directory is gone" in out and "absolute path" in out

    def test_a_graph_is_told_what_it_belongs_to(self, artifact: Path) -> None:
        text = refusal(package(artifact), ArtifactNotFoundError)
        assert f"it is a file, a graph. It belongs to the artifact {artifact}: give that" in text
        graph = Path(shutil.copy(package(artifact), artifact.parent / "alone.pt2"))
        assert "Give the artifact's folder" in refusal(graph, ArtifactNotFoundError)

    def test_a_file_that_is_no_stub(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("[Models\n")
        assert "cannot be read as an input file" in refusal(tmp_path / "notes.txt", InputError)
        (tmp_path / "empty.i").write_text("")
        assert "has no compiled model" in refusal(tmp_path / "empty.i", InputError)


class TestStub:
    """Whatever takes a model takes the path of a stub."""

    def test_model_points_and_map_rows(self) -> None:
        case = references.case("elasticity")
        strain = torch.tensor([[1e-3, 0.0, 0.0, 0.0, 0.0, 0.0]] * 3, dtype=torch.float64)
        wanted = case.model.forward({"strain": strain})["stress"]
        model = Model(str(case.file))
        assert (model.artifact, model.digest) == (case.artifact, case.model.digest)
        for some in (model, pickle.loads(pickle.dumps(model))):
            assert torch.equal(some.forward({"strain": strain})["stress"], wanted)
        assert torch.equal(Points(case.file, 3).update({"strain": strain}).outputs["stress"], wanted)
        found: list[Any] = []
        with ThreadPoolExecutor(1) as executor:
            map_rows(case.file, {"strain": strain.numpy()}, found.append, executor=executor, progress=False)
        assert torch.equal(torch.tensor(found[0]["stress"]), wanted)

    def test_its_solver_is_the_models(self, tmp_path: Path) -> None:
        """Stubs of neml2 3.0.4 to 3.0.6 hold the settings; the caller's own come first."""
        artifact = references.case("viscoplasticity").artifact
        solver = "[Solvers]\n[mine]\n type = Newton\n max_its = 9\n abs_tol = 1e-5\n []\n[]\n"
        stub = write_stub(tmp_path / "stub.i", solver, options="solver = mine", v=artifact)
        settings = Model(stub, solver={"atol": 1e-6}).solver
        assert settings is not None and (settings.miters, settings.atol) == (9, 1e-6)

    def test_of_several_models_one_is_named(self, tmp_path: Path) -> None:
        soft, hard = (references.case(name) for name in ("elasticity", "viscoplasticity"))
        stub = write_stub(tmp_path / "two.i", soft=soft.artifact, hard=hard.artifact)
        assert Model(stub, name="hard").input_names == hard.model.input_names
        assert "has several compiled models: soft, hard" in refusal(stub, InputError)
        assert "has no compiled model 'other'; there are: soft, hard" in refusal(stub, UnknownNameError, name="other")
        text = refusal(soft.artifact, UnknownNameError, name="other")
        assert "holds the model 'elasticity', not 'other'" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_to_a_device_that_is_not_there() -> None:
    model = Model(references.case("elasticity").artifact)
    moves: list[Callable[[], Any]] = [lambda: model.to("cuda"), lambda: model.cuda(), lambda: model.to("cuda:7")]
    for move in moves:
        with pytest.raises(InputError, match=r"cannot move .*It stays on cpu.*is_available\(\) is False"):
            move()
        assert model.device == torch.device("cpu") and model.forward(INPUTS)["stress"].shape == (6,)
