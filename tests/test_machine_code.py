"""Machine code: what it is made of, for which processors, and the object files that are kept of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from llvmlite import binding
from torch import Tensor

from attacks import children
from attacks.children import REPOSITORY
from equations import coupled
from hand_made_graphs import Handles, system_of
from neml2_aoti_plugin._solve import code_file, machine_code
from neml2_aoti_plugin._solve.machine_code import MachineCode
from neml2_aoti_plugin._solve.native import WantedDerivatives
from neml2_aoti_plugin.settings import NewtonSettings

ENTRIES = {"solve_block", "call_graph", "power"}
# What the code takes from elsewhere: LLVM's intrinsics, and what C's library has on every platform.
ELSEWHERE = re.compile(r"llvm\.|(memset|memcpy|memmove|sqrt)$")

on_posix = pytest.mark.skipif(os.name != "posix", reason="folders of Windows have no such modes")


def test_code_is_that_of_its_sources() -> None:
    """If this fails: `make machine-code`."""
    assert code_file.read().bitcode


def test_code_takes_nothing_but_intrinsics_from_elsewhere() -> None:
    """No address, no interpreter, no runtime of numba, no exceptions."""
    module = binding.parse_bitcode(code_file.read().bitcode)
    declared = {f.name for f in module.functions if f.is_declaration}
    assert not [name for name in declared if not ELSEWHERE.match(name)]
    assert not [g.name for g in module.global_variables if g.is_declaration]
    text = str(module)
    assert not re.search(r"inttoptr \(i64 \d{6,}", text)
    public = {f.name for f in module.functions if not f.is_declaration and f.linkage.name == "external"}
    assert public == ENTRIES
    # No contraction, no reassociation: sums are taken as they are written.
    assert not re.search(r"\b(fast|reassoc|contract|nnan|ninf|nsz|arcp|afn)\b", re.sub(r'"[^"]*"', "", text))


def made(cpu: str, features: str) -> MachineCode:
    """The machine code for another processor of this family."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple = binding.get_process_triple()
    target = machine_code.target_machine(binding, triple, cpu, features)
    return machine_code.loaded(binding, machine_code.emit(binding, code_file.read().bitcode, target), target, None)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="processors of the x86-64 family")
def test_bits_do_not_depend_on_the_vectors_of_the_processor() -> None:
    """SSE2 alone, AVX2, AVX-512 (where they are there), and this processor as it is."""
    there = binding.get_host_cpu_features()
    kinds = {"sse2": ("x86-64", True), "avx2": ("haswell", there.get("avx2") and there.get("fma"))}
    kinds["avx512"] = ("skylake-avx512", there.get("avx512f") and there.get("avx512vl") and there.get("avx512dq"))
    codes = {name: made(cpu, "") for name, (cpu, has) in kinds.items() if has}
    assert "sse2" in codes
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(37, 5, dtype=torch.float64, generator=generator)
    right = cubes(machine_code.load(), g)
    for name, code in codes.items():
        for one, other in zip(cubes(code, g), right, strict=True):
            assert torch.equal(one, other), name


def cubes(code: MachineCode, g: Tensor) -> tuple[Tensor, ...]:
    """Solve `M u + u^3 = g`; unknowns, iterations, norms and derivatives."""

    def by_givens(u: Tensor, g: Tensor) -> list[Tensor]:
        return [-torch.eye(5, dtype=torch.float64).repeat(len(u), 1, 1)]

    equations = coupled()
    system = system_of(Handles(), equations.b, equations.linearised, 5, 5, by_givens=by_givens, code=code)
    settings = NewtonSettings(atol=1e-12, rtol=1e-12, miters=50, ls_max_iters=5)
    found, _, derivatives = system.run(torch.zeros_like(g), g, settings, wanted=WantedDerivatives([0, 1, 4]))
    assert found.statistics.all_converged and derivatives is not None
    (u,) = found.unknowns
    exact = torch.linalg.inv(equations.jacobian(u, g))[..., [0, 1, 4]]
    torch.testing.assert_close(derivatives, exact, rtol=1e-10, atol=1e-10)
    return u, found.statistics.iterations, found.statistics.norms, derivatives


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**32, reason="lays out memory as Linux does")
def test_code_is_loaded_into_memory_in_pieces() -> None:
    """Where large libraries lie between what is free, as with torch for CUDA, its sections still reach each other."""
    children.run(
        """
        import ctypes, mmap
        from neml2_aoti_plugin._graphs.operators import power_executor
        from neml2_aoti_plugin._solve import machine_code

        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        no_reserve = 0x4000

        def taken(size):
            at = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve, -1, 0)
            assert at != ctypes.c_void_p(-1).value
            return at

        # Fill what is free between libraries; then all that is taken lies below what was taken before.
        for size in (2**shift for shift in range(30, 11, -1)):
            lowest = taken(size)
            while (at := taken(size)) > lowest or at < lowest - size:
                lowest = min(lowest, at)
        # A hole of each size, in pages, with 3 GiB to the next.
        holes = [(taken(3 * 2**30 + pages * 4096), pages * 4096) for pages in range(1, 65)]
        for at, size in holes:
            assert libc.munmap(at + 3 * 2**30, size) == 0
        assert power_executor(machine_code.load().power)
        """
    )


@pytest.mark.parametrize(
    ("triple", "magic"),
    [
        ("aarch64-unknown-linux-gnu", b"\x7fELF"),
        ("x86_64-unknown-linux-gnu", b"\x7fELF"),
        ("arm64-apple-macosx11.0.0", b"\xcf\xfa\xed\xfe"),
        ("x86_64-pc-windows-msvc", b"\x64\x86"),
    ],
)
def test_code_becomes_an_object_for_other_platforms(triple: str, magic: bytes) -> None:
    """It is not run there. An object for Linux takes nothing else from elsewhere than the code does."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = machine_code.target_machine(binding, triple, "", "")
    found = machine_code.emit(binding, code_file.read().bitcode, target)
    assert found.startswith(magic)
    if magic == b"\x7fELF":
        assert not [name for name in undefined(found) if not ELSEWHERE.match(name)]


def undefined(elf: bytes) -> Iterator[str]:
    """Names that an ELF object of 64 bits takes from elsewhere."""
    start, size, count = struct.unpack_from("<Q", elf, 0x28)[0], *struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, start + k * size) for k in range(count)]
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        # A table of symbols, with the section of its names.
        for at in range(offset, offset + length, entry) if kind == 2 else ():
            name, _, _, section = struct.unpack_from("<IBBH", elf, at)
            begin = sections[link][4] + name
            if name and section == 0:
                yield elf[begin : elf.index(b"\0", begin)].decode()


# A process that asks for the machine code, calls it, and shows where it is kept.
SHOW = """
import sys, torch
from equations import by_machine_code, square_roots
from neml2_aoti_plugin._solve import machine_code
from neml2_aoti_plugin.settings import NewtonSettings
machine_code._PATIENCE = 1e9
code, four = machine_code.load(), torch.full((3, 1), 4.0, dtype=torch.float64)
found = by_machine_code(square_roots(), torch.ones_like(four), four, NewtonSettings())
assert abs(found.unknowns[0] - 2.0).max() < 1e-6
"""


def kept(folder: Path | str, before: str = "", after: str = "print(code.kept)", **variables: str) -> str:
    """What such a process prints: where the object file is, or `None`."""
    return children.start(before + SHOW + after, NEML2_AOTI_PLUGIN_CACHE=str(folder), **variables).finish(60).strip()


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good object file, to be copied."""
    return Path(kept(tmp_path_factory.mktemp("good")))


@pytest.fixture
def file(object_file: Path, tmp_path: Path) -> Path:
    """A copy of it in a cache folder."""
    folder = tmp_path / "cache" / "machine-code"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    return Path(shutil.copy(object_file, folder))


def only(cache: Path) -> Path:
    (file,) = (cache / "machine-code").iterdir()
    return file


@on_posix
def test_object_is_kept_for_this_user_alone_and_read_again(tmp_path: Path) -> None:
    first = kept(tmp_path)
    file = only(tmp_path)
    assert first == str(file)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    before = file.stat()
    assert kept(tmp_path) == str(file)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "a bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "its digest": lambda content: bytes([content[0] ^ 1]) + content[1:],
    # The digest of what follows alone, which anybody can take.
    "another's": lambda content: hashlib.sha256(content[32:]).digest() + content[32:],
}


@pytest.mark.processes
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_object_is_made_anew(damage: str, file: Path) -> None:
    good = file.read_bytes()
    file.write_bytes(DAMAGES[damage](good))
    assert kept(file.parents[1]) == str(file)
    assert file.read_bytes() == good


@pytest.mark.processes
@on_posix
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, "link"], ids=["fifo", "folder", "link"])
def test_what_is_no_plain_file_is_left_alone(make: Any, file: Path, tmp_path: Path) -> None:
    elsewhere = file.rename(tmp_path / "elsewhere.o")
    if make == "link":
        file.symlink_to(elsewhere)
    else:
        make(file)
    before = elsewhere.read_bytes()
    assert kept(file.parents[1]) in ("None", str(file))
    assert elsewhere.read_bytes() == before


@pytest.mark.processes
@on_posix
@pytest.mark.parametrize("whose", [0o777, 0o770, 0o750, "exchanged", "given away"])
def test_folder_that_others_can_change_is_not_read(whose: Any, file: Path) -> None:
    if whose == "exchanged":
        file.parents[1].chmod(0o777)
    elif whose == "given away":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(file.parent, 12345, 12345)
    else:
        file.parent.chmod(whose)
    # Whoever can write here can write a digest, too; this one would be believed elsewhere.
    good = file.read_bytes()
    file.write_bytes(b"planted")
    assert kept(file.parents[1]) == "None"
    assert file.read_bytes() == b"planted"
    if whose == "exchanged":
        file.write_bytes(good)
        file.parents[1].chmod(0o1777)
        assert kept(file.parents[1]) == str(file)


@pytest.mark.processes
def test_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    # What is printed goes into a file, too.
    before = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
"""
    after = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\nprint(code.kept)"
    assert kept(tmp_path, before, after) == "None"
    assert not list((tmp_path / "machine-code").iterdir())


@pytest.mark.processes
def test_no_folder_to_be_had(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.touch()
    assert kept(plain) == kept("", HOME="", XDG_CACHE_HOME="") == kept("relative/folder") == "None"


@pytest.mark.processes
def test_many_processes_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: kept(tmp_path), range(4)))
    assert found == {str(only(tmp_path))}


# An interrupt may leave a file for the collector to close.
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@on_posix
def test_signal_in_the_middle_of_making_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine_code.VARIABLE, str(tmp_path))
    before, interrupts = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    try:
        for k in range(8):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-3 * 4.0**k / 4)
                interrupts += 1
                machine_code._load()
                interrupts -= 1
                signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts >= 2
    code = machine_code._load()
    assert cubes(code, torch.ones(3, 5, dtype=torch.float64))[0].shape == (3, 5)
    assert str(code.kept) == str(only(tmp_path))


def test_a_line_on_stderr_where_it_takes_long(tmp_path: Path) -> None:
    source = "from neml2_aoti_plugin._solve import machine_code\nmachine_code._PATIENCE = 0.0\nmachine_code.load()"
    said = [children.run(source, NEML2_AOTI_PLUGIN_CACHE=str(tmp_path)).strip() for _ in range(2)]
    made = r"neml2-aoti-plugin: made machine code for this processor in \d+\.\d s \(kept in .*\)"
    assert re.fullmatch(made, said[0]) and said[1] == ""


def test_users_need_no_numba(tmp_path: Path) -> None:
    """A process that has solved has imported neither numba nor the sources of the machine code."""
    after = "print([m for m in sys.modules if 'numba' in m or 'machine.' in m])"
    assert kept(tmp_path, after=after) == "[]"


@pytest.mark.long
def test_build_makes_the_code_again_from_its_sources(tmp_path: Path) -> None:
    """In an environment with numba and without torch, as the build of the package has it."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "numba==0.63.1"], check=True)
    target = tmp_path / "made.bc"
    command = [str(python), "-m", "machine.emit", str(target)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    assert target.read_bytes() == code_file.PATH.read_bytes()
