"""What the options of several commands have in common, and how a command calls its work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from .output import Report, progress, show
from .process import FINE

# More than any machine holds or has; above, numbers overflow in torch.
MOST_ROWS, MOST_THREADS = 10**15, 4096
FILE = click.Path(path_type=Path)
DTYPE = click.Choice(["float64", "float32"])

Function = TypeVar("Function", bound=Callable[..., Any])


def command(summary: str, module: str = "") -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose help is the docstring of a function that does nothing; `summary` stands in the list of commands.

    Its work is the function of the same name in the module of that name, or another: it is imported when the command
    runs, takes the options by name, and returns what is printed.
    """

    def made(declared: Callable[..., Any]) -> click.Command:
        name = declared.__name__
        text, _, examples = inspect.cleandoc(declared.__doc__ or "").partition("Examples:\n")

        @wraps(declared)
        def run(as_json: bool, **given: Any) -> int:
            with progress():
                if "path" in given:
                    from .target import find_target

                    path, *others = (given.pop(name, None) for name in ("path", "model", "device", "dtype"))
                    given["target"] = None if path is None else find_target(path, *others)
                work = getattr(import_module(f".{module or name}", __package__), name)
                report: Report | None = work(**given)
            return FINE if report is None else show(name, report, as_json)

        # Behind \b lines stay as they are.
        found = click.command(help=text, short_help=summary, epilog=f"\b\nExamples:\n{examples}")(run)
        found.params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="Print a JSON document instead; see docs/tool.md.")
        )
        return found

    return made


def target_arguments(function: Function, *, required: bool = True, leaf: bool = True) -> Function:
    """An artifact or a stub, the model's name where the stub has several, and the options that choose a leaf.

    The work is given the `Target` that was found, or None. This goes below the other options.
    """
    metavar = "ARTIFACT|STUB" if required else "[ARTIFACT|STUB]"
    found = click.argument("model", required=False)(device_options(function) if leaf else function)
    return click.argument("path", metavar=metavar, required=required)(found)


def device_options(function: Function) -> Function:
    """The options that choose a leaf."""
    function = click.option("--dtype", type=DTYPE, help="Take the leaf of this dtype.")(function)
    return click.option("--device", metavar="DEVICE", help="Take the leaf of this device, such as cpu or cuda:1.")(
        function
    )


class Finite(click.FloatRange):
    """A number in a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails with what is wrong with it."""
        found = float(super().convert(value, param, ctx))
        # A range takes NaN, which is neither below nor above it.
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


def by_name(*option: str, form: str, help: str, numbers: bool = False) -> Callable[[Function], Function]:
    """An option that may be given several times, as `NAME=...`: the work is given texts, or finite numbers, by name."""

    def read(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in given:
            name, _, value = text.partition("=")
            number = math.nan
            if numbers:
                with suppress(ValueError):
                    number = float(value)
            if not name or not value or (numbers and not math.isfinite(number)):
                wanted = f"{form} with a finite number as the value" if numbers else form
                raise click.BadParameter(f"{text!r} is not {wanted}.")
            if name in found:
                raise click.BadParameter(f"{name!r} is given twice.")
            found[name] = number if numbers else value
        return found

    return click.option(*option, metavar=form, multiple=True, callback=read, help=help)


def counts(most: int) -> Callable[..., tuple[int, ...] | None]:
    """A callback that reads whole numbers from 1 to `most` with commas between, such as `1,100,10000`."""

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        try:
            found = tuple(int(word) for word in text.split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 1 or max(found) > most:
            raise click.BadParameter(f"{text!r} is not a list of whole numbers from 1 to {most}, such as 1,100.")
        return found

    return read


def refuse_together(given: Mapping[str, object]) -> None:
    """Refuse options, by what they are called, that each say which points to take: only one would be heeded."""
    both = [name for name, value in given.items() if value]
    if len(both) > 1:
        raise click.UsageError(f"{both[0]} says which points to take, and so does {both[1]}. Give one of them.")
