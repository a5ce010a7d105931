"""A call takes memory for its outputs and for a block of rows, and not for the Jacobians of the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attacks.children import run_fresh

pytestmark = pytest.mark.processes

ROWS = 400_000
UNKNOWNS = 7
# Of each row a call keeps its outputs and, to tell how it fared, the unknowns, two norms, a count and its place: 18
# numbers and a bit, where inputs and outputs have 28. What lies between them the allocator keeps too: some third more,
# by no fixed amount.
FACTOR = 1.0
# Of a block's Jacobians several sets are held at once: two linearisations, factors, and what graphs make them from.
SETS = 16
# All Jacobians, once; the C++ runtime holds several such sets.
JACOBIANS = UNKNOWNS * UNKNOWNS * 8 * ROWS

PROGRAM = """
import json, sys
import torch
from benchmarks.batches import converging
from benchmarks.memory import peak_growth
from neml2_aoti_plugin import Model
from references import caller_of

torch.set_num_threads(1)
artifact, inputs = converging("viscoplasticity", int(sys.argv[1]))
model = Model(artifact)
outputs, growth = peak_growth(lambda: model.forward(inputs))
given, found = (sum(x.numel() * x.element_size() for x in some.values()) for some in (inputs, outputs))
print(json.dumps({"growth": growth, "inputs": given, "outputs": found, "block": caller_of(model).program.block}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak memory")
def test_peak_is_bounded_by_outputs_and_a_block() -> None:
    told = json.loads(run_fresh(PROGRAM, ROWS, limit=120).splitlines()[-1])
    assert told["outputs"] == UNKNOWNS * 8 * ROWS
    blocks = SETS * UNKNOWNS * UNKNOWNS * 8 * told["block"]
    assert told["growth"] < FACTOR * (told["inputs"] + told["outputs"]) + blocks, told
    assert told["growth"] < 0.75 * JACOBIANS, told
