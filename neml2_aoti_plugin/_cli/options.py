"""Options that take NAME=VALUE, a number or a list, read with an error that says what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import click

# More than any machine holds or has; above, numbers overflow in torch.
MOST_ROWS, MOST_THREADS = 10**15, 4096
SEED = click.IntRange(0, 2**63 - 1)


class Finite(click.FloatRange):
    """A number that is neither NaN nor infinite, in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails with what is wrong with it."""
        found = float(super().convert(value, param, ctx))
        # A range takes NaN, which is neither below nor above it.
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


def assignments(given: Sequence[str], option: str) -> dict[str, float]:
    """Read `NAME=VALUE` with a finite number as the value.

    Args:
        given: what was given, one string each.
        option: name of the option, for the error.

    Raises:
        BadParameter: one is of another form, or a name is there twice.
    """
    found: dict[str, float] = {}
    for text in given:
        name, mark, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not mark or not name or not math.isfinite(number):
            raise click.BadParameter(
                f"{text!r} is not NAME=VALUE with a finite number as the value.", param_hint=option
            )
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice.", param_hint=option)
        found[name] = number
    return found


def counts(text: str, option: str, most: int) -> tuple[int, ...]:
    """Read whole numbers with commas between, such as `1,100,10000`.

    Args:
        text: what was given.
        option: name of the option, for the error.
        most: the largest one.

    Raises:
        BadParameter: one is no whole number from 1 to `most`.
    """
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
    """Refuse options that each say which points to take: only one of them would be heeded.

    Args:
        given: the values of these options, by what they are called.

    Raises:
        UsageError: more than one was given.
    """
    both = [name for name, value in given.items() if value]
    if len(both) > 1:
        raise click.UsageError(f"{both[0]} says which points to take, and so does {both[1]}. Give one of them.")
