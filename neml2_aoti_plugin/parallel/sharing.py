"""The worker processes that all compiled models of neml2 input files in this process have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import count

if TYPE_CHECKING:
    from ..model import Model
    from .pool import Pool


def workers_for(model: Model, given: int | None) -> int:
    """How many processes are to share the rows of a model; 1 for this process alone.

    Args:
        model: that was loaded.
        given: the number that was asked for; what the environment says if None.

    Raises:
        InputError: there is no such number, or the model's rows cannot be shared out.
        AOTIError: joblib is not installed.
    """
    wanted = count.require_workers(given) if given is not None else count.from_environment() or 1
    if wanted == 1 or (given is None and model.device.type != "cpu"):
        return 1
    from .recipes import require_spreadable

    count.require_joblib()
    require_spreadable(model)
    return wanted


def pool_over(model: Model, workers: int) -> Pool:
    """The pool of a model; processes are started when it first has a batch that is worth it.

    Args:
        model: that was loaded.
        workers: number of processes.
    """
    from .pool import Pool
    from .workers import shared

    return Pool.over(model, shared(workers))
