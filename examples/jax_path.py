"""A compiled material inside a JAX program: jit, grad, vmap and scan over a strain path.

`python examples/jax_path.py`; it takes `pip install jax`. The law is that of stubs/viscoplasticity.i, compiled with all
of its derivatives. Stress in MPa, time in s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from neml2_aoti_plugin import Model  # noqa: E402
from stubs.build import compiled  # noqa: E402

STEPS, DURATION = 30, 30.0

Arrays = dict[str, Any]


def in_jax(model: Model) -> Callable[[Arrays], Arrays]:
    """A compiled model as a function of JAX, from a dict of inputs to one of outputs.

    JAX's `vmap` becomes one call for all rows. Derivatives are first ones, by the pairs that were compiled; by an input
    without a pair they are zero.

    Args:
        model: a model in float64; each input has its base shape, behind the axes that `vmap` brings.
    """
    pairs = model.derivative_pairs
    shapes = {name: tuple(value.base_shape) for name, value in (*model.inputs.items(), *model.outputs.items())}

    def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}

    def values(inputs: Arrays) -> Arrays:
        return {name: value.numpy() for name, value in model.forward(tensors(inputs)).items()}

    def values_and_blocks(inputs: Arrays) -> tuple[Arrays, list[np.ndarray]]:
        outputs, blocks = model.jacobian(tensors(inputs), expand=True)
        return {name: value.numpy() for name, value in outputs.items()}, [blocks[o][i].numpy() for o, i in pairs]

    def like(*names: str) -> Any:
        return jax.ShapeDtypeStruct(sum((shapes[name] for name in names), ()), jnp.float64)

    expected = {name: like(name) for name in model.output_names}

    def call(inputs: Arrays) -> Arrays:
        result: Arrays = jax.pure_callback(values, expected, inputs, vmap_method="broadcast_all")
        return result

    def derivatives(primals: tuple[Arrays], tangents: tuple[Arrays]) -> tuple[Arrays, Arrays]:
        asked = (expected, [like(*pair) for pair in pairs])
        outputs, blocks = jax.pure_callback(values_and_blocks, asked, *primals, vmap_method="broadcast_all")
        moved = {name: jnp.zeros_like(value) for name, value in outputs.items()}
        # Linear in the tangents, so that JAX turns it round for reverse mode.
        for (out, by), block in zip(pairs, blocks, strict=True):
            moved[out] += jnp.tensordot(block, tangents[0][by], len(shapes[by]))
        return outputs, moved

    differentiable = jax.custom_jvp(call)
    differentiable.defjvp(derivatives)
    result: Callable[[Arrays], Arrays] = differentiable
    return result


def path(material: Callable[[Arrays], Arrays], end: Any) -> Any:
    """Stresses `(STEPS, 6)` along a straight strain path to `end` `(6,)`, both in Mandel's notation."""

    def step(state: Arrays, k: Any) -> tuple[Arrays, Any]:
        strain, dt = end * k / STEPS, DURATION / STEPS
        found = material({**state, "strain": strain, "t": k * dt, "t~1": (k - 1) * dt})
        return {"strain~1": strain, **{f"{name}~1": value for name, value in found.items()}}, found["stress"]

    start = {
        "strain~1": jnp.zeros(6),
        "stress~1": jnp.zeros(6),
        "equivalent_plastic_strain~1": jnp.zeros(()),
    }
    return jax.lax.scan(step, start, jnp.arange(1.0, STEPS + 1.0))[1]


def main() -> None:
    """Follow many paths at once, and differentiate the stress at the end of one."""
    jax.config.update("jax_enable_x64", True)
    material = in_jax(Model(compiled("calibration") / "viscoplasticity"))
    ends = 0.03 * jnp.array([[1.0, -0.49, -0.49, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.2]])
    stresses = jax.jit(jax.vmap(lambda end: path(material, end)))(ends)
    print("stress at the end of both paths:", stresses[0, -1, 0], stresses[1, -1, 5])
    work = jax.jit(jax.grad(lambda end: jnp.sum(path(material, end)[-1] ** 2)))
    print("gradient by the end of the first:", work(ends[0]))


if __name__ == "__main__":
    main()
