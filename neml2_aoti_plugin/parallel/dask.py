"""Rows over the workers of a `dask.distributed.Client` that the user brings."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import getitem
from typing import Any

import numpy as np

from ..errors import AOTIError, InputError, InputTypeError
from ..model import Model
from ..model._operations import operation as operation_named
from ._sources import Rows, checked
from ._tasks import OPERATIONS, evaluate_rows, loaded_model, unpickled

try:
    from distributed import KilledWorker, WorkerPlugin
except ImportError as error:
    raise AOTIError("Dask is not installed: pip install 'neml2-aoti-plugin[dask]'.") from error

# How often Dask may run a chunk again whose worker has died, beside what the scheduler allows by itself.
RETRIES = 2


class LoadModel(WorkerPlugin):
    """Has each worker load a model, once and before any work; raises where the artifact differs or is not there."""

    def __init__(self, recipe: bytes) -> None:
        self.recipe = recipe
        self.name = f"neml2-aoti-plugin-{hashlib.sha256(recipe).hexdigest()}"

    def setup(self, worker: Any) -> None:
        """Load the model."""
        unpickled(self.recipe)


@contextmanager
def cluster(client: Any, recipe: bytes) -> Iterator[tuple[Any, int]]:
    """The workers of a client, with a model loaded, as an executor of concurrent.futures; and how many threads."""
    register(client, recipe)
    executor = client.get_executor(pure=False, retries=RETRIES)
    try:
        yield executor, max(sum(client.nthreads().values()), 1)
    except KilledWorker as error:
        raise AOTIError(
            f"a chunk was given up by Dask, for its worker died at each attempt ({error}). It may have run out of "
            "memory: use smaller chunks (chunk=). What was done is kept, and the next call goes on from the journal."
        ) from error
    finally:
        executor.shutdown(wait=False)


def register(client: Any, recipe: bytes) -> None:
    """Have all workers load a model, those that come later too."""
    if not client.nthreads():
        raise AOTIError("the client has no workers. Start some, and wait for them with client.wait_for_workers(1).")
    client.register_plugin(LoadModel(recipe))


def map_blocks(
    model: Model | str | os.PathLike[str],
    inputs: Mapping[str, Any],
    *,
    client: Any = None,
    operation: str = "forward",
) -> dict[str, Any]:
    """Evaluate Dask arrays that are cut along rows, lazily.

    Args:
        model: a model, or the path of its artifact, which all workers must see. Its parameters and solver settings are
            those of now; what is set later does not reach the arrays.
        inputs: a `dask.array.Array` `(rows, *sub_batch, *base)` for each input, from files or from Zarr, all cut along
            the rows alike and along no other axis; or an array of NumPy without the row axis, for all rows.
        client: to have its workers load the model at once; each does at its first block if not given.
        operation: as for `map_rows`.

    Returns:
        A Dask array for each result, cut as the inputs are: outputs, NaN in rows that failed, and `@failed`.

    Raises:
        InputError: names, shapes, dtypes or cuts do not fit.
        ArtifactError: as for `map_rows`.
    """
    import dask.array as da

    operation_named(operation, OPERATIONS)
    loaded = loaded_model(model)
    along = {name: value for name, value in inputs.items() if isinstance(value, da.Array)}
    _require_fitting(loaded, inputs, along)
    common = {name: np.asarray(value) for name, value in inputs.items() if name not in along}
    recipe = pickle.dumps(loaded)
    if client is not None:
        register(client, recipe)
    first = {name: np.zeros((1, *value.shape[1:]), value.dtype) for name, value in along.items()}
    results = evaluate_rows(loaded, operation, {**first, **common}, 1)
    arguments: list[Any] = []
    for name, value in along.items():
        # Only the rows are cut: all other axes are contracted, and come whole.
        arguments += [value, ("rows", *(f"{name} {axis}" for axis in range(1, value.ndim)))]
    # Of a block all results are one value, so that it is evaluated once whichever are asked for.
    evaluate = partial(_block, recipe, operation, tuple(along), common)
    blocks = da.blockwise(evaluate, ("rows",), *arguments, concatenate=True, dtype=object, meta=np.empty(0, object))
    found = {}
    for name, array in results.items():
        axes = {f"axis {axis}": size for axis, size in enumerate(array.shape[1:])}
        meta = np.empty((0,) * array.ndim, array.dtype)
        found[name] = da.blockwise(
            getitem, ("rows", *axes), blocks, ("rows",), name, None, new_axes=axes, dtype=array.dtype, meta=meta
        )
    return found


def _block(recipe: bytes, operation: str, names: Sequence[str], common: Rows, *arrays: np.ndarray) -> Rows:
    rows = {**dict(zip(names, arrays, strict=True)), **common}
    return evaluate_rows(unpickled(recipe), operation, rows, len(arrays[0]))


def _require_fitting(model: Model, inputs: Mapping[str, Any], along: Mapping[str, Any]) -> None:
    checked(inputs, model, "inputs")
    if not along:
        raise InputTypeError("inputs hold no Dask array. Use Model for arrays in memory.")
    first = next(iter(along))
    for name, value in along.items():
        if value.chunks[0] != along[first].chunks[0]:
            raise InputError(
                f"inputs {first!r} and {name!r} are cut along the rows otherwise. Bring them together: "
                f"{name}.rechunk({{0: {first}.chunks[0]}})."
            )
        if any(len(cuts) > 1 for cuts in value.chunks[1:]):
            raise InputError(f"input {name!r} is cut along another axis than the rows. Use rechunk({{1: -1}}).")
