"""Files that users name: written whole or not at all, read within bounds, and plain files only."""

from __future__ import annotations

import os
import signal
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import references
from commands import answer, refused, write_points
from neml2_aoti_plugin import InputError, Model, Points
from neml2_aoti_plugin._cli.points import read_points
from neml2_aoti_plugin._files import draft, file_name, require_writable
from point_cases import stepped


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("stress", "stress"),
        ("state/S", "state%2FS"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E."),
        ("a%2Fb", "a%252Fb"),
        ("stress@E.a+b-c_d~1", "stress@E.a+b-c_d~1"),
        ("a b\\c:d\n", "a%20b%5Cc%3Ad%0A"),
        ("é", "%C3%A9"),
        ("\udc80", "%ED%B2%80"),
        ("", ""),
    ],
)
def test_any_variable_has_a_file_name_of_its_own(variable: str, name: str) -> None:
    assert file_name(variable) == name and unquote(name, errors="surrogatepass") == variable


# -- written -----------------------------------------------------------------------------------------------------------


def device(folder: Path) -> Path:
    """A device that may be lost: root would replace /dev/null itself, if the code were wrong; nobody else can."""
    if os.geteuid() != 0:
        return Path("/dev/null")
    path = folder / "device"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError:
        pytest.skip("no device can be made here")
    return path


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_file_has_the_mode_of_the_umask_and_one_that_was_there_keeps_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for mask, new in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            with draft(file) as scratch:
                scratch.write_text("old")
        finally:
            os.umask(before)
        assert mode(file) == new
        file.chmod(0o640)
        with draft(file) as scratch, draft(file) as other:
            # Nobody can foresee a name that is another one each time.
            assert scratch.name != other.name
            other.write_text("other")
            scratch.write_text("new")
            assert file.read_text() == "old" and scratch.suffix == ".txt"
        assert file.read_text() == "new" and mode(file) == 0o640
        with pytest.raises(ZeroDivisionError), draft(file) as scratch:
            scratch.write_text("half")
            raise ZeroDivisionError
        assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
        file.unlink()


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "folder", "device"])
def test_only_plain_files_are_written_over(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    other.write_text("other")
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "device":
        target = device(tmp_path)
    else:
        target.symlink_to(other if kind == "link" else tmp_path / "gone")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"is a {kind.split()[-1]}, expected the name of a file"):
        require_writable(target)
    with pytest.raises(InputError, match=f"is a {kind.split()[-1]}, expected"), draft(target):
        pytest.fail("begun")
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is in a folder, with what kind of thing it is."""
    found = sorted(folder.rglob("*"))
    return {str(p): (os.lstat(p).st_mode, p.read_bytes() if p.is_file() else b"") for p in found}


def test_what_the_command_reads_is_not_written_over(tmp_path: Path) -> None:
    read, same = tmp_path / "read", tmp_path / "same"
    read.write_text("in")
    same.hardlink_to(read)
    for target in (read, same, tmp_path / "." / "read"):
        with pytest.raises(InputError, match="is read by the same command"), draft(target, [tmp_path / "no", read]):
            pytest.fail("begun")
    with draft(tmp_path / "new", [read]) as scratch:
        scratch.write_text("out")
    assert read.read_text() == "in"


@pytest.mark.parametrize("layout", ["metadata.json", "cpu/law_meta.json"])
@pytest.mark.parametrize("place", ["a.txt", "cpu/a.txt", "cpu/float64/a.txt"])
def test_nothing_is_written_into_an_artifact(layout: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "law/cpu/float64").mkdir(parents=True)
    (tmp_path / "law" / layout).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "law")
    for folder in ("law", "link", "law/../law"):
        with pytest.raises(InputError, match=r"lies in the artifact .*law, which is never changed"):
            require_writable(tmp_path / folder / place)
    require_writable(tmp_path / "a.txt")


# -- what commands write -----------------------------------------------------------------------------------------------


@pytest.fixture
def promoted(tmp_path: Path) -> Path:
    """A copy of an artifact with its stub."""
    return references.copied("promoted", tmp_path)


STUB = "promoted_aoti.i"
SET = ("--set", "promoted.E=1", "--out")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *((("params", STUB, *SET, f"promoted/{out}"), "lies in") for out in ("metadata.json", "cpu/a.pt2", "new.st")),
        (("params", STUB, *SET, STUB), "is read by the same command"),
        *((("params", STUB, *SET, kind), f"is a {kind}") for kind in ("link", "pipe", "device")),
        *((("migrate", "promoted", "--out", f"promoted/{out}"), "lies in") for out in (".", "cpu", "cpu/float64")),
        (("verify", STUB, "--points", "points.npz", "--record", "points.npz"), "is read by the same command"),
        (("verify", STUB, "--record", STUB), "is read by the same command"),
        (("run", STUB, "driver", "--parameters", "p.npz", "--out", "p.npz"), "is read by the same command"),
    ],
)
def test_a_command_writes_over_nothing_else(
    command: tuple[str, ...], said: str, promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("points.npz", strain=np.full((2, 6), 1e-3))
    Model(promoted).save_parameters("p.npz")
    Path("link").symlink_to(promoted / "metadata.json")
    os.mkfifo("pipe")
    if "device" in command and device(tmp_path) != tmp_path / "device":
        command = (*command[:-1], "/dev/null")
    before = contents(tmp_path)
    for force in ([], ["--force"]) if command[0] == "params" else ([],):
        assert said in refused(*command, *force)
    assert contents(tmp_path) == before


def test_params_replaces_parameters_and_with_force_any_file(promoted: Path) -> None:
    new, notes = promoted.parent / "new.safetensors", promoted.parent / "notes.txt"
    command = ("params", promoted, "--set", "promoted.E=1")
    answer(*command, "--out", new)
    new.chmod(0o600)
    answer(*command, "--set", "promoted.nu=0.1", "--out", new)
    assert mode(new) == 0o600
    assert Model(promoted, parameters=new).named_parameters()["promoted.nu"].item() == 0.1
    for arguments, said in (
        (["--out", notes], "is there, and holds no parameters. Give another name, or --force"),
        (["--from", new, "--out", new], "is read by the same command"),
    ):
        notes.write_text("mine")
        assert said in refused(*command, *arguments)
        assert notes.read_text() == "mine"
        answer(*command, *arguments, "--force")
    assert Model(promoted, parameters=new).named_parameters()["promoted.E"].item() == 1.0


# -- integration points ------------------------------------------------------------------------------------------------


@pytest.fixture
def points() -> Points:
    """Four points with a state."""
    return stepped()


def test_a_file_that_threads_save_to_is_whole(points: Points, tmp_path: Path) -> None:
    file = tmp_path / "state.npz"
    points.save(file)
    file.chmod(0o600)
    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda _: points.save(file), range(30)):
            points.load(file)
    assert os.listdir(tmp_path) == ["state.npz"] and mode(file) == 0o600


class State:
    """The file of a state of points, and the same with a part exchanged."""

    def __init__(self, points: Points, folder: Path) -> None:
        self.points, self.file, self.other = points, folder / "state.npz", folder / "other.npz"
        points.save(self.file)
        with np.load(self.file) as found:
            self.content = dict(found)

    def load(self, **changed: Any) -> None:
        np.savez_compressed(self.other, **{**self.content, **changed})
        self.points.load(self.other)

    def load_entry(self, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
        """With these bytes in the place of an array."""
        np.savez(self.other, **{entry: value for entry, value in self.content.items() if entry != name})
        with zipfile.ZipFile(self.other, "a", compression) as archive:
            archive.writestr(f"{name}.npy", data)
        self.points.load(self.other)


@pytest.fixture
def state(points: Points, tmp_path: Path) -> State:
    return State(points, tmp_path)


STRESS = "value/stress~1"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (STRESS, lambda x: np.where(x == x.max(), np.nan, x), r"'value/stress~1' holds NaN or infinite numbers"),
        (STRESS, lambda x: np.full_like(x, -np.inf), r"'value/stress~1' holds NaN or infinite numbers"),
        (STRESS, lambda x: x != 0, "'value/stress~1' has dtype bool, expected float64 or float32"),
        (STRESS, lambda x: x.astype(complex), "has dtype complex128, expected"),
        (STRESS, lambda x: x.astype(np.int32), "has dtype int32, expected"),
        (STRESS, lambda x: x.astype(np.float16), "has dtype float16, expected"),
        (STRESS, lambda x: x.astype("U9"), "has dtype str288, expected"),
        (STRESS, lambda x: x[0], r"the state's 'stress~1' has shape \(6,\), expected \(4, 6\)"),
        (STRESS, lambda x: x[:0], r"has shape \(0, 6\), expected \(4, 6\)"),
        ("value/more", lambda _: np.zeros(4), "unknown 'more'"),
        ("n", lambda _: 5.7, "with a digest and n"),
        ("n", lambda _: True, "with a digest and n"),
        ("n", lambda _: "four", r"is not a state of points \(Points.save\) \(ValueError\)"),
        ("n", lambda _: 2**40, "is one of 1099511627776 points, expected 4"),
        ("digest", lambda _: 1.0, "with a digest and n"),
    ],
)
def test_a_state_of_other_than_finite_numbers_is_refused(
    name: str, change: Callable[[Any], Any], said: str, state: State
) -> None:
    before = state.points.state().values
    with pytest.raises(InputError, match=said):
        state.load(**{name: change(state.content.get(name))})
    torch.testing.assert_close(state.points.state().values, before, rtol=0, atol=0)


def test_states_of_either_precision_and_order_of_bytes_are_taken(state: State) -> None:
    stress = state.points.state().values["stress~1"]
    for form in ("<f8", ">f8", "<f4"):
        state.load(**{STRESS: np.asfortranarray(state.content[STRESS].astype(form))})
        found = state.points.state().values["stress~1"]
        torch.testing.assert_close(found, stress, rtol=1e-6 if "4" in form else 0, atol=0)


def header(form: str, version: bytes = b"\x01\x00") -> bytes:
    """The beginning of an array in an npz file, with a header of this text."""
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(form)) + form.encode()


def form(shape: str, dtype: str = "'<f8'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    "array",
    [
        header(form("(4, 6)")),
        header(form("(4, 6, 99999999999999999999999)")),
        header(form("(1 << 62, 1 << 62)")),
        header(form("(-4, -6)")) + bytes(192),
        header(form("(4.0, 6)")) + bytes(192),
        header(form("(4, 6)", "'|O'")) + bytes(192),
        header(form("(4, 6)", "'<f999999999999999999999'")),
        header("{'descr': '"),
        header("(" * 5000 + "\n"),
        header("\x00" * 100),
        header(form("(4, 6)"), b"\x02\x00")[:10] + b"\xff\xff\xff\xff",
        header(form("(4, 6)"), b"\x09\x09") + bytes(192),
        b"",
        b"\x80\x04N.",
    ],
)
def test_damaged_arrays_are_reported(array: bytes, state: State) -> None:
    with pytest.raises(InputError, match=r"is not a state of points|has shape|has dtype object"):
        state.load_entry(STRESS, array)


def test_archives_that_python_cannot_open_are_reported(state: State) -> None:
    whole = state.file.read_bytes()
    (entry,) = [info for info in zipfile.ZipFile(state.file).infolist() if STRESS in info.filename]
    listed = whole.rindex(b"PK\x01\x02", 0, whole.rindex(STRESS.encode()))
    for changes in (
        # Encrypted, of an unknown way to compress, of an unknown version, with other numbers, and at another place.
        {entry.header_offset + 6: b"\x01\x00", listed + 8: b"\x01\x00"},
        {entry.header_offset + 8: b"\x63\x00", listed + 10: b"\x63\x00"},
        {listed + 6: b"\xff\xff"},
        {entry.header_offset + 200: b"\x41"},
        {listed + 42: b"\x7f\xff\xff\x7f"},
    ):
        damaged = bytearray(whole)
        for place, data in changes.items():
            damaged[place : place + len(data)] = data
        state.other.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is not a state of points"):
            state.points.load(state.other)


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """The most memory that Python has taken since."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "said"),
    [
        (STRESS, "(600000, 6)", "'<f8'", r"has shape \(600000, 6\), expected \(4, 6\)"),
        (STRESS, "(4, 6)", "'<f8'", "of another size"),
        ("digest", "()", "'<U7200000'", "digest and n"),
    ],
)
def test_what_a_small_file_claims_is_refused_before_it_is_read(
    name: str, shape: str, dtype: str, said: str, state: State, memory: Callable[[], int]
) -> None:
    """29 MB of zeros in 130 kB, as the stress of four points; and the same behind a right header, and as a note."""
    data = header(form(shape, dtype)) + bytes(48 * 600_000)
    tracemalloc.reset_peak()
    taken = memory()
    with pytest.raises(InputError, match=said):
        state.load_entry(name, data, zipfile.ZIP_DEFLATED)
    assert state.other.stat().st_size < 200_000 and memory() - taken < 3_000_000


def test_compressed_points_that_claim_more_than_is_sensible_are_refused(
    promoted: Path, tmp_path: Path, memory: Callable[[], int]
) -> None:
    """Their header and the archive's own list agree; there is nothing to compare them with but the size of the file."""
    rows, file = 30_000_000, tmp_path / "points.npz"
    head = header(form(f"({rows}, 6)"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("strain.npy", head)
    data = bytearray(file.read_bytes())
    listed = data.rindex(b"PK\x01\x02")
    data[listed + 24 : listed + 28] = struct.pack("<I", len(head) + 48 * rows)
    file.write_bytes(data)
    with pytest.raises(InputError, match="claims tensors of 1440000000 bytes, much more than it has itself"):
        read_points(file, Model(promoted))
    assert memory() < 30_000_000


# -- pipes and devices -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "device"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A pipe without a writer, or a link to /dev/zero; a read that waits for ever is ended."""

    def ring(*_: object) -> None:
        raise AssertionError("waits for a writer")

    path = tmp_path / "endless.npz"
    os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_and_devices_are_refused_at_once(endless: Path, points: Points, promoted: Path) -> None:
    for call in (points.load, Model(promoted).load_parameters):
        with pytest.raises(InputError, match=r"cannot be read \(not a file but a (pipe|device)\)"):
            call(endless)
    stub = promoted.parent / STUB
    for command in (
        ("params", stub, "--from", endless),
        ("verify", stub, "--golden", endless),
        ("verify", stub, "--points", endless),
        ("verify", stub, "--against", endless),
        ("run", stub, "driver", "--parameters", endless),
        ("run", endless, "driver"),
        ("inspect", endless),
        ("plot", endless, "--out", "a.png"),
        ("serve", stub, "--check", "--token-file", endless),
        ("serve", stub, "--check", "--parameters", f"promoted={endless}"),
    ):
        assert "endless.npz" in refused(*command), command


# -- golden files and points -------------------------------------------------------------------------------


def test_golden_files_of_other_than_finite_numbers_are_refused(promoted: Path) -> None:
    file = promoted.parent / "a.golden.safetensors"
    answer("verify", promoted, "--rows", 3, "--record", file)
    answer("verify", promoted, "--golden", file)
    with safe_open(file, "pt") as opened:
        notes, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    stress = "output.stress"
    renamed = notes["derivatives"].replace('"strain"', '"t"')
    for changes, more, said in (
        ({stress: tensors[stress].log()}, {}, "'output.stress' holds NaN or infinite numbers"),
        ({stress: tensors[stress].to(torch.float8_e5m2)}, {}, "'output.stress' has dtype F8_E5M2"),
        ({stress: tensors[stress][:2]}, {}, "different numbers of rows"),
        ({name: value[:0] for name, value in tensors.items()}, {}, "different numbers of rows, or none"),
        ({stress: tensors[stress][:, :5].contiguous()}, {}, "has shape (5,) a row, in 'promoted' it is (6,)"),
        ({}, {"derivatives": renamed}, "it holds the derivatives [('stress', 't')"),
        ({}, {"derivatives": "[]"}, "it holds the derivatives []"),
        ({"derivative.9": tensors["derivative.0"].clone()}, {}, "it holds the derivatives ["),
        ({}, {"derivatives": "[" * 100_000}, "is not a golden file (neml2-aoti verify --record) (RecursionError)"),
        ({}, {"derivatives": "[5]"}, "is not a golden file (neml2-aoti verify --record) (TypeError)"),
    ):
        # One of another number is there in the place of the first.
        left = [name for name in tensors if name != "derivative.0" or "derivative.9" not in changes]
        save_file({**{name: tensors[name] for name in left}, **changes}, file, {**notes, **more})
        assert said in refused("verify", promoted, "--golden", file)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_points_of_other_than_finite_numbers_are_refused(suffix: str, promoted: Path, tmp_path: Path) -> None:
    file = tmp_path / f"points{suffix}"
    for value, said in (
        (torch.full((2, 6), torch.nan), "'strain' holds NaN or infinite numbers"),
        (torch.ones(2, 6, dtype=torch.complex64), "'strain' has dtype"),
        (torch.ones(2, 6, dtype=torch.bool), "'strain' has dtype"),
        (torch.ones(2, 6, dtype=torch.int64), "'strain' has dtype"),
        (torch.ones(0, 6), "'strain' has shape (0, 6), expected (rows, 6)"),
    ):
        write_points(file, strain=value)
        assert said in refused("verify", promoted, "--points", file)
