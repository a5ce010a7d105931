"""Compile the stubs of the catalogue with neml2-compile, once, and keep them in a cache.

From Python: `compiled("elasticity")` returns the folder of a compiled stub. From a shell, in the repository root:
`python -m stubs.build [names...] [-j N]`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from .catalogue import CATALOGUE, Stub

CACHE_VARIABLE = "NEML2_AOTI_PLUGIN_STUB_CACHE"

# What a quick compile sets for inductor. None of it touches the numbers: the kernels, where the arithmetic is, are
# compiled with -O3 in any case. README.md has the measured effect.
QUICK = {
    # The wrapper of a graph allocates buffers and calls kernels. Most of a graph's compile time is the optimisation
    # of torch's headers in it.
    "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",
    # No line tables for debuggers.
    "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",
    # No pool of worker processes, each importing torch, for graphs that have one or two kernels.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

# The compile itself uses neml2 as it was published.
PLUGIN_OFF = {"NEML2_AOTI_PLUGIN": "0"}


class StubBuildError(RuntimeError):
    """A stub could not be compiled."""


def cache_root() -> Path:
    """Return the folder that holds all compiled stubs.

    Returns:
        The folder named by NEML2_AOTI_PLUGIN_STUB_CACHE, else ~/.cache/neml2-aoti-plugin/stubs.
    """
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "neml2-aoti-plugin" / "stubs"


def folder_of(name: str, *, quick: bool = True) -> Path:
    """Return where the compiled stub of an entry belongs, whether it is there or not.

    Args:
        name: Name of an entry of the catalogue.
        quick: As for `compiled`.

    Returns:
        A folder whose name ends with a hash of the input, the flags, the versions and the processor.
    """
    stub = _entry(name)
    return cache_root() / f"{name}-{_key(stub, quick)}"


def compiled(name: str, *, quick: bool = True) -> Path:
    """Compile an entry of the catalogue, or find it compiled in the cache.

    Args:
        name: Name of an entry of the catalogue.
        quick: Compile the graphs' wrappers without optimisation, which saves more than half of the compile time. The
            numbers are the same; the time between kernels is not, so give False to measure speed.

    Returns:
        The folder with the stub `<model>_aoti.i` and the artifact `<model>/` beside it.

    Raises:
        KeyError: The catalogue has no such entry.
        StubBuildError: There is no C++ compiler, or neml2-compile failed.
    """
    stub = _entry(name)
    folder = folder_of(name, quick=quick)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process was first
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _compile(stub, scratch, quick)
            scratch.chmod(0o755)
            scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return folder


def stub_path(name: str, *, quick: bool = True) -> Path:
    """Compile an entry of the catalogue, or find it, and return its stub.

    Args:
        name: Name of an entry of the catalogue.
        quick: As for `compiled`.

    Returns:
        The file `<model>_aoti.i`.
    """
    return compiled(name, quick=quick) / f"{_entry(name).model}_aoti.i"


def _entry(name: str) -> Stub:
    """Return an entry of the catalogue."""
    if name not in CATALOGUE:
        raise KeyError(f"the stub catalogue has no entry {name!r}; it has: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _key(stub: Stub, quick: bool) -> str:
    """Return the hash of everything that decides what neml2-compile writes for an entry."""
    parts = [
        stub.path.read_text(encoding="utf-8"),
        stub.appendix_path.read_text(encoding="utf-8") if stub.appendix_path else "",
        stub.model,
        stub.driver,
        *stub.flags,
        version("torch"),
        version("neml2"),
        "quick" if quick else "optimised",
        _processor(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """Describe the processor, for which inductor compiles natively."""
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _compile(stub: Stub, target: Path, quick: bool) -> None:
    """Run neml2-compile for an entry into a folder."""
    _require_compiler(stub)
    what = ("--model", stub.model) if stub.appendix else ("--driver", stub.driver)
    command = [*_neml2_compile(), str(stub.path), *what, *stub.flags, "--output-dir", str(target), "-q"]
    environment = {**os.environ, **PLUGIN_OFF, **(QUICK if quick else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    file = target / f"{stub.model}_aoti.i"
    if done.returncode != 0 or not file.is_file():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise StubBuildError(
            f"neml2-compile failed on the stub {stub.name!r} with exit status {done.returncode}.\n"
            f"Command: {shlex.join(command)}\nEnd of its output:\n{tail}"
        )
    if stub.appendix_path:
        with file.open("a", encoding="utf-8") as out:
            out.write("\n" + stub.appendix_path.read_text(encoding="utf-8"))


def _neml2_compile() -> list[str]:
    """Return the command that starts neml2-compile of the running environment."""
    for candidate in ("neml2-compile", "neml2-compile.exe"):
        script = Path(sys.executable).with_name(candidate)
        if script.is_file():
            return [str(script)]
    return [sys.executable, "-m", "neml2.cli.aoti_compile"]


def _require_compiler(stub: Stub) -> None:
    """Raise if the C++ compiler that inductor would call is not there."""
    if platform.system() == "Windows":
        default = "cl"
    elif platform.system() == "Darwin":
        default = "clang++"
    else:
        default = "g++"
    name = os.environ.get("CXX", default)
    if shutil.which(name) is None:
        raise StubBuildError(
            f"Compiling the stub {stub.name!r} needs a C++ compiler, and {name!r} is not on the PATH. Install it (for "
            f"example the package g++), or name another one in the environment variable CXX. A cache filled on a "
            f"machine with the same processor can be named in {CACHE_VARIABLE} instead."
        )


def main(arguments: list[str] | None = None) -> int:
    """Compile entries of the catalogue from the command line.

    Args:
        arguments: Arguments without the program name; those of the process if not given.

    Returns:
        The exit status: 0 if all are there, 1 if one failed.
    """
    parser = argparse.ArgumentParser(prog="python -m stubs.build", description="Compile stubs into the cache.")
    parser.add_argument("names", nargs="*", help="entries of the catalogue; all if none is named")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="compile N at a time (default 1)")
    parser.add_argument("--optimised", action="store_true", help="compile for speed; see stubs.build.compiled")
    options = parser.parse_args(arguments)
    names = options.names or list(CATALOGUE)
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. The catalogue has: {', '.join(CATALOGUE)}")
    quick = not options.optimised
    width = max(len(name) for name in names)

    def one(name: str) -> str:
        if folder_of(name, quick=quick).is_dir():
            return "cached"
        start = time.monotonic()
        compiled(name, quick=quick)
        return f"{time.monotonic() - start:.1f} s"

    failed = 0
    with ThreadPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        waiting = {pool.submit(one, name): name for name in names}
        for future in as_completed(waiting):
            try:
                outcome = future.result()
            except StubBuildError as error:
                failed += 1
                outcome = f"FAILED\n{error}"
            print(f"{waiting[future]:<{width}}  {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
