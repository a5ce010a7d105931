"""The constitutive law of stubs/viscoplasticity.i once more, in numpy, integrated by scipy.

Nothing here uses neml2 or torch. Symmetric tensors are six numbers, (xx, yy, zz, sqrt2 yz, sqrt2 xz, sqrt2 xy), so
that the product of two of them is the plain dot product. Stress in MPa, time in s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

Array = NDArray[np.float64]

# neml2's YieldFunction measures by the norm of the deviator rather than by the von Mises stress.
SCALE = np.sqrt(2 / 3)
IDENTITY = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def deviator(tensor: Array) -> Array:
    """Take the mean of the first three entries off them."""
    rest: Array = tensor - tensor[:3].mean() * IDENTITY
    return rest


@dataclass(frozen=True)
class Viscoplasticity:
    """Perzyna's viscoplasticity with isotropic hardening; the constants are those of the stub."""

    young: float = 190_000.0
    poisson: float = 0.3
    yield_stress: float = 180.0
    hardening: Callable[[float], float] = lambda plastic: 1800.0 * plastic
    viscosity: float = 60.0
    exponent: float = 4.0

    def rates(self, stress: Array, plastic: float, strain_rate: Array) -> tuple[Array, float]:
        """Give the rates of stress and equivalent plastic strain."""
        shear, bulk = self.young / (2 * (1 + self.poisson)), self.young / (3 * (1 - 2 * self.poisson))
        s = deviator(stress)
        mises = np.sqrt(1.5 * (s @ s))
        overstress = max(SCALE * (mises - self.yield_stress - self.hardening(plastic)), 0.0)
        flow = (overstress / self.viscosity) ** self.exponent
        normal = 1.5 * s / mises if mises > 0.0 else s
        elastic_rate = strain_rate - flow * normal
        return 2 * shear * deviator(elastic_rate) + bulk * elastic_rate[:3].sum() * IDENTITY, flow

    def integrate(self, times: Array, strain_rate: Array) -> Array:
        """Integrate from a stress-free state at a constant strain rate, to about ten digits.

        Args:
            times: Where the solution is wanted, ascending from the start.
            strain_rate: Six numbers.

        Returns:
            One row per time: six stresses and the equivalent plastic strain.
        """

        def derivative(_: float, state: Array) -> Array:
            stress_rate, flow = self.rates(state[:6], state[6], strain_rate)
            return np.append(stress_rate, flow)

        start, end = float(times[0]), float(times[-1])
        found = solve_ivp(derivative, (start, end), np.zeros(7), "Radau", times, rtol=1e-9, atol=1e-9)
        if not found.success:
            raise RuntimeError(f"scipy could not integrate the law: {found.message}")
        solution: Array = found.y.T
        return solution
