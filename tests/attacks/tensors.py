"""Tensors that look like plain ones and are not: by name, what makes one of a plain tensor, and what an error must say.

`main` calls models with one of them and prints what is wrong. A graph that reads one without memory ends the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor

Make = Callable[[Tensor], Tensor]


class Wrapper(torch.Tensor):
    """A tensor around another one, with no memory of its own."""

    @staticmethod
    def __new__(cls, of: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device=of.device)

    def __init__(self, of: Tensor) -> None:
        self.of = of

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function there
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda x: x.of, (args, kwargs or {}))
        return function(*args, **kwargs)


class Plain(torch.Tensor):
    """A class of a user's, which changes nothing."""


class Loud(torch.Tensor):
    """A class of a user's that sees torch's functions."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def without_storage(x: Tensor, left: int = 0) -> Tensor:
    found = x.clone()
    found.untyped_storage().resize_(left)
    return found


def sliced_without_storage(x: Tensor) -> Tensor:
    whole = torch.cat([x.flatten(), x.flatten()])
    found = whole[x.numel() :].view(x.shape)
    whole.untyped_storage().resize_(x.numel() * x.element_size())
    return found


def uninitialized(x: Tensor) -> Tensor:
    return torch.nn.parameter.UninitializedParameter(requires_grad=False, dtype=x.dtype)  # type: ignore[call-arg]  # torch names no keywords


def negative(x: Tensor) -> Tensor:
    return torch.complex(x, -x).conj().imag


REFUSED: dict[str, tuple[Make, str]] = {
    "fake": (fake, "FakeTensor"),
    "wrapper": (Wrapper, "Wrapper"),
    "masked": (lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), "MaskedTensor"),
    "functional": (torch._to_functional_tensor, "functional tensor"),
    "zero": (lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype), "zero tensor"),
    "freed": (without_storage, "storage of 0 bytes"),
    "shrunk": (lambda x: without_storage(x, 8), "storage of 8 bytes"),
    "shrunk below a slice": (sliced_without_storage, "storage of"),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "sparse rows": (lambda x: x.reshape(1, -1).to_sparse_csr(), "torch.sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "NestedTensor"),
    "meta": (lambda x: x.to("meta"), "meta"),
    "uninitialized": (uninitialized, "UninitializedParameter"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "qint8"),
}

# These have memory, and count as what they are.
ADMITTED: dict[str, Make] = {
    "negative": negative,
    "negative view": lambda x: torch._neg_view(-x),
    "negative and transposed": lambda x: torch._neg_view((-x).movedim(0, -1).contiguous().movedim(-1, 0)),
    "conjugate": lambda x: torch.complex(x, x).conj().real,
    "class": lambda x: x.as_subclass(Plain),
    "class with functions": lambda x: x.as_subclass(Loud),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "buffer": torch.nn.Buffer,
    "inference": lambda x: inference(x),
}


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def typical(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, variable in model.inputs.items():
        value = torch.rand(3, *variable.natural_shape, generator=generator, dtype=torch.float64)
        found[name] = 1e-4 * value if variable.base_shape else torch.full((3,), float(name == "t"), dtype=torch.float64)
    return found


def places(model: Any) -> dict[str, Callable[[Make], Any]]:
    """Each call in which such a tensor can be given; what makes it of a plain one is the argument."""
    inputs = typical(model)
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    name = next(n for n, v in model.inputs.items() if v.base_shape)
    x = inputs[name]
    found: dict[str, Callable[[Make], Any]] = {
        "forward": lambda make: model.forward({**inputs, name: make(x)}),
        "forward of a grid": lambda make: model.forward({**inputs, name: make(x.expand(2, *x.shape).clone())}),
        "forward with grad": lambda make: detached(model.forward({**leaves, name: make(x)})),
        "solve": lambda make: model.solve({**inputs, name: make(x)}).outputs,
    }
    if model.derivative_pairs:
        found["jacobian"] = lambda make: model.jacobian({**inputs, name: make(x)})[0]
        found["jvp"] = lambda make: model.jvp(inputs, {name: make(x)})[1]
    for parameter, value in model.named_parameters().items():
        given = value.detach().expand(len(x)).clone()
        found[f"override of {parameter}"] = lambda make, n=parameter, v=given: model.forward(inputs, {n: make(v)})  # type: ignore[misc]
    for unknown, variable in model.initial_guesses.items():
        if variable.base_shape:
            first = torch.zeros(len(x), *variable.base_shape, dtype=torch.float64)
            found[f"initial guess of {unknown}"] = lambda make, n=unknown, v=first: model.forward(
                {**inputs, n: make(v)}
            )  # type: ignore[misc]
    return found


def detached(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in outputs.items()}


def gradient(model: Any, make: Make) -> dict[str, Any]:
    """By an input that the model is given as such a tensor."""
    leaves = {name: value.requires_grad_() for name, value in typical(model).items()}
    name = next(n for n, v in model.inputs.items() if v.base_shape)
    model.forward({**leaves, name: make(leaves[name])})["stress"].sum().backward()
    return {name: leaves[name].grad}


def put(model: Any, name: str, value: Tensor) -> Any:
    """Give the module itself another parameter, and call it."""
    above, _, leaf = name.rpartition(".")
    parameters = model.get_submodule(above)._parameters
    before, parameters[leaf] = parameters[leaf], torch.nn.Parameter(value, requires_grad=False)
    try:
        return model.forward(typical(model))
    finally:
        parameters[leaf] = before


def refuse(name: str, model: Any) -> list[str]:
    """Give such a tensor in each place; report where it was not refused in the right words."""
    from neml2_aoti_plugin import InputTypeError

    make, words = REFUSED[name]
    calls = places(model)
    for parameter, value in model.named_parameters().items():
        calls[f"set {parameter}"] = lambda make, n=parameter, v=value: model.set_parameter(n, make(v.expand(3).clone()))  # type: ignore[misc]
        # Eight bytes are enough for a scalar; the dtype of what is put there is checked where graphs take it.
        if name not in ("shrunk", "quantized"):
            calls[f"put {parameter}"] = lambda make, n=parameter, v=value: put(model, n, make(v.clone()))  # type: ignore[misc]
    wrong = []
    for call, run in calls.items():
        try:
            run(make)
            wrong.append(f"{call}: no error")
        except InputTypeError as error:
            if words not in str(error):
                wrong.append(f"{call}: {error}")
        except Exception as error:
            # torch itself makes no parameter, and of scalars no such tensor.
            if not call.startswith(("set", "put", "override")) or "neml2" in type(error).__module__:
                wrong.append(f"{call}: {type(error).__name__}: {error}")
    return wrong


def admit(name: str, model: Any) -> list[str]:
    """Give such a tensor in each place; report where it gave other numbers or gradients than a plain one."""
    calls = places(model)
    if name not in ("parameter", "buffer", "inference"):
        calls["gradient"] = partial(gradient, model)
    wrong = []
    for call, run in calls.items():
        found = run(ADMITTED[name])
        for out, value in run(torch.clone).items():
            if type(found[out]) is not Tensor or not torch.equal(found[out].isnan(), value.isnan()):
                wrong.append(f"{call}: {out} is a {type(found[out]).__name__}")
            elif not torch.equal(found[out].nan_to_num(), value.nan_to_num()):
                wrong.append(f"{call}: {out} differs")
    return wrong


def modes() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Modes that take the place of torch's operations."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    return {
        "FakeTensorMode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
        "FunctionalTensorMode": FunctionalTensorMode,
        "Passing": Passing,
    }


def main(kind: str, *artifacts: str) -> None:
    """Give tensors of a kind to models, and print what is wrong."""
    from neml2_aoti_plugin import Model

    warnings.simplefilter("ignore")
    run = refuse if kind in REFUSED else admit
    for artifact in artifacts:
        for line in run(kind, Model(artifact)):
            print(f"{artifact}: {line}")
    print("done")
