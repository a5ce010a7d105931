"""`neml2-aoti inspect`: what is in an artifact, as a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .output import device_options, json_option, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from .._workbench.contents import (
        ArtifactReport,
        FileReport,
        ParameterReport,
        SegmentReport,
        VariableReport,
    )

EPILOG = """\b
Examples:
  neml2-aoti inspect aoti/elasticity
  neml2-aoti inspect aoti/elasticity_aoti.i elasticity
  neml2-aoti inspect aoti/elasticity --json
"""

# More values of a parameter than this are cut.
VALUES = 6


@click.command(epilog=EPILOG, short_help="What is in a compiled model, as a tree.")
@click.argument("target", metavar="ARTIFACT|STUB")
@click.argument("model", required=False)
@device_options
@json_option
def command(target: str, model: str | None, device: str | None, dtype: str | None, as_json: bool) -> int:
    """Tell what is in a compiled model: leaves, inputs, outputs, parameters, derivatives, segments, files."""
    from .._workbench.describe import describe
    from .._workbench.target import find_target

    return show("inspect", describe(find_target(target, model), device, dtype), as_json, render)


def render(report: ArtifactReport, console: Console) -> None:
    """Print the tree."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(report.model)}[/]  {escape(report.artifact)}")
    tree.add(f"schema {report.schema}, neml2 {report.release}; {'sealed' if report.sealed else 'no seal'}")
    leaves = tree.add("leaves")
    for leaf in report.leaves:
        mark = " (told of here)" if f"{leaf.device}/{leaf.dtype}" == report.leaf and len(report.leaves) > 1 else ""
        branch = leaves.add(f"{leaf.device}/{leaf.dtype}  {size(leaf.bytes)}  {escape(leaf.built_for)}{mark}")
        for colour, text in (
            ("red", leaf.fault),
            ("yellow", leaf.doubt),
            ("red", f"missing: {', '.join(leaf.absent)}" if leaf.absent else ""),
            ("dim", f"not named by the metadata: {', '.join(leaf.left)}" if leaf.left else ""),
        ):
            if text:
                branch.add(f"[{colour}]{escape(text)}[/]")
    for title, variables in (("inputs", report.inputs), ("outputs", report.outputs)):
        branch = tree.add(title)
        for variable in variables:
            branch.add(_variable(variable))
    parameters = tree.add(f"parameters{'' if report.parameters else ': none promoted'}")
    for parameter in report.parameters:
        parameters.add(_parameter(parameter))
    pairs = [*report.derivatives, *report.parameter_derivatives]
    derivatives = tree.add(f"derivatives{'' if pairs else ': none compiled'}")
    for out in dict.fromkeys(out for out, _ in pairs):
        derivatives.add(escape(f"{out} by {', '.join(by for o, by in pairs if o == out)}"))
    segments = tree.add("segments")
    for number, segment in enumerate(report.segments):
        _add_segment(segments, number, segment)
    console.print(tree)


def size(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def _variable(variable: VariableReport) -> str:
    from rich.markup import escape

    kind = variable.type or "tensor"
    shape = f" {list(variable.base_shape)}" if variable.base_shape else ""
    sites = f", sub-batch {list(variable.sub_batch_shape)}" if variable.sub_batch_shape else ""
    meaning = variable.kind
    if variable.of is not None:
        steps = "one step" if variable.steps_back == 1 else f"{variable.steps_back} steps"
        meaning = f"{variable.kind}: {variable.of} {steps} before"
    return f"[bold]{escape(variable.name)}[/]  {escape(kind + shape + sites)}  [dim]{escape(meaning)}[/]"


def _parameter(parameter: ParameterReport) -> str:
    from rich.markup import escape

    shown = ", ".join(f"{value:g}" for value in parameter.values[:VALUES])
    more = ", ..." if len(parameter.values) > VALUES else ""
    value = f"[{shown}{more}] shape {list(parameter.shape)}" if parameter.shape else shown
    return f"[bold]{escape(parameter.name)}[/] = {escape(value)}"


def _add_segment(tree: Tree, number: int, segment: SegmentReport) -> None:
    from rich.markup import escape

    head = f"{number}: [bold]{segment.kind}[/]  {escape(', '.join(segment.inputs))} -> "
    branch = tree.add(head + escape(", ".join(segment.outputs)))
    if segment.parameters:
        branch.add(escape(f"parameters: {', '.join(segment.parameters)}"))
    if segment.newton is not None:
        preconditioner = ", preconditioned" if segment.preconditioned else ""
        branch.add(
            f"{segment.unknowns} unknowns in {len(segment.groups)} group(s) ({', '.join(segment.groups)}); linear "
            f"solver: {segment.linear_solver}{preconditioner}"
        )
        branch.add("Newton: " + ", ".join(f"{name}={value}" for name, value in vars(segment.newton).items()))
        branch.add(escape(f"first iterate from a predictor: {', '.join(segment.predicted) or 'no'}"))
        if segment.max_substepping_level:
            branch.add(f"substepping: an increment is halved {segment.max_substepping_level} times at most")
    files = branch.add("files")
    for file in segment.files:
        files.add(_file(file))


def _file(file: FileReport) -> str:
    from rich.markup import escape

    return f"{escape(file.name)}  {'[red]missing[/]' if file.bytes is None else size(file.bytes)}"
