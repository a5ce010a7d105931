"""Options that take NAME=VALUE, a count or a list, read with an error that says what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click


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


def counts(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers with commas between, such as `1,100,10000`.

    Raises:
        BadParameter: one is no whole number above zero.
    """
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(
            f"{text!r} is not a list of whole numbers above zero, such as 1,100.", param_hint=option
        )
    return found
