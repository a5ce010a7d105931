"""Points of viscoplasticity after a first step, and arrays of kinds that callers give for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import references
from neml2_aoti_plugin import Points

Array = NDArray[np.float64]
N = 4


def strains(size: float = 5e-3) -> Array:
    found: Array = size * np.random.default_rng(2).normal(size=(N, 6))
    return found


def begun(**options: Any) -> Points:
    """Points with a state that is not zero."""
    points = Points(references.case("viscoplasticity").model, N, **options)
    points.initial()
    given = strains()
    if options.get("notation") == "tensor":
        given = np.zeros((N, 3, 3))
        given[:, 0, 0] = 5e-3
    if options.get("dimension", 3) != 3:
        given = given[..., : (4 if options["dimension"] == "axisymmetric" else 3)]
    points.update(strain=given, t=1.0)
    points.commit()
    return points


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
