"""A process that loads and runs many damaged artifacts, and reports how each ended.

`main`, with the arguments metadata|archive ARTIFACT FOLDER SEED COUNT, copies the artifact into the folder, damages the
copy COUNT times, and prints one JSON object. Its status is other than 0 where something else than a clear error or
tensors of the declared shapes came out, or where a file was opened that is none of the artifact's business.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import Any

import neml2  # noqa: F401
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from attacks import archives, documents
from neml2_aoti_plugin import AOTIError, ConvergenceError, Model
from neml2_aoti_plugin._solve import machine_code

ROWS = 3


def watch(*allowed: str | Path) -> list[str]:
    """Note which files Python opens from now on outside of the folders that loading a model has to do with."""
    folders = [*allowed, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), tempfile.gettempdir(), *sys.path]
    roots = tuple(os.path.realpath(folder) for folder in folders if folder)
    outside: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(roots) and path not in ("/proc/cpuinfo", "/dev/null") and not path.endswith(".py"):
                outside.append(path)

    sys.addaudithook(hook)
    return outside


class Trial:
    """Loads and runs an artifact, and counts how that ended."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def __call__(self, what: str) -> None:
        self.ends["mutations"] += 1
        try:
            model = Model(self.artifact)
            self.ends["loads"] += 1
            outputs = model.forward(inputs_of(model))
            for name, variable in model.outputs.items():
                found, base = tuple(outputs[name].shape), variable.base_shape
                # The metadata does not have the site axes of outputs, which stand between.
                if found[:1] != (ROWS,) or found[len(found) - len(base) :] != base:
                    self.wrong.append(f"{what}: {name} has shape {found}, expected ({ROWS}, ..., {base})")
            self.ends["runs"] += 1
        except (AOTIError, ConvergenceError) as error:
            self.ends[type(error).__name__] += 1
            if len(str(error)) < 20:
                self.wrong.append(f"{what}: says only {str(error)!r}")
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-3:])
            self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]}\n{trace}")


def inputs_of(model: Model) -> dict[str, torch.Tensor]:
    """Inputs of a model, small numbers that are the same each time; refuses those that would take all memory."""
    if sum(v.size for v in model.inputs.values()) > 1 << 20:
        raise AOTIError("the model asks for inputs of more than a million entries")
    return {
        name: 1e-4 * torch.arange(1, ROWS * v.size + 1, dtype=model.dtype).reshape(ROWS, *v.natural_shape)
        for name, v in model.inputs.items()
    }


def damage_metadata(trial: Trial, number: int, count: int) -> None:
    """Run mutations of the metadata file."""
    file = trial.artifact / "metadata.json"
    everything = list(HealthCheck)

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=everything
    )
    @given(documents.mutations(json.loads(file.read_text())))
    def one(found: tuple[dict[str, Any], list[str]]) -> None:
        document, changes = found
        file.write_text(json.dumps(document), encoding="utf-8")
        trial("; ".join(changes))

    one()


def damage_archives(trial: Trial, number: int, count: int) -> None:
    """Run mutations of the packages."""
    packages = sorted(trial.artifact.rglob("*.pt2"))
    random_ = random.Random(number)
    for _ in range(count):
        file = random_.choice(packages)
        good, state = file.read_bytes(), random_.getstate()
        file.write_bytes(archives.mutated(good, random_))
        trial(f"{file.name} {hash(state)}")
        file.write_bytes(good)


def main() -> int:
    """Run the command line; see above."""
    kind, artifact, folder, number, count = sys.argv[1:]
    copy = Path(shutil.copytree(artifact, Path(folder) / Path(artifact).name))
    # What metadata may name beside the artifact, and must not reach.
    package = next(copy.rglob("*.pt2"))
    for place in (copy.parent, copy, copy / "cpu"):
        shutil.copy(package, place / "outside.pt2")
    # Machine code is read or written when the first model is loaded.
    escapes = watch(copy, machine_code.folder() or copy)
    trial = Trial(copy)
    (damage_metadata if kind == "metadata" else damage_archives)(trial, int(number), int(count))
    strays = [str(p) for p in Path(folder).rglob("*escape*")]
    print(json.dumps({"ends": trial.ends, "wrong": trial.wrong[:20], "escapes": escapes[:20], "strays": strays}))
    return 1 if trial.wrong or escapes or strays else 0
