"""A model, or what one is loaded from: what every call that takes a model may be given."""

from __future__ import annotations

import os

from .._artifact.layout import absolute
from .._artifact.stub import is_input_file, model_in
from ..errors import InputTypeError
from ._model import Model


def as_model(given: object, device: str | None = None) -> Model:
    """Give a model, loaded if it is not yet.

    Args:
        given: a `Model`, or the path of an artifact or of its stub.
        device: see `Model`; of one that is loaded here.

    Raises:
        InputTypeError: it is none of these.
        InputError: see `Model`.
        ArtifactError: see `Model`.
    """
    if isinstance(given, Model):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise InputTypeError(
            f"model is a {type(given).__name__}, expected a Model or the path of an artifact or of its stub. Of a "
            "model that neml2.load_model gave, take the path that it was loaded from."
        )
    return Model(given, device)


def name_at(path: str | os.PathLike[str]) -> str:
    """The name of the model that a path leads to: as the stub has it, else that of the artifact's folder."""
    found = absolute(path)
    return model_in(found)[0] if is_input_file(found) else found.name
