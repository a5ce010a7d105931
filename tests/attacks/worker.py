"""A process that loads and runs many damaged artifacts, and reports how each ended.

`python -m attacks.worker metadata|archive ARTIFACT FOLDER SEED COUNT` copies the artifact into the folder, damages the
copy COUNT times, and prints one JSON object. It ends with a status other than 0 where something else than a clear error
or tensors of the declared shapes came out, or where a file was opened that is none of the artifact's business.
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


class Watch:
    """Notes which files Python opens outside of the folders that loading a model has to do with."""

    def __init__(self, *allowed: Path) -> None:
        roots = [
            *map(str, allowed),
            sys.prefix,
            sys.base_prefix,
            *sysconfig.get_paths().values(),
            tempfile.gettempdir(),
        ]
        self._roots = tuple(os.path.realpath(root) for root in [*roots, *(p for p in sys.path if p)])
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(self._roots) and path not in ("/proc/cpuinfo", "/dev/null"):
            self.outside.append(path)


class Trial:
    """Loads and runs an artifact, and counts how that ended."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def __call__(self, what: str) -> None:
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
            self.ends["other"] += 1
            trace = "".join(traceback.format_exception(error)[-3:])
            self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]}\n{trace}")


def inputs_of(model: Model) -> dict[str, torch.Tensor]:
    """Inputs of a model, small numbers that are the same each time; refuses those that would take all memory."""
    sizes = [v.size for v in model.inputs.values()]
    if sum(sizes) > 1 << 20:
        raise AOTIError("the model asks for inputs of more than a million entries")
    return {
        name: 1e-4 * torch.arange(1, ROWS * v.size + 1, dtype=model.dtype).reshape(ROWS, *v.natural_shape)
        for name, v in model.inputs.items()
    }


def damage_metadata(artifact: Path, number: int, count: int) -> Trial:
    """Run mutations of the metadata file."""
    file = artifact / "metadata.json"
    original = json.loads(file.read_text())
    trial = Trial(artifact)
    done = 0

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(documents.mutations(original))
    def one(found: tuple[dict[str, Any], list[str]]) -> None:
        nonlocal done
        document, changes = found
        file.write_text(json.dumps(document), encoding="utf-8")
        trial("; ".join(changes))
        done += 1

    one()
    trial.ends["mutations"] = done
    return trial


def damage_archives(artifact: Path, number: int, count: int) -> Trial:
    """Run mutations of the packages."""
    packages = sorted(artifact.rglob("*.pt2"))
    good = {file: file.read_bytes() for file in packages}
    trial = Trial(artifact)
    random_ = random.Random(number)
    for _ in range(count):
        file = random_.choice(packages)
        state = random_.getstate()
        file.write_bytes(archives.mutated(good[file], random_))
        trial(f"{file.name} {hash(state)}")
        file.write_bytes(good[file])
        trial.ends["mutations"] += 1
    return trial


def main() -> int:
    """Run the command line; see above."""
    kind, artifact, folder, number, count = sys.argv[1:]
    copy = Path(shutil.copytree(artifact, Path(folder) / Path(artifact).name))
    # What metadata may name beside the artifact, and must not reach.
    package = next(copy.rglob("*.pt2"))
    for place in (copy.parent, copy, copy / "cpu"):
        shutil.copy(package, place / "outside.pt2")
    # Machine code is read or written when the first model is loaded.
    watch = Watch(copy, *filter(None, [machine_code.folder()]))
    run = damage_metadata if kind == "metadata" else damage_archives
    trial = run(copy, int(number), int(count))
    escapes = [p for p in watch.outside if not p.endswith(".py")]
    strays = [str(p) for p in Path(folder).rglob("*escape*")]
    print(json.dumps({"ends": trial.ends, "wrong": trial.wrong[:20], "escapes": escapes[:20], "strays": strays}))
    return 1 if trial.wrong or escapes or strays else 0


if __name__ == "__main__":
    sys.exit(main())
