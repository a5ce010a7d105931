"""`neml2-aoti params`: the promoted parameters, read, set and handed on in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.table import Table
from rich.text import Text

from .._files import require_writable
from ..errors import InputError
from ..model._parameters import is_parameter_file
from .inspect import ParameterReport, shown_values
from .output import Report, table, written
from .target import Target


@dataclass(frozen=True)
class ParametersReport(Report):
    """The promoted parameters of an artifact."""

    artifact: str  # its path
    model: str  # name of the model
    parameters: tuple[ParameterReport, ...]  # with their values: the artifact's, those of a file, or those set
    changed: tuple[str, ...]  # names of those that differ from the artifact's
    written: str | None  # the file that was written; null if none was

    def render(self) -> Iterator[str | Table]:
        if not self.parameters:
            yield f"{self.model} has no promoted parameters. Promote some: neml2-compile ... -p NAME"
            return
        values = table("parameter", "shape", "value", "")
        for found in self.parameters:
            mark = "changed" if found.name in self.changed else ""
            values.add_row(found.name, str(list(found.shape)), shown_values(found, ".10g"), Text(mark, "yellow"))
        yield values
        yield from written(self.written)


def params(
    target: Target, file: Path | None, values: Mapping[str, float], out: Path | None, force: bool
) -> ParametersReport:
    """The promoted parameters: the artifact's or those of a file, with other values for some; written to a file."""
    if values and out is None:
        raise click.UsageError("--set changes nothing by itself. Give a file to write as well: --out FILE.safetensors")
    if out is not None:
        require_writable(out, [*target.files(), *([file] if file is not None and not force else [])])
        if not force and out.exists() and not is_parameter_file(out):
            raise InputError(
                f"{out}: is there, and holds no parameters. Give another name, or --force to write over it."
            )
    model = target.load()
    before = {name: value.detach().clone() for name, value in model.named_parameters().items()}
    if file is not None:
        model.load_parameters(file, same_artifact=False)
    for name, value in values.items():
        model.set_parameter(name, value)
    if out is not None:
        model.save_parameters(out)
    reports, changed = [], []
    for name, now in model.named_parameters().items():
        entries = tuple(now.detach().cpu().flatten().tolist())
        reports.append(ParameterReport(name, tuple(model.parameter_base_shapes[name]), tuple(now.shape), entries))
        if not torch.equal(now, before[name]):
            changed.append(name)
    path = None if out is None else str(out)
    return ParametersReport(str(target.artifact), target.model, tuple(reports), tuple(changed), path)
