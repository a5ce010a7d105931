"""Batches of rows: states of a stub's own load history, alike or spread in state and rate.

A pool of rows is made once per stub and kept, so that all peers and all runs see the same rows. For a heterogeneous
batch each row takes a random state of the history and a random factor between 1e-3 and 1e3: time is stretched by it
and rates are divided by it, so that the strain of the step stays what it was while its rate is spread over 6 decades.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import HETEROGENEOUS, HOMOGENEOUS

Tensors = dict[str, Tensor]

POOL_ROWS = 4096
DECADES = 6
SEED = 20261123
# Inputs that are rates; neml2's metadata do not tell.
RATES = ("stretching",)
# The first part of a history is elastic.
LEFT_OUT = 0.2


def taken(pool: Mapping[str, Tensor], rows: int) -> Tensors:
    """That many rows of a pool, over again from its start where it has fewer."""
    found = {}
    for name, value in pool.items():
        times = -(-rows // len(value))
        found[name] = value.repeat(times, *(1,) * (value.ndim - 1))[:rows].contiguous()
    return found


def make_pools(artifact: Path, stub: Path, driver: str) -> dict[str, Tensors]:
    """Inputs `(rows, ...)` of a compiled stub by kind of batch; all rows converge, also in the C++ runtime."""
    from neml2.aoti._aoti import Model as Native

    from neml2_aoti_plugin.model import Model

    history = states(stub, driver)
    size = len(next(iter(history.values())))
    middle = size // 2
    # With Newton's steps alone, so that the typical row is the same whatever else the plugin does.
    model = Model(artifact, solver={"chord_steps": False})
    pools = {
        HOMOGENEOUS: {name: value[middle : middle + 1].clone() for name, value in history.items()},
        HETEROGENEOUS: spread(history, POOL_ROWS),
    }
    for name, pool in pools.items():
        found = model.solve(pool)
        converged = found.converged
        if int(converged.sum()) < 0.9 * len(converged):
            raise RuntimeError(f"{artifact.name}: only {int(converged.sum())} of {len(converged)} rows converge")
        pools[name] = with_typical_first({n: x[converged] for n, x in pool.items()}, found.iterations[converged])
        Native(str(artifact)).forward(pools[name])  # raises where a row does not converge
    return pools


def converging(name: str, rows: int, *, quick: bool = True) -> tuple[Path, Tensors]:
    """A compiled stub's artifact, and that many rows of its history that differ in state and rate and converge."""
    from neml2_aoti_plugin.model import Model
    from stubs.build import compiled
    from stubs.catalogue import CATALOGUE

    stub, folder = CATALOGUE[name], compiled(name, quick=quick)
    pool = spread(states(folder / f"{stub.model}_aoti.i", stub.driver), POOL_ROWS)
    converged = Model(folder / stub.model).solve(pool).converged
    return folder / stub.model, taken({name: value[converged] for name, value in pool.items()}, rows)


def with_typical_first(pool: Tensors, updates: Tensor) -> Tensors:
    """Let a row with the median number of updates take the first place, for it is the batch of one row."""
    order = torch.arange(len(updates))
    typical = int((updates == updates.median()).nonzero()[0])
    order[0], order[typical] = typical, 0
    return {name: value[order].contiguous() for name, value in pool.items()}


def states(stub: Path, driver: str) -> Tensors:
    """Inputs `(rows, ...)` that a stub's driver gives to the model, after the first part of the history."""
    import neml2
    from neml2.factory import register_neml2_object

    from neml2_aoti_plugin._host.hit import AOTIModel

    register_neml2_object("AOTIModel")(AOTIModel)
    torch.set_default_dtype(torch.float64)
    run = neml2.load_input(stub).get_driver(driver)
    calls: list[tuple[Any, ...]] = []
    run.model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    run.run()
    parts: dict[str, list[Tensor]] = {name: [] for name in run.model.input_spec}
    for arguments in calls[int(LEFT_OUT * len(calls)) :]:
        typed = dict(zip(run.model.input_spec, arguments, strict=True))
        batch = torch.broadcast_shapes(*(v.data.shape[: v.data.ndim - len(v.BASE_SHAPE)] for v in typed.values()))
        for name, value in typed.items():
            base = tuple(value.BASE_SHAPE)
            parts[name].append(value.data.detach().expand(*batch, *base).reshape(-1, *base))
    return {name: torch.cat(found) for name, found in parts.items()}


def spread(history: Mapping[str, Tensor], rows: int) -> Tensors:
    """Random states of a history with rates over 6 decades; where there is no time, of random size and direction."""
    random = torch.Generator().manual_seed(SEED)
    size = len(next(iter(history.values())))
    which = torch.randint(size, (rows,), generator=random)
    found = {name: value[which] for name, value in history.items()}
    if "t" not in found:
        return {
            name: value.abs().max() * torch.randn(value.shape, generator=random, dtype=value.dtype)
            for name, value in found.items()
        }
    factor = 10.0 ** (DECADES * (torch.rand(rows, generator=random, dtype=found["t"].dtype) - 0.5))
    for name in found:
        if name.startswith("t~"):
            found[name] = found["t"] - (found["t"] - found[name]) * factor
        elif name in RATES:
            found[name] = found[name] / factor.unsqueeze(-1)
    return found
