"""Which models can be spread, and how one is told to processes that are to load it."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import InputError, InputTypeError
from ..model import Model
from ..model.recipe import Origin
from .folder import no_room
from .remote import ModelRef

# By model: what it was loaded from, the file of its recipe, and its key.
_refs: WeakKeyDictionary[Model, tuple[Origin, Path, str]] = WeakKeyDictionary()


def loaded_model(model: Model | str | os.PathLike[str], options: Mapping[str, Any]) -> Model:
    """A model that can be spread.

    Args:
        model: a model, or the path of its artifact.
        options: further arguments of `Model`, where a path is given.

    Raises:
        InputTypeError: it is neither, or there are options for a model that is loaded already.
        InputError: it cannot be spread.
        ArtifactError: as for `Model`.
    """
    if isinstance(model, Model):
        if options:
            raise InputTypeError(
                f"{', '.join(options)} given with a model that is loaded already. Give its path, or set them there."
            )
        return require_spreadable(model)
    if not isinstance(model, (str, os.PathLike)):
        raise InputTypeError(
            f"model is a {type(model).__name__}, expected a neml2_aoti_plugin.Model or the path of an artifact."
        )
    return require_spreadable(Model(model, **{"device": "cpu", **options}))


def require_spreadable(model: Model) -> Model:
    """Refuse a model that processes cannot share out.

    Raises:
        InputError: it is on a GPU, or its rows depend on each other.
    """
    if model.device.type != "cpu":
        raise InputError(
            f"{model.artifact} was loaded for {model.device}; processes share out the cores of a CPU. Load it with "
            "device='cpu', or use it as it is: a GPU takes all rows at once."
        )
    if model.mode != "rowwise":
        raise InputError(
            f"{model.artifact} was loaded with mode={model.mode!r}, in which the iterates of a row depend on the "
            "others. Only mode='rowwise' can be spread over processes."
        )
    return model


def recipe(model: Model) -> ModelRef:
    """A model as bytes: where its artifact is, which leaf, the options and the parameters.

    Raises:
        ArtifactError: the artifact is no longer what was loaded.
    """
    made = pickle.dumps(model)
    return ModelRef(hashlib.sha256(made).hexdigest(), made)


def model_ref(model: Model, folder: Path) -> ModelRef:
    """The same in a file of a folder that the workers can read; made once for a model as it was loaded.

    Raises:
        ArtifactError: the artifact is no longer what was loaded.
    """
    found = _refs.get(model)
    if found is not None and found[0] is model._origin and found[1].parent == folder and found[1].exists():
        return ModelRef(found[2], found[1])
    made = recipe(model)
    assert isinstance(made.recipe, bytes)
    file = folder / f"model-{made.key}"
    try:
        file.write_bytes(made.recipe)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise no_room(folder, error) from error
    _refs[model] = model._origin, file, made.key
    return ModelRef(made.key, file)
