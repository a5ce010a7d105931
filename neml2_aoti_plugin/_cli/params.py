"""`neml2-aoti params`: the promoted parameters, read, set and handed on in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from .inspect import ParameterReport, shown_values
from .options import FILE, assignments, command, target_arguments
from .output import Report, table

if TYPE_CHECKING:
    from rich.table import Table

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
        """The parameters."""
        from rich.text import Text

        if not self.parameters:
            yield f"{self.model} has no promoted parameters. Promote some: neml2-compile ... -p NAME"
            return
        values = table("parameter", "shape", "value", "")
        for found in self.parameters:
            mark = "changed" if found.name in self.changed else ""
            values.add_row(found.name, str(list(found.shape)), shown_values(found, ".10g"), Text(mark, "yellow"))
        yield values
        if self.written is not None:
            yield f"written: {self.written}"


@command("""\
  neml2-aoti params aoti/promoted
  neml2-aoti params aoti/promoted --set promoted.E=80000 --out soft.safetensors
  neml2-aoti params aoti/promoted --from soft.safetensors
  python -c "from neml2.aoti import Model; Model('aoti/promoted', parameters='soft.safetensors')"
""")
@click.option("--from", "file", type=FILE, help="Begin with the values in this file instead of the artifact's.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="Give a parameter another value.")
@click.option("--out", type=FILE, help="Write the values to this file (.safetensors).")
@click.option("--force", is_flag=True, help="Write over --out, whatever file it is.")
@target_arguments()
def params(
    target: Target,
    file: Path | None,
    given: tuple[str, ...],
    out: Path | None,
    force: bool,
) -> ParametersReport:
    """Show the promoted parameters, and write values to a file that `Model(..., parameters=FILE)` takes.

    The artifact itself is never changed. A file is for one artifact, by the SHA-256 of its metadata: --from also takes
    that of another artifact with the same parameters, and --out writes it for this one. A file that is there is
    replaced if it holds parameters and is not that of --from; with --force in any case.
    """
    values = assignments(given, "--set")
    if given and out is None:
        raise click.UsageError("--set changes nothing by itself. Give a file to write as well: --out FILE.safetensors")
    if out is not None:
        _require_free(out, [*target.files(), *([file] if file is not None and not force else [])], force)
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
        entries = tuple(float(entry) for entry in now.detach().cpu().flatten())
        reports.append(ParameterReport(name, tuple(model.parameter_base_shapes[name]), tuple(now.shape), entries))
        if now.shape != before[name].shape or not bool((now == before[name]).all()):
            changed.append(name)
    written = None if out is None else str(out)
    return ParametersReport(str(target.artifact), target.model, tuple(reports), tuple(changed), written)


def _require_free(out: Path, inputs: list[Path], force: bool) -> None:
    """Refuse to write over what the command reads, and, unless a person means it, over another file."""
    from .._files import require_writable
    from ..model._parameters import is_parameter_file

    require_writable(out, inputs)
    if not force and out.exists() and not is_parameter_file(out):
        raise InputError(f"{out}: is there, and holds no parameters. Give another name, or --force to write over it.")
