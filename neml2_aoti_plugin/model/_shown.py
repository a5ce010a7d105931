"""What `help` and completion show of a compiled model: what it is for, not all that a torch module can do."""

from __future__ import annotations

from abc import ABCMeta

from torch import nn

# Of a torch module, what is of use with a compiled model; the rest works as ever, and is not listed.
USEFUL = frozenset(
    {
        *("eval", "get_parameter", "load_state_dict", "parameters", "requires_grad_", "state_dict", "to", "train"),
        *("training", "zero_grad"),
    }
)
# What neml2 calls, and what is there as in neml2's C++ runtime beside a better way (`inputs`, `outputs`, `set_solver`).
INTERNAL = frozenset(
    {
        *("forward_with_batch", "linearise", "set_solver_config", "parameter_base_shapes"),
        *("input_names", "output_names", "input_base_shapes", "output_base_shapes"),
    }
)


class Concise(ABCMeta):
    """Of a class whose `dir`, and so `help`, leaves out what it has from `torch.nn.Module` and for neml2.

    It derives from `ABCMeta`, so that a class may derive from a compiled model and from an abstract class.
    """

    def __dir__(cls) -> list[str]:
        own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
        names = {name for base in own for name in vars(base)}
        return sorted(name for name in names if not name.startswith("_") and name not in INTERNAL)
