"""Arguments and options that several commands have, read with an error that says what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from .output import Report, progress, show
from .process import FINE

# More than any machine holds or has; above, numbers overflow in torch.
MOST_ROWS, MOST_THREADS = 10**15, 4096
SEED = click.IntRange(0, 2**63 - 1)
FILE = click.Path(path_type=Path)
DTYPE = click.Choice(["float64", "float32"])

Function = TypeVar("Function", bound=Callable[..., Any])


def target_arguments(required: bool = True, leaf: bool = True) -> Callable[[Function], Function]:
    """An artifact or a stub, the model's name where the stub has several, and the options that choose a leaf.

    The command is given the `Target` that was found, or None. This goes below its other options.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def with_target(path: str | None, model: str | None, **others: Any) -> Any:
            from .target import find_target

            device, dtype = others.pop("device", None), others.pop("dtype", None)
            return function(None if path is None else find_target(path, model, device, dtype), **others)

        found: Any = device_options(with_target) if leaf else with_target
        found = click.argument("model", required=False)(found)
        metavar = "ARTIFACT|STUB" if required else "[ARTIFACT|STUB]"
        named: Function = click.argument("path", metavar=metavar, required=required)(found)
        return named

    return decorate


def device_options(function: Function) -> Function:
    """The options that choose a leaf."""
    function = click.option("--dtype", type=DTYPE, help="Take the leaf of this dtype.")(function)
    return click.option("--device", metavar="DEVICE", help="Take the leaf of this device, such as cpu or cuda:1.")(
        function
    )


def command(examples: str) -> Callable[[Callable[..., Report | None]], click.Command]:
    """A command that prints what its function returns; in its help are the function's docstring and the examples."""

    def made(function: Callable[..., Report | None]) -> click.Command:
        @wraps(function)
        def run(as_json: bool, **given: Any) -> int:
            with progress():
                report = function(**given)
            return FINE if report is None else show(click.get_current_context().info_name or "", report, as_json)

        found = click.command(epilog=f"\b\nExamples:\n{examples}")(run)
        found.params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="Print a JSON document instead; see docs/tool.md.")
        )
        return found

    return made


class Finite(click.FloatRange):
    """A number in a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails with what is wrong with it."""
        found = float(super().convert(value, param, ctx))
        # A range takes NaN, which is neither below nor above it.
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


def named(text: str, form: str, option: str) -> tuple[str, str]:
    """Read `NAME=...`; in the error of `option` it is `form`."""
    name, mark, value = text.partition("=")
    if not (name and mark and value):
        raise click.BadParameter(f"{text!r} is not {form}.", param_hint=option)
    return name, value


def assignments(given: Sequence[str], option: str) -> dict[str, float]:
    """Read `NAME=VALUE` with finite numbers as the values; `option` is what the error names."""
    found: dict[str, float] = {}
    form = "NAME=VALUE with a finite number as the value"
    for text in given:
        name, value = named(text, form, option)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise click.BadParameter(f"{text!r} is not {form}.", param_hint=option)
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice.", param_hint=option)
        found[name] = number
    return found


def counts(text: str, option: str, most: int) -> tuple[int, ...]:
    """Read whole numbers from 1 to `most` with commas between, such as `1,100,10000`."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > most:
        raise click.BadParameter(
            f"{text!r} is not a list of whole numbers from 1 to {most}, such as 1,100.", param_hint=option
        )
    return found


def refuse_together(given: Mapping[str, object]) -> None:
    """Refuse options, by what they are called, that each say which points to take: only one would be heeded."""
    both = [name for name, value in given.items() if value]
    if len(both) > 1:
        raise click.UsageError(f"{both[0]} says which points to take, and so does {both[1]}. Give one of them.")
