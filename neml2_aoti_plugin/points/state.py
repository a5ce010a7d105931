"""The state of integration points as a value: taken, given back, and kept in a file."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, ArtifactNotFoundError, InputError

FORMAT = "neml2-aoti-plugin points 1"


@dataclass(frozen=True)
class PointsState:
    """The committed state of integration points.

    Args:
        values: by name, such as `stress~1`, `(n, *sub_batch, *base)`; symmetric tensors as the model takes them, in
            Mandel's notation and three dimensions.
        digest: of the artifact that it is a state of, `Model.digest`.
        n: number of points.
    """

    values: dict[str, Tensor]
    digest: str
    n: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file that NumPy's `load` reads without pickle; a file that was there is replaced whole.

        Args:
            path: of the file; `.npz` is the usual ending.
        """
        path = Path(path)
        arrays = {f"value/{name}": value.cpu().numpy() for name, value in self.values.items()}
        # Beside the file, so that it can take its place as a whole.
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                np.savez(file, format=FORMAT, digest=self.digest, n=self.n, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def load(path: str | os.PathLike[str]) -> PointsState:
    """Read a state that `PointsState.save` wrote.

    Args:
        path: of the file.

    Raises:
        ArtifactNotFoundError: there is no such file.
        ArtifactError: it is not such a file, or damaged.
    """
    path = Path(path)
    try:
        # NumPy leaves a file open that it opened itself and that is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            if str(found["format"]) != FORMAT:
                raise ValueError(f"its format is {str(found['format'])!r}")
            values = {
                name.removeprefix("value/"): torch.from_numpy(found[name])
                for name in found.files
                if name.startswith("value/")
            }
            return PointsState(values, str(found["digest"]), int(found["n"]))
    except FileNotFoundError:
        raise ArtifactNotFoundError(f"{path} is not there; Points.save(path) writes such a file.") from None
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"{path} is not a state of points ({error}), which Points.save(path) writes ({FORMAT!r})."
        ) from error


def require_same(state: PointsState, digest: str, n: int, shapes: dict[str, tuple[int, ...]], *, other: bool) -> None:
    """Refuse a state that is not one of these points.

    Args:
        state: that is to be restored.
        digest: of the model.
        n: number of points.
        shapes: of the kept values at one point, by name.
        other: whether the state may be of another artifact with the same variables.

    Raises:
        InputError: it is another artifact's, of another number of points, or lacks a value.
    """
    if state.n != n:
        raise InputError(f"the state is one of {state.n} points, expected {n}.")
    absent = [name for name in shapes if name not in state.values]
    unknown = [name for name in state.values if name not in shapes]
    if absent or unknown:
        raise InputError(
            f"the state is not one of this model: missing {absent}, unknown {unknown}; it needs {', '.join(shapes)}."
        )
    for name, shape in shapes.items():
        if tuple(state.values[name].shape) != (n, *shape):
            raise InputError(
                f"the state's {name!r} has shape {tuple(state.values[name].shape)}, expected {(n, *shape)}."
            )
    if state.digest != digest and not other:
        raise InputError(
            f"the state is one of another artifact (digest {state.digest[:12]}..., here {digest[:12]}...). If it was "
            "compiled anew from the same model, pass other_artifact=True."
        )
