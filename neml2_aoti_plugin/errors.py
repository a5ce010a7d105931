"""The exceptions that the plugin raises.

Everything but non-convergence derives from `AOTIError`, which is a `RuntimeError` because that is what neml2's
own binding raises; each subclass is also the built-in exception that a Python user would expect for its cause.
"""

from __future__ import annotations

import sys


class AOTIError(RuntimeError):
    """A compiled model could not be loaded or called as asked."""

    def __str__(self) -> str:
        # KeyError and OSError, mixed in below, would print the message quoted or as an errno pair.
        return str(self.args[0]) if self.args else ""


class ArtifactError(AOTIError):
    """The artifact on disk is not usable: damaged, of an unknown form, or made for another machine."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """A file or folder of the artifact, or the device/dtype leaf that was asked for, is not there."""


class InputError(AOTIError, ValueError):
    """A tensor given to a compiled model has the wrong shape, or an argument the wrong value."""


class InputTypeError(InputError, TypeError):
    """An argument has the wrong type, or a tensor the wrong dtype or device."""


class UnknownNameError(InputError, KeyError):
    """A name is not among the model's inputs, outputs or promoted parameters, or a needed one is absent."""


class DerivativeNotCompiledError(AOTIError):
    """A derivative was asked for that the artifact holds no graph of."""


def _neml2_convergence_error() -> type[RuntimeError] | None:
    """The class that neml2 already uses, when neml2 was imported before the plugin was armed."""
    module = sys.modules.get("neml2.solvers._exceptions")
    return getattr(module, "ConvergenceError", None)


class _ConvergenceError(RuntimeError):
    """A nonlinear solve did not converge; a smaller step may.

    One that a compiled model raises carries `converged_mask` (bool) and `outcome` (an `Outcome` for each row), both of
    the caller's batch shape, and `rows` (int64, the flat indices of the rows that failed); with
    `NEML2_CAPTURE_SOLVE_FAILURE` set also `unknowns` (dict of the last iterates by unknown name).
    """


_ConvergenceError.__name__ = _ConvergenceError.__qualname__ = "ConvergenceError"

ConvergenceError: type[RuntimeError] = _neml2_convergence_error() or _ConvergenceError
