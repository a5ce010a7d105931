"""The peers of a model: the same call by the plugin, the C++ runtime, eager neml2 and `neml2.compile`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stubs.catalogue import Stub

from .cases import COMPILED, EAGER, NATIVE, PLUGIN, TWO_THREADS

Tensors = dict[str, Tensor]

# A solve that is to be judged by must be tighter than one that is judged; how much, depends on the model's units.
TIGHTER = (1e-3, 1e-2, 1e-1)

STEPS = 100
# The driver's run: its stub's own history in this many steps, at the last of its points.
HISTORY = (
    f"Tensors/times/expr:='Scalar(torch.linspace(0.0, 30.0, {STEPS + 1}, dtype=torch.float64))'",
    f"Tensors/strains/expr:='SR2(torch.linspace(0.0, 3.0e-2, {STEPS + 1}, dtype=torch.float64).reshape(-1, 1, 1) * "
    "torch.tensor([[0.6, -0.4, -0.15, 0.3, 0.0, 0.5]], dtype=torch.float64))'",
)


class Loaded:
    """A compiled stub and its input file, loaded by each peer when it is first asked for."""

    def __init__(self, stub: Stub, folder: Path) -> None:
        self.stub, self.folder = stub, folder
        self.artifact = folder / stub.model

    @functools.cached_property
    def plugin(self) -> Any:
        """The plugin's `Model`, row by row."""
        from neml2_aoti_plugin.model import Model

        return Model(self.artifact, mode="rowwise")

    @functools.cached_property
    def native(self) -> Any:
        """The C++ runtime's `Model`."""
        from neml2.aoti._aoti import Model as Native

        assert Native.__module__ == "neml2.aoti._aoti", "the C++ runtime is not in force"
        return Native(str(self.artifact))

    @functools.cached_property
    def eager(self) -> Any:
        """The model that was compiled, as neml2 runs it without compiling."""
        import neml2

        return neml2.load_input(self.stub.path).get_model(self.stub.model)

    @functools.cached_property
    def compiled(self) -> Any:
        """The eager model after `neml2.compile`; of an implicit one, the residual is compiled."""
        import neml2
        import torch._dynamo.config
        from neml2.models.common.ImplicitUpdate import ImplicitUpdate

        torch._dynamo.config.cache_size_limit = 512
        model = neml2.load_input(self.stub.path).get_model(self.stub.model)
        solves = [part for part in model.modules() if isinstance(part, ImplicitUpdate)]
        if not solves:
            return neml2.compile(model)
        for part in solves:
            neml2.compile(part.system)
        return model

    @property
    def typed_classes(self) -> dict[str, Any]:
        """The typed tensor of each input."""
        spec: dict[str, Any] = self.eager.input_spec
        return spec

    # -- calls, by peer; each gives the tensors to compare -----------------------------------------------------------

    def forward(self, peer: str, inputs: Tensors) -> Callable[[], Any]:
        """A call for the outputs."""
        if peer == PLUGIN:
            return lambda: self.plugin.forward(inputs)
        if peer == NATIVE:
            return lambda: self.native.forward(inputs)
        model = {EAGER: lambda: self.eager, COMPILED: lambda: self.compiled}[peer]()
        arguments = [model.input_spec[name](inputs[name]) for name in model.input_spec]

        def call() -> Any:
            with torch.no_grad():
                return model(*arguments)

        return call

    def jacobian(self, peer: str, inputs: Tensors) -> Callable[[], Any]:
        """A call for outputs and compiled derivatives; eager neml2 gives all derivatives."""
        if peer == PLUGIN:
            return lambda: self.plugin.jacobian(inputs)
        if peer == NATIVE:
            return lambda: self.native.jacobian(inputs)
        arguments = {name: cls(inputs[name]) for name, cls in self.typed_classes.items()}
        return lambda: self.eager.jacobian(arguments)

    def threads(self, peer: str, inputs: Tensors) -> Callable[[], Any]:
        """A call of the plugin for the outputs, on one or two threads."""
        count = 2 if peer == TWO_THREADS else 1

        def call() -> Any:
            torch.set_num_threads(count)
            return self.plugin.forward(inputs)

        return call

    def typed(self, peer: str, inputs: Tensors) -> Callable[[], Any]:
        """The call of `AOTIModel` with typed tensors, as drivers make it."""
        model = self.typed_model(peer)(self.artifact)
        arguments = [model.input_spec[name](inputs[name]) for name in model.input_spec]
        return lambda: model(*arguments)

    def typed_model(self, peer: str) -> Any:
        """The class `AOTIModel` of a peer."""
        from neml2.aoti._shim import AOTIModel as Shim

        from neml2_aoti_plugin._host.hit import AOTIModel

        return AOTIModel if peer == PLUGIN else Shim

    def driver(self, peer: str) -> Callable[[], Any]:
        """A run of the stub's driver in `STEPS` steps; gives the last outputs."""
        import neml2
        from neml2.factory import register_neml2_object

        if peer != EAGER:
            register_neml2_object("AOTIModel")(self.typed_model(peer))
        path = self.stub.path if peer == EAGER else self.folder / f"{self.stub.model}_aoti.i"
        driver = neml2.load_input(path, additional_args=HISTORY).get_driver(self.stub.driver)

        def call() -> Any:
            driver.run()
            return driver.result_out[-1]

        return call

    # -- results as plain tensors by name ----------------------------------------------------------------------------

    def plain(self, quantity: str, result: Any, rows: int) -> Tensors:
        """The tensors in a result, each `(rows, ...)`, or `(1, ...)` where it is the same for all rows."""
        if quantity == "jacobian":
            outputs, blocks = result
            return {**self.plain("forward", outputs, rows), **self._blocks(blocks)}
        if isinstance(result, Mapping):
            named = {name: _raw(value) for name, value in result.items()}
        else:
            values = result if isinstance(result, tuple) else (result,)
            named = {name: _raw(value) for name, value in zip(self.eager.output_spec, values, strict=True)}
        found = {}
        for name, variable in self.plugin.outputs.items():
            value = named[name]
            found[name] = value if value.ndim > len(variable.natural_shape) else value.expand(rows, *value.shape)
        return found

    def _blocks(self, blocks: Mapping[str, Mapping[str, Any]]) -> Tensors:
        found = {}
        outputs, inputs = self.plugin.outputs, self.plugin.inputs
        for out, wrt in self.plugin.derivative_pairs:
            block = _raw(blocks[out][wrt])
            rank = 1 + len(outputs[out].base_shape) + len(inputs[wrt].base_shape)
            found[f"{out}:{wrt}"] = block.reshape((1,) * (rank - block.ndim) + tuple(block.shape))
        return found

    def tight(self, quantity: str, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensors | None:
        """Solve some rows more tightly by the C++ runtime; None where it cannot."""
        from neml2.aoti._aoti import ConvergenceError
        from neml2.aoti._aoti import Model as Native

        settings = json.loads((self.artifact / "metadata.json").read_text(encoding="utf-8")).get("solver_config")
        if not settings or quantity not in ("forward", "jacobian"):
            return None
        few = {name: value[rows].contiguous() for name, value in inputs.items()}
        names = ("miters", "ls_type", "ls_max_iters", "ls_cutback", "ls_c")
        for factor in TIGHTER:
            model = Native(str(self.artifact))
            model.set_solver_config(
                atol=settings["atol"] * factor, rtol=0.0, **{name: settings[name] for name in names}
            )
            try:
                return self.plain(quantity, getattr(model, quantity)(few), len(rows))
            except ConvergenceError:
                continue
        return None


def _raw(value: Any) -> Tensor:
    """The tensor in a typed one, or a tensor itself, without its graph."""
    return (value if isinstance(value, Tensor) else value.data).detach()
