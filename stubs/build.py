"""Compile the stubs of the catalogue with neml2-compile, once, and keep them in a cache.

From Python: `compiled("elasticity")` returns the folder of a compiled stub. From a shell, in the repository root:
`python -m stubs.build [names...] [-j N]`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock

from .catalogue import CATALOGUE, Stub

CACHE_VARIABLE = "NEML2_AOTI_PLUGIN_STUB_CACHE"

# What a quick compile sets for inductor. None of it touches the numbers: the kernels, where the arithmetic is, are
# compiled with -O3 in any case. docs/performance.md is measured with optimised wrappers.
QUICK = {
    # The wrapper of a graph allocates buffers and calls kernels. Most of a graph's compile time is the optimisation
    # of torch's headers in it.
    "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",
    # No line tables for debuggers.
    "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",
    # No pool of worker processes, each importing torch, for graphs that have one or two kernels.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

# The first torch, by major and minor number, with which neml2-compile writes derivatives by parameters.
BY_PARAMETERS = (2, 12)

# The compile itself uses neml2 as it was published.
PLUGIN_OFF = {"NEML2_AOTI_PLUGIN": "0"}

# Runs neml2-compile with the given arguments; returns its exit status and what it printed.
Run = Callable[[list[str], dict[str, str]], tuple[int, str]]


class StubBuildError(RuntimeError):
    """A stub could not be compiled."""


class OlderTorchError(StubBuildError):
    """A stub cannot be compiled with a torch as old as this one."""


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


def compiled(name: str, *, quick: bool = True, run: Run | None = None) -> Path:
    """Compile an entry of the catalogue, or find it compiled in the cache.

    Args:
        name: Name of an entry of the catalogue.
        quick: Compile the graphs' wrappers without optimisation, which saves more than half of the compile time. The
            numbers are the same; the time between kernels is not, so give False to measure speed.
        run: How to run neml2-compile; by its console script if not given.

    Returns:
        The folder with the stub `<model>_aoti.i` and the artifact `<model>/` beside it.

    Raises:
        KeyError: The catalogue has no such entry.
        OlderTorchError: neml2-compile cannot compile it with this torch.
        StubBuildError: There is no C++ compiler, or neml2-compile failed.
    """
    stub = _entry(name)
    folder = folder_of(name, quick=quick)
    if folder.is_dir():
        return folder
    if stub.by_parameters and tuple(map(int, version("torch").split(".")[:2])) < BY_PARAMETERS:
        raise OlderTorchError(
            f"neml2-compile writes derivatives by parameters, which the stub {name!r} has, from torch "
            f"{'.'.join(map(str, BY_PARAMETERS))} on; here is {version('torch')}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process was first
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _compile(stub, scratch, quick, run or _by_console_script)
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


def _compile(stub: Stub, target: Path, quick: bool, run: Run) -> None:
    """Run neml2-compile for an entry into a folder."""
    _require_compiler(stub)
    what = ("--model", stub.model) if stub.appendix else ("--driver", stub.driver)
    arguments = [str(stub.path), *what, *stub.flags, "--output-dir", str(target), "-q"]
    status, output = run(arguments, _variables(quick))
    file = target / f"{stub.model}_aoti.i"
    if status != 0 or not file.is_file():
        tail = "\n".join(output.splitlines()[-40:])
        raise StubBuildError(
            f"neml2-compile failed on the stub {stub.name!r} with exit status {status}.\n"
            f"Command: {shlex.join(['neml2-compile', *arguments])}\nEnd of its output:\n{tail}"
        )
    if stub.appendix_path:
        with file.open("a", encoding="utf-8") as out:
            out.write("\n" + stub.appendix_path.read_text(encoding="utf-8"))


def _variables(quick: bool) -> dict[str, str]:
    """Return the environment variables that a compile sets."""
    return {**PLUGIN_OFF, **(QUICK if quick else {})}


def _by_console_script(arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Run neml2-compile in a process of its own."""
    command = [*_neml2_compile(), *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode, done.stdout + done.stderr


def _in_this_process(arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Run neml2-compile here, so that a next compile finds torch and inductor imported; see `_work`."""
    import torch
    from neml2.cli.aoti_compile import main as neml2_compile

    assert all(os.environ.get(name) == value for name, value in variables.items())
    torch._dynamo.reset()
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # operators without a C shim are no news here
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = neml2_compile(arguments)
        except (Exception, SystemExit):
            traceback.print_exc()
            status = 1
    return int(status or 0), printed.getvalue()


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
        The exit status: 0 if all are there or left out, 1 if one failed.
    """
    parser = argparse.ArgumentParser(prog="python -m stubs.build", description="Compile stubs into the cache.")
    parser.add_argument("names", nargs="*", help="entries of the catalogue; those of the default tests if none")
    parser.add_argument("--all", action="store_true", help="all entries")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="compile N at a time (default 1)")
    parser.add_argument("--optimised", action="store_true", help="compile for speed; see stubs.build.compiled")
    options = parser.parse_args(arguments)
    names = options.names or [name for name, stub in CATALOGUE.items() if options.all or not stub.wide]
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. The catalogue has: {', '.join(CATALOGUE)}")
    quick = not options.optimised
    width = max(len(name) for name in names)
    missing = []
    for name in names:
        if folder_of(name, quick=quick).is_dir():
            print(f"{name:<{width}}  cached")
        else:
            missing.append(name)
    if not missing:
        return 0

    failed = 0
    # Started afresh and not forked, because inductor reads the variables when it is imported.
    with ProcessPoolExecutor(max(1, options.jobs), get_context("spawn"), _set, (_variables(quick),)) as pool:
        waiting = {pool.submit(_work, name, quick): name for name in missing}
        for future in as_completed(waiting):
            try:
                outcome = f"{future.result():.1f} s"
            except OlderTorchError as error:
                outcome = f"left out: {error}"
            except StubBuildError as error:
                failed += 1
                outcome = f"FAILED\n{error}"
            print(f"{waiting[future]:<{width}}  {outcome}", flush=True)
    return 1 if failed else 0


def _set(variables: dict[str, str]) -> None:
    """Set environment variables in a worker process."""
    os.environ.update(variables)


def _work(name: str, quick: bool) -> float:
    """Compile an entry in a worker process that stays for more; return the seconds it took."""
    start = time.monotonic()
    compiled(name, quick=quick, run=_in_this_process)
    return time.monotonic() - start


if __name__ == "__main__":
    raise SystemExit(main())
