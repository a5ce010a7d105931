"""What each input of a model is to points: given by the caller, kept from earlier steps, or an initial guess.

neml2's names say it: `x~1` is the value of `x` one step earlier. Where `x` is an output it is state; where it is an
input, the caller's own value is kept. An input with the name of an output is the initial guess of a Newton solve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .._checks import require_names
from ..errors import InputError
from ..model import Model

_LAG = re.compile(r"^(?P<name>.+)~(?P<lag>[1-9]\d*)$")

Base = tuple[int, ...]
Pair = tuple[str, str]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Roles:
    """What each input of a model is."""

    # Inputs that the caller gives with each update, in the model's order.
    driven: tuple[str, ...]
    # Variable and number of steps back, by the input that takes it.
    lagged: dict[str, tuple[str, int]]
    # Inputs that are initial guesses of outputs of the same name.
    guesses: tuple[str, ...]
    # How many steps back a variable is kept.
    depth: dict[str, int]
    # Base shape of each variable that is driven or kept; and its shape at one point, with the axes of its sub-batch.
    bases: dict[str, Base]
    natural: dict[str, Base]

    @property
    def kept(self) -> dict[str, str]:
        """The variables by the names under which their earlier values are kept, such as `stress~1`."""
        return {earlier(name, lag): name for name, depth in self.depth.items() for lag in range(1, depth + 1)}


def earlier(name: str, lag: int) -> str:
    """The name of a variable's value some steps back."""
    return f"{name}~{lag}"


def roles_of(model: Model, history: Mapping[str, str], driven: Iterable[str]) -> Roles:
    """Derive what each input is from its name, and from `history` and `driven` of `Points`."""
    inputs, outputs, chosen = model.inputs, model.outputs, tuple(driven)
    require_names((*history, *chosen), inputs, f"history= and driven= of {model.artifact}", "inputs")
    lagged, guesses, given = {}, [], []
    lost: list[str] = []
    for name in inputs:
        match = None if name in chosen else _LAG.match(history.get(name, name))
        if name in history and name not in chosen and match is None:
            raise InputError(f"history= says that {name!r} is {history[name]!r}, expected a name such as 'stress~1'.")
        if match is not None and (match["name"] in outputs or match["name"] in inputs):
            lagged[name] = (match["name"], int(match["lag"]))
        elif match is not None:
            lost.append(name)
        elif name in outputs and name not in chosen:
            guesses.append(name)
        else:
            given.append(name)
    if lost:
        raise InputError(
            f"{model.artifact}: it is not clear where {', '.join(map(repr, lost))} come from, since no output or "
            "input has the name without the number of steps. Say it: Points(..., "
            f"history={{{lost[0]!r}: 'VARIABLE~1'}}) where it is an earlier value under another name, or "
            f"driven=[{lost[0]!r}] where you give it to each update."
        )
    depth: dict[str, int] = {}
    for name, lag in (*lagged.values(), *((name, 1) for name in guesses)):
        depth[name] = max(depth.get(name, 0), lag)
    bases = {name: inputs[name].base_shape for name in (*given, *guesses)}
    natural = {name: inputs[name].natural_shape for name in (*given, *guesses)}
    for taken, (name, _) in lagged.items():
        base = (outputs[name] if name in outputs else inputs[name]).base_shape
        if inputs[taken].base_shape != base:
            raise InputError(
                f"{model.artifact}: {taken!r} has the base shape {inputs[taken].base_shape} and {name!r} {base}, so "
                f"that one is no earlier value of the other. Say it: Points(..., driven=[{taken!r}])."
            )
        bases[name] = base
        # The metadata have the sub-batch of inputs, and not always that of outputs.
        natural.setdefault(name, inputs[taken].natural_shape)
    return Roles(tuple(given), lagged, tuple(guesses), depth, bases, natural)
