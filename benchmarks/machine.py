"""What the measurements were made on: machine, versions, sources."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "neml2_aoti_plugin"
# What the measuring processes import.
IMPORTED = (PACKAGE, "benchmarks", "stubs")


def description() -> dict[str, str]:
    """Processor, caches, memory and system, as far as Linux tells."""
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "")
    return {
        "processor": cpu.partition(":")[2].strip() or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "caches": ", ".join(_caches()),
        "memory": f"{int(memory.split()[1]) / 2**20:.0f} GiB" if memory else "",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _caches() -> list[str]:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return found


def load() -> float | None:
    """Processes that wait for a core or have one, on average over the last minute."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def snapshot(folder: Path) -> Path:
    """Copy what is imported, so that edits during a run do not get into it; gives the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in IMPORTED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def sources(folder: Path) -> dict[str, str]:
    """The commit, and a hash of the plugin's sources in a folder."""
    digest = hashlib.sha256()
    for file in sorted((folder / PACKAGE).rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return {"commit": _git("rev-parse", "--short", "HEAD"), "sources": digest.hexdigest()[:12]}


def changed() -> bool:
    """Whether the plugin's sources are not as they were committed."""
    return bool(_git("status", "--porcelain", "--", PACKAGE))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def parallel_graphs(artifact: Path) -> dict[str, Any]:
    """Count the graphs of an artifact, and those whose kernels use more than one thread."""
    packages = sorted(artifact.rglob("*.pt2"))
    parallel = 0
    for package in packages:
        with zipfile.ZipFile(package) as archive:
            names = [name for name in archive.namelist() if name.endswith(".cpp")]
            parallel += any(b"#pragma omp parallel" in archive.read(name) for name in names)
    return {"graphs": len(packages), "parallel": parallel}


def available_bytes() -> float:
    """Memory that can be had without swapping; unlimited where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def be_killed_first() -> None:
    """Where memory runs out, this process is the one to go."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        return
