"""What commands print and draw: text, tables and pictures for people, one JSON document for programs.

rich and matplotlib are imported when they are used, so that `--help` does not wait for them. Strings are printed as
they are: what has a colour is a `rich.text.Text`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .._checks import first_line
from .._files import draft, require_writable
from ..errors import InputError
from .process import FINE, SHORT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

# Of the documents that `--json` prints; it grows when a key is taken away or changes its meaning.
FORM = 1
# Wide enough that nothing is cut where nobody looks at the lines.
PIPED_WIDTH = 400

# How each package is installed that a command may lack.
_SERVE = "pip install 'neml2-aoti-plugin[serve]'"
PACKAGES = {
    **{name: f"pip install {name}" for name in ("rich", "safetensors", "neml2", "numpy", "torch")},
    **dict.fromkeys(("starlette", "uvicorn", "anyio", "prometheus_client"), _SERVE),
    "matplotlib": "pip install 'neml2-aoti-plugin[plot]'",
    "nmhit": "pip install neml2",
    **dict.fromkeys(("xarray", "scipy"), "pip install 'neml2-aoti-plugin[netcdf]'"),
}

FORMATS = (".png", ".svg", ".pdf")
DPI = 150


def missing(package: str | None) -> str | None:
    """What to say where a package is not installed; None for one that every installation has."""
    name = (package or "").partition(".")[0]
    if name not in PACKAGES:
        return None
    return f"this needs the package {name}, which is not installed: {PACKAGES[name]}"


@dataclass(frozen=True)
class Report:
    """What a command found: fields for programs, which docs/tool.md lists, and lines and tables for people."""

    @property
    def fine(self) -> bool:
        """Whether all is well; the exit status says so."""
        return True

    def render(self) -> Iterable[Any]:
        """Lines and tables."""
        raise NotImplementedError


def show(command: str, report: Report, as_json: bool) -> int:
    """Print what a command found, for programs or people; gives the exit status."""
    status = FINE if report.fine else SHORT
    if as_json:
        write_json(command, status, result=asdict(report))
        return status
    shown = console()
    for part in report.render():
        # The terminal breaks a line that is too long, so that what is copied is one line.
        shown.print(part, soft_wrap=isinstance(part, str))
    return status


def write_json(
    command: str, status: int, *, result: dict[str, Any] | None = None, error: dict[str, str] | None = None
) -> None:
    """Print a document in the form that docs/tool.md describes; numbers that are not finite are null."""
    document = {"form": FORM, "command": command, "status": status, "result": result, "error": error}
    finite = json.loads(json.dumps(document), parse_constant=lambda name: None)
    print(json.dumps(finite, indent=2))


def written(*files: str | None) -> Iterator[str]:
    """The lines that say which files were written."""
    yield from (f"written: {file}" for file in files if file is not None)


def console(stderr: bool = False) -> Console:
    """A console; without colours, and as wide as need be, where it is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def table(*columns: str | Column) -> Table:
    """A table without lines but one below its head."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False)


def in_one_line(error: BaseException) -> str:
    """What an error that is not ours says, in one line."""
    kind, text = type(error).__name__, first_line(error)
    return text if text == kind else f"{kind}: {text}"


@contextmanager
def progress() -> Iterator[None]:
    """Show on stderr what a command waits for and how far it is, see `waits_for`; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich import progress as rich

    name, done = rich.TextColumn("{task.description}", markup=False), rich.MofNCompleteColumn()
    columns = (name, rich.BarColumn(), done, rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=console(stderr=True), transient=True) as bar:
        # What all commands begin with.
        task = bar.add_task("importing torch and neml2", total=None)

        def show_wait(what: str, done: int, total: int | None) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if not what:
                bar.stop()

        click.get_current_context().obj = show_wait
        yield


def waits_for(what: str, done: int = 0, total: int | None = None) -> None:
    """Say what a command waits for from now on, as far as it shows that; nothing any more if it is empty."""
    context = click.get_current_context(silent=True)
    if context is not None and context.obj is not None:
        context.obj(what, done, total)


# -- pictures ----------------------------------------------------------------------------------------------------------


def require_ending(path: Path, endings: Collection[str]) -> None:
    """Refuse the name of a file whose ending names no format that is known."""
    if path.suffix.lower() not in endings:
        raise InputError(f"{path}: ends with {path.suffix!r}, expected one of {', '.join(endings)}.")


def require_drawable(path: Path | None) -> None:
    """Refuse a picture whose ending is another, or that cannot be written, ahead of long work."""
    if path is not None:
        require_ending(path, FORMATS)
        # What is missing is reported now as well.
        import matplotlib  # noqa: F401

        require_writable(path)


def literal(text: str) -> str:
    """A name as matplotlib shows it: `$` begins no formula there, and `_` at the beginning hides no label."""
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


@contextmanager
def figure(path: Path, width: float = 6.4, height: float = 4.6, panels: int = 1) -> Iterator[list[Any]]:
    """Give the axes of a figure, in inches, one above the other; it is written to the file at the end."""
    require_drawable(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with draft(path) as scratch:
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        every = list(drawn.subplots(panels, sharex=True, squeeze=False)[:, 0])
        for axes in every:
            # Small and large numbers have their power of ten at the end of the axis, so that they do not collide.
            axes.ticklabel_format(scilimits=(-3, 5), useMathText=True)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        yield every
        drawn.align_ylabels(every)
        drawn.savefig(scratch, dpi=DPI, format=path.suffix.lower().removeprefix("."))
