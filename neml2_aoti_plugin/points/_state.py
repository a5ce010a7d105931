"""The state of integration points as a value: taken, given back, and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._files import draft
from .._tensor_files import Header, read_tensors, write_tensors
from ..errors import InputError, InputTypeError

FORMAT, KIND = "neml2-aoti-plugin points 1", "points 1"
WHAT = "a state of points (Points.save)"
# Before the names of values in a file, and of the names of their axes.
_VALUE, _AXES = "value/", "axes/"

# Of the values of a state by name, with the points.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PointsState:
    """The committed state of integration points.

    Args:
        values: by name, such as `stress~1`, `(n, *sub_batch, *base)`; symmetric tensors as the model takes them, in
            Mandel's notation and three dimensions.
        digest: of the artifact that it is a state of, `Model.digest`.
        n: number of points.
        axes: names of the axes of each value: `point`, then `site` and `component`, with numbers where there are
            several. Empty where nobody said.
    """

    values: dict[str, Tensor]
    digest: str
    n: int
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of the values as arrays of NumPy, by name."""
        return {name: value.cpu().numpy().copy() for name, value in self.values.items()}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, Any], digest: str, n: int) -> PointsState:
        """Make a state of arrays by name, such as `to_dict` gives; `Points.restore` looks whether they fit.

        Args:
            arrays: of NumPy or torch, in the form of `values`.
            digest: of the artifact, `Model.digest`.
            n: number of points.

        Raises:
            InputTypeError: a value is no array of numbers.
        """
        values = {}
        for name, array in arrays.items():
            try:
                values[name] = array.detach().clone() if isinstance(array, Tensor) else torch.tensor(np.asarray(array))
            except (TypeError, ValueError) as error:
                raise InputTypeError(f"the state's {name!r} is no array of numbers ({error}).") from None
        return cls(values, digest, n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file without pickle, NumPy's or of safetensors; one that was there is replaced whole.

        Args:
            path: of the file: `.safetensors`, or any other ending, as a rule `.npz`, for NumPy's.

        Raises:
            InputError: the file cannot be written, or a value is not finite, which could not be loaded again.
        """
        self.require_finite()
        notes = {"format": FORMAT, "digest": self.digest, "n": str(self.n)}
        notes |= {f"{_AXES}{name}": " ".join(axes) for name, axes in self.axes.items()}
        values = {f"{_VALUE}{name}": value.cpu() for name, value in self.values.items()}
        if Path(path).suffix == ".safetensors":
            return write_tensors(Path(path), KIND, values, notes)
        with draft(Path(path)) as scratch, scratch.open("wb") as file:
            np.savez(file, **{**notes, **values, "n": self.n})  # type: ignore[arg-type]

    def require_finite(self) -> None:
        """Refuse values that are no finite numbers."""
        for name, value in self.values.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise InputError(f"the state's {name!r} holds other than finite numbers ({value.dtype}).")


def axes_of(natural: tuple[int, ...], base: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the axes of a variable `(n, *natural)` whose last ones are its base shape."""
    names = ["point"]
    for name, count in (("site", len(natural) - len(base)), ("component", len(base))):
        names += [name] if count == 1 else [f"{name}_{k + 1}" for k in range(count)]
    return tuple(names)


def load(path: str | os.PathLike[str], require_fitting: Callable[[str, int, Shapes], None]) -> PointsState:
    """Read a state that `PointsState.save` wrote; what the file claims is compared before its values are read."""
    found: dict[str, Any] = {}

    def check(header: Header) -> Iterable[str]:
        form, digest, n = (header.notes.get(name) for name in ("format", "digest", "n"))
        if form != FORMAT or digest is None or n is None:
            raise InputError(
                f"{path}: is not {WHAT} (its format is {form!r}, expected {FORMAT!r} with a digest and n)."
            )
        axes = {key: tuple(text.split()) for key, text in header.notes.items() if key.startswith(_AXES)}
        found.update(digest=digest, n=int(n), axes={key.removeprefix(_AXES): names for key, names in axes.items()})
        values = [name for name in header.claims if name.startswith(_VALUE)]
        require_fitting(digest, int(n), {name.removeprefix(_VALUE): header.claims[name].shape for name in values})
        return values

    values = read_tensors(path, WHAT, check)
    return PointsState({name.removeprefix(_VALUE): value for name, value in values.items()}, **found)
