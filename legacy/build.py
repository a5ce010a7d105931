"""Build the artifacts: `python -m legacy.build`, or `artifact(release, scenario)` from a test.

Everything goes to `$NEML2_AOTI_PLUGIN_LEGACY_CACHE`, else to `~/.cache/neml2-aoti-plugin/legacy`:

    py3.11/env                              one virtual environment with torch, for every release
    py3.11/releases/<release>               neml2, nmhit and pyzag of that release, and nothing else
    artifacts/<release>/<scenario>/         what that release's neml2-compile wrote, stub and all
    artifacts/<release>/<scenario>.json     what it was made from, how, and how long it took
    inductor/<n>                            torch's own compile cache, one folder for each compile at a time
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .catalogue import (
    INPUTS,
    NMHIT,
    RELEASES,
    SCENARIOS,
    TORCH,
    Release,
    Scenario,
    arguments,
    pairs,
    release_named,
    scenario_named,
)

_PYTHON = f"py{sys.version_info.major}.{sys.version_info.minor}"
_COMPILE = "import sys; from neml2.cli.aoti_compile import main; sys.exit(main())"
_TAIL = 40
_LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def artifact(release: str, scenario: str) -> Path:
    """The folder that a release's `neml2-compile` wrote, built first if it is missing or out of date."""
    made_by, made_from = release_named(release), scenario_named(scenario)
    if release not in made_from.releases:
        able = ", ".join(made_from.releases)
        raise ValueError(f"neml2 {release} does not build {scenario!r}: {made_from.unable}; take one of {able}")
    folder = cache() / "artifacts" / release / scenario
    record = folder.with_suffix(".json")
    key = fingerprint(made_by, made_from)
    with _lock(f"{release}-{scenario}"):
        if not (folder.is_dir() and _read(record).get("key") == key):
            _build(made_by, made_from, folder, record, key)
    return folder


def stub(release: str, scenario: str) -> Path:
    """The HIT stub of one artifact, as that release wrote it, built first if need be."""
    return artifact(release, scenario) / f"{scenario_named(scenario).model}_aoti.i"


def metadata(release: str, scenario: str) -> Path:
    """The metadata of one artifact, where that release puts it, built first if need be."""
    model = scenario_named(scenario).model
    schema = release_named(release).schema
    folder = artifact(release, scenario)
    if schema < 7:
        return folder / f"{model}_meta.json"
    if schema < 12:
        return folder / model / "cpu" / f"{model}_meta.json"
    return folder / model / "metadata.json"


def cache() -> Path:
    """The folder that holds everything built here."""
    given = os.environ.get("NEML2_AOTI_PLUGIN_LEGACY_CACHE")
    return Path(given).expanduser().resolve() if given else Path.home() / ".cache" / "neml2-aoti-plugin" / "legacy"


def fingerprint(release: Release, scenario: Scenario) -> str:
    """A digest of what an artifact depends on: torch compiles for the processor that it finds."""
    parts = [
        (INPUTS / scenario.input).read_text(),
        arguments(scenario, release, Path("output"))[1:],
        [release.version, release.pyzag, NMHIT, TORCH],
        [platform.system(), platform.machine(), _processor()],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def environment() -> Path:
    """The Python of the one virtual environment, made first if need be.

    torch is installed first and alone: an index that offers a build without CUDA then decides freely.
    """
    home = cache() / _PYTHON / "env"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = home / "ready"
    with _lock(f"{_PYTHON}-env"):
        if not ready.is_file() or ready.read_text() != TORCH:
            print(f"environment with torch {TORCH} ...", flush=True)
            shutil.rmtree(home, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(home)], "making the virtual environment")
            for package in (f"torch=={TORCH}", "numpy"):
                _run([str(python), "-m", "pip", "install", "-q", package], f"installing {package}")
            ready.write_text(TORCH)
    return python


def installed(release: Release) -> Path:
    """The folder to put on PYTHONPATH for one release, installed first; torch and numpy come from the environment."""
    python = environment()
    packages = [f"neml2=={release.version}", f"nmhit=={NMHIT}", f"pyzag=={release.pyzag}"]
    target = cache() / _PYTHON / "releases" / release.version
    ready = target / "ready"
    with _lock(f"{_PYTHON}-{release.version}"):
        if not ready.is_file() or ready.read_text() != " ".join(packages):
            shutil.rmtree(target, ignore_errors=True)
            pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
            _run([*pip, *packages], f"installing neml2 {release.version}")
            ready.write_text(" ".join(packages))
    return target


def table() -> str:
    """What stands in the cache, as a Markdown table of graphs and seconds by scenario and release."""
    lines = ["| scenario | " + " | ".join(RELEASES) + " |", "|---" * (len(RELEASES) + 1) + "|"]
    for scenario in SCENARIOS.values():
        cells = []
        for release in RELEASES.values():
            version = release.version
            made = _read(cache() / "artifacts" / version / f"{scenario.name}.json")
            stands = made.get("key") == fingerprint(release, scenario)
            shown = f"{made['graphs']} in {made['seconds']:.0f} s" if stands else "not built"
            cells.append(shown if version in scenario.releases else "-")
        lines.append(f"| `{scenario.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Build what is asked for; 0 if everything that can be built stands in the cache, else 1."""
    parser = argparse.ArgumentParser(prog="python -m legacy.build", description=__doc__.split("\n")[0])
    parser.add_argument("--releases", nargs="+", default=list(RELEASES), metavar="VERSION", help="default: all")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), metavar="NAME", help="default: all")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="compiles at a time (default 1)")
    parser.add_argument("--table", action="store_true", help="build nothing; print what stands in the cache")
    options = parser.parse_args(argv)
    if options.table:
        print(table())
        return 0

    try:
        wanted = pairs(options.releases, options.scenarios)
    except ValueError as error:
        parser.error(str(error))
    start = time.monotonic()
    failed = 0
    for version in dict.fromkeys(version for version, _ in wanted):
        installed(release_named(version))
    with ThreadPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        running = {pool.submit(artifact, *pair): pair for pair in wanted}
        for future in as_completed(running):
            problem = future.exception()
            if problem is not None:
                failed += 1
                print(f"{' '.join(running[future])}: FAILED\n{problem}", file=sys.stderr, flush=True)
    print(f"{len(wanted) - failed} of {len(wanted)} artifacts in {cache()}, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def _build(release: Release, scenario: Scenario, folder: Path, record: Path, key: str) -> None:
    """Compile one artifact in a temporary folder beside its place, then move it there.

    A 3.0.6 stub holds the absolute path of the folder it was written in, and so goes on pointing to the temporary one.
    """
    python, target = environment(), installed(release)
    folder.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    for left in folder.parent.glob(f".{scenario.name}-*"):  # of a compile that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{scenario.name}-", dir=folder.parent))
    start = time.monotonic()
    try:
        output = work / scenario.name
        command = [str(python), "-c", _COMPILE, *arguments(scenario, release, output)]
        with _inductor() as compile_cache:
            _run(
                command, f"neml2 {release.version} compiling {scenario.name!r}", work, _variables(target, compile_cache)
            )
        shutil.rmtree(folder, ignore_errors=True)
        output.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    made: dict[str, Any] = {
        "key": key,
        "release": release.version,
        "schema": release.schema,
        "scenario": scenario.name,
        "torch": TORCH,
        "arguments": arguments(scenario, release, folder),
        "graphs": sum(1 for _ in folder.rglob("*.pt2")),
        "seconds": round(time.monotonic() - start, 1),
    }
    record.write_text(json.dumps(made, indent=2) + "\n")
    print(f"{release.version} {scenario.name}: {made['graphs']} graphs, {made['seconds']} s", flush=True)


def _variables(target: Path, compile_cache: Path) -> dict[str, str]:
    """The environment of a compile: the caller's, without what would change the result, with the release first."""
    dropped = ("PYTHON", "TORCH", "AOT_INDUCTOR", "AOTINDUCTOR", "NEML2")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "PYTHONPATH": str(target),
        "PYTHONNOUSERSITE": "1",
        "NEML2_AOTI_PLUGIN": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(compile_cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Of the two C++ files of a graph, the wrapper takes most of the time and has no arithmetic in it.
        "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",
        "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",
    }


@contextmanager
def _inductor() -> Iterator[Path]:
    """A compile cache of torch's for one compile, kept for the next one.

    torch tries the processor's vector instructions out once per cache, which costs as much as a graph. The graphs
    themselves are dropped: they are large and never asked for again.
    """
    home = cache() / "inductor"
    number = 0
    while True:
        with _lock(f"inductor-{number}", wait=False) as held:
            if held:
                folder = home / str(number)
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    yield folder
                finally:
                    for graph in folder.iterdir():
                        if len(graph.name) > len("locks"):  # a graph's folder is named by a digest, others are short
                            shutil.rmtree(graph, ignore_errors=True)
                return
        number += 1


@contextmanager
def _lock(name: str, wait: bool = True) -> Iterator[bool]:
    """Keep other threads out, and other processes where filelock is installed; say whether the lock was got."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        held = _LOCKS[name].acquire(blocking=wait)
        try:
            yield held
        finally:
            if held:
                _LOCKS[name].release()
        return
    folder = cache() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _run(
    command: Sequence[str], doing: str, folder: Path | None = None, variables: dict[str, str] | None = None
) -> None:
    """Run a command in a process of its own; RuntimeError with the tail of its output if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL:])
        raise RuntimeError(f"{doing} failed with exit status {done.returncode}; its output ends with\n{tail}")


def _read(record: Path) -> dict[str, Any]:
    """The record of an artifact, empty where there is none."""
    try:
        made = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def _processor() -> str:
    """The vector instructions of this processor, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((" ".join(sorted(line.split())) for line in lines if line.startswith(("flags", "Features"))), "")


if __name__ == "__main__":
    sys.exit(main())
