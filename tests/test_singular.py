"""A solve that fails does so quietly and by name, and a row that has converged has finite derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neml2.solvers import ConvergenceError

import references
from attacks.children import run
from neml2_aoti_plugin import ArtifactError
from neml2_aoti_plugin._graphs.graph import Graph
from neml2_aoti_plugin._solve.machine_code import CHOICE as VARIABLE
from neml2_aoti_plugin._solve.native import BlockSolver, Pass
from references import caller_of

DIVERGING = """
import sys
import torch
from neml2_aoti_plugin import ConvergenceError, Model

model = Model(sys.argv[1], mode=sys.argv[2])
given = {n: torch.zeros(v.natural_shape, dtype=torch.float64) for n, v in model.inputs.items()}
first = model.input_names[0]
x = torch.zeros(8, *model.inputs[first].natural_shape, dtype=torch.float64)
x[1], x[2], x[3], x[4], x[5] = 0.5, torch.nan, 1e200, 1e12, torch.inf
given |= {first: x, "t": torch.ones((), dtype=torch.float64)}
print(model.solve(given).converged.tolist())
for call in (model.forward, model.jacobian):
    try:
        call(given)
    except ConvergenceError as error:
        print(type(error).__name__)
"""


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["rowwise", "lockstep"])
@pytest.mark.parametrize("name", ["viscoplasticity", "cross_group"])
def test_diverging_rows_print_nothing(name: str, mode: str, implementation: str) -> None:
    # What it prints on either stream comes back.
    out = run(DIVERGING, references.case(name).artifact, mode, NEML2_AOTI_PLUGIN_KERNELS=implementation)
    solved, *errors = out.splitlines()
    assert "True" in solved and "False" in solved
    assert errors == ["ConvergenceError", "ConvergenceError"]


def test_a_row_without_derivatives_fails_by_name(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = references.case("viscoplasticity")
    model, rows = case.load(), case.rows()
    solve = BlockSolver.solve

    def spoiled(*arguments: Any, **options: Any) -> Pass:
        found = solve(*arguments, **options)
        if found.derivatives is not None:
            found.derivatives[3] = torch.nan
        return found

    def singular(*arguments: Any) -> Any:
        a, b = jacobian(*arguments)
        a[3, :, 0] = 0.0
        return [a, b]

    if implementation == "native":
        monkeypatch.setattr(BlockSolver, "solve", spoiled)
    else:
        sensitivity = caller_of(model).program.implicit[0].sensitivity
        assert sensitivity is not None and sensitivity.jacobian is not None
        jacobian = sensitivity.jacobian
        monkeypatch.setattr(sensitivity, "jacobian", singular)
    with pytest.raises(ConvergenceError, match=r"1 of 9 row\(s\)[\s\S]*row 3: not finite"):
        model.jacobian(rows)
    # The values do not need them.
    assert bool(model.solve(rows).converged.all())


def test_a_predictor_of_another_model_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    case = references.case("viscoplasticity")
    model = case.load()
    segment = caller_of(model).program.implicit[0]
    assert segment.predictor is not None
    predictor: Graph = segment.predictor

    class OneMore:
        file = predictor.file

        def __call__(self, *arguments: Any) -> Any:
            outputs = predictor(*arguments)
            return [*outputs, outputs[0]]

    monkeypatch.setattr(segment, "predictor", OneMore())
    with pytest.raises(ArtifactError, match=r"predictor\.pt2: predictor returned 3 outputs, expected 2\. The package"):
        model.forward(case.rows())
