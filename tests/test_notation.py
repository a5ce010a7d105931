"""`neml2_aoti_plugin.notation` against plain algebra of 3 x 3 matrices, whose forms are written out here once more."""

from __future__ import annotations

import itertools
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from neml2.types import SR2, r2_from_sr2
from numpy.typing import NDArray

import references
from neml2_aoti_plugin import InputError, InputTypeError
from neml2_aoti_plugin.notation import (
    FORMS,
    ORDER,
    Form,
    convert,
    convert_gradient,
    convert_tangent,
    require_symmetric,
)

Array = NDArray[np.float64]

NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)
LEADING = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
FORM = st.sampled_from(FORMS)


def arrays(*base: int) -> Any:
    return LEADING.flatmap(lambda lead: hnp.arrays(np.float64, (*lead, *base), elements=NUMBERS))


def symmetric(matrices: Array) -> Array:
    half: Array = 0.5 * (matrices + matrices.swapaxes(-1, -2))
    return half


def written(tensors: Array, form: Form) -> Array:
    """Symmetric tensors `(..., 3, 3)` in a form, entry by entry."""
    if form == "tensor":
        return tensors
    factor = {"mandel": sqrt(2.0), "voigt strain": 2.0, "voigt stress": 1.0}[form]
    xx, yy, zz = (tensors[..., k, k] for k in range(3))
    yz, xz, xy = tensors[..., 1, 2], tensors[..., 0, 2], tensors[..., 0, 1]
    return np.stack([xx, yy, zz, factor * yz, factor * xz, factor * xy], -1)


def close(found: Array, expected: Array) -> bool:
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-12, atol=1e-9)


def minor(tangents: Array) -> Array:
    """Tangents `(..., 3, 3, 3, 3)` with both minor symmetries."""
    half = 0.5 * (tangents + tangents.swapaxes(-4, -3))
    both: Array = 0.5 * (half + half.swapaxes(-2, -1))
    return both


@given(arrays(3, 3), FORM, FORM)
@settings(max_examples=60, deadline=None)
def test_vectors(matrices: Array, source: Form, target: Form) -> None:
    tensors = symmetric(matrices)
    given_as, expected = written(tensors, source), written(tensors, target)
    assert close(convert(given_as, source, target), expected)
    assert close(convert(torch.from_numpy(given_as), source, target).numpy(), expected)


@given(
    arrays(3, 3, 3, 3), st.tuples(FORM, FORM), st.tuples(FORM, FORM), hnp.arrays(np.float64, (3, 3), elements=NUMBERS)
)
@settings(max_examples=60, deadline=None)
def test_tangents_give_the_same_increment(
    components: Array, source: tuple[Form, Form], target: tuple[Form, Form], direction: Array
) -> None:
    tangent, move = minor(components), symmetric(direction)
    expected = np.einsum("...ijkl,kl->...ij", tangent, move)
    given_as = convert_tangent(tangent, "tensor", source)
    for found in (
        convert_tangent(given_as, source, target),
        convert_tangent(torch.from_numpy(np.array(given_as)), source, target).numpy(),
    ):
        along = written(move, target[1])
        out_axes, by_axes = (2 if form == "tensor" else 1 for form in target)
        increment = np.tensordot(found, along, axes=by_axes)
        assert found.ndim == components.ndim - 4 + out_axes + by_axes
        assert np.allclose(increment, written(expected, target[0]), rtol=1e-10, atol=1e-6)


@given(arrays(3, 3), hnp.arrays(np.float64, (3, 3), elements=NUMBERS), FORM, FORM)
@settings(max_examples=60, deadline=None)
def test_gradients_give_the_same_increment(gradients: Array, direction: Array, source: Form, target: Form) -> None:
    gradient, move = symmetric(gradients), symmetric(direction)
    expected = np.einsum("...ij,ij->...", gradient, move)
    found = convert_gradient(convert_gradient(gradient, "tensor", source), source, target)
    assert np.allclose(np.tensordot(found, written(move, target), 2 if target == "tensor" else 1), expected, atol=1e-6)


def test_stiffness_of_isotropic_elasticity_has_the_entries_of_textbooks() -> None:
    young, poisson = 205000.0, 0.29
    shear, lame = young / (2 * (1 + poisson)), young * poisson / ((1 + poisson) * (1 - 2 * poisson))
    delta = np.eye(3)
    components = lame * np.einsum("ij,kl->ijkl", delta, delta) + shear * (
        np.einsum("ik,jl->ijkl", delta, delta) + np.einsum("il,jk->ijkl", delta, delta)
    )
    voigt = convert_tangent(components, "tensor", ("voigt stress", "voigt strain"))
    expected = np.zeros((6, 6))
    expected[:3, :3] = lame + 2 * shear * np.eye(3)
    expected[3:, 3:] = shear * np.eye(3)
    assert np.allclose(voigt, expected)
    assert np.allclose(np.diag(convert_tangent(components, "tensor", "mandel"))[3:], 2 * shear)


def test_engineering_shears_in_the_place_of_mandels_give_twice_the_stress() -> None:
    """What the documents warn of."""
    model = references.case("elasticity").model
    strain = torch.tensor([0, 0, 0, 0, 0, 2e-3], dtype=torch.float64)
    shear = 205000.0 / (2 * (1 + 0.29))
    right = convert(model.forward({"strain": convert(strain, "voigt strain", "mandel")})["stress"], "mandel", "tensor")
    assert np.isclose(float(right[0, 1]), shear * 2e-3)
    assert np.isclose(float(model.forward({"strain": strain})["stress"][5]), 2 * shear * 2e-3)


def test_mandel_is_the_form_of_neml2s_type() -> None:
    matrix = symmetric(np.arange(9.0).reshape(3, 3) ** 2)
    typed = SR2(torch.from_numpy(convert(matrix, "tensor", "mandel")))
    assert np.allclose(r2_from_sr2(typed).data.numpy(), matrix)
    assert ORDER == ("xx", "yy", "zz", "yz", "xz", "xy")


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FORMS, 2)))
def test_autograd_follows(source: Form, target: Form) -> None:
    random = np.random.default_rng(1)
    start = torch.from_numpy(written(symmetric(random.normal(size=(2, 3, 3))), source)).requires_grad_()
    weights = torch.from_numpy(written(symmetric(random.normal(size=(2, 3, 3))), target))
    (weights * convert(start, source, target)).sum().backward()
    assert start.grad is not None
    # What follows the weighted sum from the values is the gradient in the other form.
    assert torch.allclose(start.grad, convert_gradient(weights, target, source))


def test_dtypes_and_same_object() -> None:
    six = np.arange(6, dtype=np.float32)
    assert convert(six, "mandel", "voigt strain").dtype == np.float32
    assert convert(torch.from_numpy(six), "mandel", "tensor").dtype == torch.float32
    assert convert(np.arange(6), "mandel", "voigt strain").dtype == np.float64
    assert convert(six, "mandel", "mandel") is six
    c = np.eye(6)
    assert convert_tangent(c, "mandel", ("mandel", "mandel")) is c


class TestRefused:
    @pytest.mark.parametrize("kind", [np.asarray, lambda x: torch.from_numpy(np.asarray(x))])
    def test_not_symmetric(self, kind: Any) -> None:
        matrices = np.zeros((4, 3, 3))
        matrices[2, 0, 1] = 2e-3
        with pytest.raises(InputError, match=r"at \[2\] is not symmetric.*2.000e-03.*half of the engineering"):
            convert(kind(matrices), "tensor", "mandel")
        with pytest.raises(InputError, match="tensor is not symmetric"):
            convert(kind(matrices[2]), "tensor", "mandel")
        matrices[2, 1, 0] = 2e-3 * (1 + 1e-12)
        convert(kind(matrices), "tensor", "mandel")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite_is_let_pass(self, value: float) -> None:
        matrices = np.zeros((2, 3, 3))
        matrices[0, 0, 1] = matrices[0, 1, 0] = value
        require_symmetric(matrices)
        require_symmetric(torch.from_numpy(matrices))
        assert not np.isfinite(convert(matrices, "tensor", "mandel")[0, 5])

    @pytest.mark.parametrize(
        ("convert_it", "value", "source", "target", "words"),
        [
            (
                convert,
                np.zeros((5, 6)),
                "tensor",
                "mandel",
                "in the form 'tensor' has shape (5, 6), expected (..., 3, 3)",
            ),
            (convert, np.zeros((5, 3, 3)), "mandel", "tensor", "'mandel' has shape (5, 3, 3), expected (..., 6)"),
            (convert_tangent, np.zeros(6), "mandel", "tensor", "has shape (6,), expected (..., 6, 6)"),
            (convert, np.zeros(6), "voigt", "mandel", "'voigt' is no form"),
            (convert, np.zeros(6), "mandel", "voigt", "mandel, voigt strain, voigt stress, tensor"),
            (convert, [0.0] * 6, "mandel", "tensor", "given as a list"),
        ],
    )
    def test_shapes_forms_and_types(self, convert_it: Any, value: Any, source: str, target: str, words: str) -> None:
        error = InputTypeError if isinstance(value, list) else InputError
        with references.reported(error, words):
            convert_it(value, source, target)
