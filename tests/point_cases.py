"""Points over models of the catalogue, strains that drive them, and arrays of kinds that callers give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import references
from neml2_aoti_plugin import Model, Points
from neml2_aoti_plugin.notation import convert
from neml2_aoti_plugin.points import PointsResult, PointsState

Array = NDArray[np.float64]
N = 4
DIMENSIONS: tuple[Any, ...] = (3, "plane strain", "plane stress", "axisymmetric")
# Promoted parameters of the stub `calibration`.
YIELD, HARDENING = "residual.overstress.sy", "residual.hardening.K"


def tensors(size: float, n: int = N, dimension: Any = 3, seed: int = 2) -> Array:
    """Symmetric 3 x 3 tensors at random, of which a dimension leaves what is in the plane, and the hoop."""
    found = size * np.random.default_rng(seed).normal(size=(n, 3, 3))
    if dimension != 3:
        found[:, 2, :2], found[:, :2, 2] = 0.0, 0.0
    if dimension in ("plane strain", "plane stress"):
        found[:, 2, 2] = 0.0
    half: Array = 0.5 * (found + found.swapaxes(1, 2))
    return half


def written(tensors: Array, notation: Any, kind: str, dimension: Any = 3) -> Array:
    """Tensors `(n, 3, 3)` as a caller writes them, by hand."""
    if dimension != 3 and notation != "tensor":
        shear = {"mandel": np.sqrt(2.0), "voigt": 2.0 if kind == "strain" else 1.0}[notation]
        hoop = [tensors[:, 2, 2]] if dimension == "axisymmetric" else []
        return np.stack([tensors[:, 0, 0], tensors[:, 1, 1], *hoop, shear * tensors[:, 0, 1]], 1)
    if dimension in ("plane strain", "plane stress"):
        return tensors[:, :2, :2]
    return convert(tensors, "tensor", notation if notation != "voigt" else f"voigt {kind}")  # type: ignore[arg-type]


def strains(size: float = 5e-3, n: int = N, notation: Any = "mandel", dimension: Any = 3, seed: int = 2) -> Array:
    """Strains at random as a caller writes them."""
    return written(tensors(size, n, dimension, seed), notation, "strain", dimension)


def begun(model: str | Model = "viscoplasticity", n: int = N, **options: Any) -> Points:
    """Points at their start, where all is zero."""
    points = Points(references.case(model).model if isinstance(model, str) else model, n, **options)
    points.initial()
    return points


def stepped(**options: Any) -> Points:
    """Points with a state that is not zero."""
    points = begun(**options)
    form = {name: options[name] for name in ("notation", "dimension") if name in options}
    points.update(strain=strains(**form), t=1.0)
    points.commit()
    return points


def close(found: PointsResult, expected: PointsResult, rows: Any = slice(None)) -> None:
    """Require the numbers of an update to be those of another one, or of some of its points."""
    stress, tangent = expected.outputs["stress"][rows], expected.tangent["stress"]["strain"][rows]
    assert np.allclose(found.outputs["stress"], stress, rtol=1e-9, atol=1e-7)
    assert np.allclose(found.tangent["stress"]["strain"], tangent, rtol=1e-6, atol=1e-3)


def require_state(points: Points, state: PointsState) -> None:
    """Require points to be in a state, to the last bit."""
    found = points.state().values
    assert found.keys() == state.values.keys()
    assert all(torch.equal(found[name], value) for name, value in state.values.items())


@contextlib.contextmanager
def unchanged(points: Points) -> Iterator[None]:
    """Require points to be in the same state at the end."""
    before = points.state()
    yield
    require_state(points, before)


class Exported:
    """What is neither an array of NumPy nor of torch, and has DLPack; of a read-only array as JAX has them."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack__(self, **options: Any) -> Any:
        return self._value.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()


def read_only(value: Array) -> Array:
    value = value.copy()
    value.flags.writeable = False
    return value
