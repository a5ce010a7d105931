"""The law of stubs/viscoplasticity.i with one backward Euler step, solved by radial return in numpy, with its tangent.

Written by hand for comparison with the compiled model; it has the methods of `Points` that programs call. Symmetric
tensors are in Mandel's notation inside. See J. C. Simo and T. J. R. Hughes, Computational Inelasticity (1998), ch. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

YOUNG, POISSON = 190_000.0, 0.3
YIELD, HARDENING, ETA, EXPONENT = 180.0, 1800.0, 60.0, 4.0
# neml2's YieldFunction has this factor, although its documentation leaves it out.
FACTOR = np.sqrt(2.0 / 3.0)
SHEAR, BULK = YOUNG / (2.0 * (1.0 + POISSON)), YOUNG / (3.0 * (1.0 - 2.0 * POISSON))

ONE = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
DEVIATORIC = np.eye(6) - np.outer(ONE, ONE) / 3.0
IN_PLANE = [0, 1, 5]
# What Mandel's strain is of an engineering shear, and a shear stress of Mandel's.
VOIGT = np.array([1.0, 1.0, np.sqrt(0.5)])


@dataclass
class Result:
    """What an update gives, as `PointsResult`."""

    outputs: dict[str, Array]
    tangent: dict[str, dict[str, Array]]
    converged: NDArray[np.bool_]
    step_factor: float = 2.0

    @property
    def failed(self) -> list[int]:
        return [int(k) for k in np.flatnonzero(~self.converged)]


def stress_and_tangent(increment: Array, dt: Array, stress: Array, p: Array) -> tuple[Array, Array, Array]:
    """One step from a state."""
    trial = stress @ DEVIATORIC + 2.0 * SHEAR * increment @ DEVIATORIC
    mean = ((stress + 3.0 * BULK * increment) @ ONE / 3.0)[:, None] * ONE
    norm = np.linalg.norm(trial, axis=1)
    mises = np.sqrt(1.5) * norm

    def over(dp: Array) -> Array:
        """Stress beyond what the rate of flow takes; it falls with dp."""
        rate = (dp / dt) ** (1.0 / EXPONENT)
        left: Array = mises - 3.0 * SHEAR * dp - YIELD - HARDENING * (p + dp) - ETA / FACTOR * rate
        return left

    flows = mises > YIELD + HARDENING * p
    low, high = np.zeros_like(mises), np.where(flows, (mises - YIELD) / (3.0 * SHEAR), 0.0)
    for _ in range(200):
        middle = 0.5 * (low + high)
        up = over(middle) > 0.0
        low, high = np.where(up, middle, low), np.where(up, high, middle)
    dp = np.where(flows, 0.5 * (low + high), 0.0)
    safe = np.where(norm > 0.0, norm, 1.0)
    normal = trial / safe[:, None]
    new = mean + trial - np.sqrt(6.0) * SHEAR * dp[:, None] * normal
    with np.errstate(divide="ignore"):
        viscous = ETA / (FACTOR * EXPONENT * dt) * (np.where(flows, dp / dt, 1.0)) ** (1.0 / EXPONENT - 1.0)
    a = np.where(flows, 3.0 * SHEAR + HARDENING + viscous, np.inf)
    outer = normal[:, :, None] * normal[:, None, :]
    elastic = BULK * np.outer(ONE, ONE) + 2.0 * SHEAR * DEVIATORIC
    turning = (np.sqrt(6.0) * SHEAR * dp * 2.0 * SHEAR / safe)[:, None, None]
    tangent = elastic - (6.0 * SHEAR**2 / a)[:, None, None] * outer - turning * (DEVIATORIC - outer)
    return new, p + dp, tangent


class RadialReturn:
    """Points with this law; in three dimensions in Mandel's notation, or in plane strain with engineering shears."""

    def __init__(self, n: int, dimension: Any = 3) -> None:
        self.n, self._plane = n, dimension == "plane strain"
        self.initial()

    def initial(self) -> None:
        n = self.n
        self._old = {"strain": np.zeros((n, 6)), "t": np.zeros(n), "stress": np.zeros((n, 6)), "p": np.zeros(n)}
        self._new: dict[str, Array] | None = None

    def update(self, *, strain: Array, t: float | Array) -> Result:
        whole = np.zeros((self.n, 6))
        whole[:, IN_PLANE if self._plane else slice(None)] = strain * VOIGT if self._plane else strain
        times = np.broadcast_to(np.asarray(t, dtype=float), (self.n,)).copy()
        old = self._old
        stress, p, tangent = stress_and_tangent(whole - old["strain"], times - old["t"], old["stress"], old["p"])
        self._new = {"strain": whole, "t": times, "stress": stress, "p": p}
        if self._plane:
            stress, tangent = stress[:, IN_PLANE] * VOIGT, tangent[:, IN_PLANE][:, :, IN_PLANE] * np.outer(VOIGT, VOIGT)
        outputs = {"stress": stress, "equivalent_plastic_strain": p}
        return Result(outputs, {"stress": {"strain": tangent}}, np.ones(self.n, dtype=bool))

    def commit(self) -> None:
        assert self._new is not None
        self._old, self._new = self._new, None

    def revert(self) -> None:
        self._new = None
