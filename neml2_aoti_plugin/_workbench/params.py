"""Read and set the promoted parameters of an artifact, and hand them on in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .._files import require_writable
from ..errors import InputError
from ..model import Model
from ..model._parameters import is_parameter_file
from .contents import ParameterReport
from .target import Target


@dataclass(frozen=True)
class ParametersReport:
    """The promoted parameters of an artifact.

    Args:
        artifact: its path.
        model: name of the model.
        parameters: with their values: the artifact's, those of a file, or those set.
        changed: names of those that differ from the artifact's.
        written: the file that was written; null if none was.
    """

    artifact: str
    model: str
    parameters: tuple[ParameterReport, ...]
    changed: tuple[str, ...]
    written: str | None


def parameters(
    target: Target,
    given: Mapping[str, float],
    file: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    force: bool = False,
) -> ParametersReport:
    """Tell an artifact's parameters, with other values for some, and write them to a file if asked for.

    Args:
        target: the artifact; it is not changed.
        given: values by name, for all entries of a parameter.
        file: of parameters to begin with; it may be one of another artifact with the same parameters.
        out: file to write.
        device: of the leaf.
        dtype: of the leaf.
        force: whether `out` may be written over whatever it is, `file` too; the artifact and its stub never are.

    Raises:
        InputError: the artifact has no such parameter, or a file cannot be read or written.
        ArtifactError: the artifact cannot run here.
    """
    if out is not None:
        _require_free(out, [*target.files(device, dtype), *([file] if file is not None and not force else [])], force)
    model = target.load(device, dtype)
    before = {name: value.detach().clone() for name, value in model.named_parameters().items()}
    if file is not None:
        model.load_parameters(file, same_artifact=False)
    for name, value in given.items():
        model.set_parameter(name, value)
    if out is not None:
        model.save_parameters(out)
    now = model.named_parameters()
    changed = tuple(n for n, v in now.items() if v.shape != before[n].shape or not bool((v == before[n]).all()))
    return ParametersReport(
        artifact=str(target.artifact),
        model=target.model,
        parameters=reports(model),
        changed=changed,
        written=None if out is None else str(out),
    )


def _require_free(out: Path, inputs: list[Path], force: bool) -> None:
    """Refuse to write over what the command reads, and, unless a person means it, over another file."""
    require_writable(out, inputs)
    if not force and out.exists() and not is_parameter_file(out):
        raise InputError(f"{out}: is there, and holds no parameters. Give another name, or --force to write over it.")


def reports(model: Model) -> tuple[ParameterReport, ...]:
    """The parameters of a model as they are now."""
    return tuple(
        ParameterReport(
            name,
            tuple(model.parameter_base_shapes[name]),
            tuple(value.shape),
            tuple(float(entry) for entry in value.detach().cpu().flatten()),
        )
        for name, value in model.named_parameters().items()
    )
