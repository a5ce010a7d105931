"""What commands print: tables and trees for people, one JSON document for programs.

rich is imported when something is printed, so that `--help` does not wait for it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import Console
    from rich.progress import Progress

# Of the documents that `--json` prints; it grows when a key is taken away or changes its meaning.
FORM = 1
# Wide enough that nothing is cut where nobody looks at the lines.
PIPED_WIDTH = 400

# What each package is needed for, and how it is installed.
PACKAGES = {
    "rich": "pip install rich",
    "safetensors": "pip install safetensors",
    "matplotlib": "pip install 'neml2-aoti-plugin[plot]'",
    "neml2": "pip install neml2",
    "nmhit": "pip install neml2",
    "numpy": "pip install numpy",
    "torch": "pip install torch",
    "starlette": "pip install 'neml2-aoti-plugin[serve]'",
    "uvicorn": "pip install 'neml2-aoti-plugin[serve]'",
    "httptools": "pip install 'neml2-aoti-plugin[serve]'",
    "orjson": "pip install 'neml2-aoti-plugin[serve]'",
    "prometheus_client": "pip install 'neml2-aoti-plugin[serve]'",
}

Report = TypeVar("Report", bound="DataclassInstance")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def missing(package: str | None) -> str | None:
    """What to say where a package is not installed; None for one that every installation has."""
    name = (package or "").partition(".")[0]
    if name not in PACKAGES:
        return None
    return f"this needs the package {name}, which is not installed: {PACKAGES[name]}"


def json_option(function: _Function) -> _Function:
    """The option `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print a JSON document instead; see docs/tool.md.")(
        function
    )


def device_options(function: _Function) -> _Function:
    """The options that choose a leaf."""
    function = click.option("--dtype", type=click.Choice(["float64", "float32"]), help="Take the leaf of this dtype.")(
        function
    )
    return click.option("--device", metavar="DEVICE", help="Take the leaf of this device, such as cpu or cuda:1.")(
        function
    )


def show(
    command: str,
    report: Report,
    as_json: bool,
    render: Callable[[Report, Console], None],
    status: int = 0,
) -> int:
    """Print a report.

    Args:
        command: that it is of.
        report: a dataclass.
        as_json: whether as a JSON document.
        render: prints it for people.
        status: the exit status that goes with it.

    Returns:
        The exit status.
    """
    if as_json:
        write_json(command, status, result=asdict(report))
    else:
        render(report, console())
    return status


def write_json(
    command: str, status: int, *, result: dict[str, Any] | None = None, error: dict[str, str] | None = None
) -> None:
    """Print a document in the form that docs/tool.md describes."""
    document = {"form": FORM, "command": command, "status": status, "result": _finite(result), "error": error}
    print(json.dumps(document, indent=2, allow_nan=False))


def console(stderr: bool = False) -> Console:
    """A console; without colours, and as wide as need be, where it is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PIPED_WIDTH)


def progress() -> Progress:
    """A progress bar on stderr; nothing is drawn where that is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    shown = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=shown, disable=not shown.is_terminal, transient=True)


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON has none of."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
