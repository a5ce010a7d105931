"""Rows of viscoplasticity for long runs, three of which fail, and what one call of the model gives for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import references
from neml2_aoti_plugin import Model, map_rows
from neml2_aoti_plugin.parallel import Mapped
from references import Case

Arrays = dict[str, np.ndarray]

ROWS = 500
FAILING = [7, 123, 499]


def case() -> Case:
    return references.case("viscoplasticity")


@cache
def arrays() -> Arrays:
    """The rows; the state before the step is the same for all."""
    random = np.random.default_rng(11)
    strain = 3e-3 * random.standard_normal((ROWS, 6))
    strain[FAILING, 0] = np.nan
    return {
        "strain": strain,
        "strain~1": np.zeros(6),
        "t": 0.5 + random.random(ROWS),
        "t~1": np.zeros(()),
        "equivalent_plastic_strain~1": np.zeros(()),
        "stress~1": np.zeros(6),
    }


def solved(rows: Arrays, model: Model | None = None) -> Arrays:
    """What one call of the model gives for rows."""
    inputs = {name: torch.from_numpy(value) for name, value in rows.items()}
    found = (model or case().model).solve(inputs, jacobian=True)
    values = {name: value.numpy() for name, value in found.outputs.items()}
    return {**values, "stress@strain": found.blocks["stress"]["strain"].numpy(), "@failed": ~found.converged.numpy()}


@cache
def expected() -> Arrays:
    return solved(arrays())


def blocks(size: int = 100) -> list[Arrays]:
    """The rows block by block."""
    cuts = [slice(start, start + size) for start in range(0, ROWS, size)]
    return [{n: a[cut] if a.shape[:1] == (ROWS,) else a for n, a in arrays().items()} for cut in cuts]


def assert_results(found: dict[str, Any], wanted: Arrays, *names: str) -> None:
    for name in names or ("stress", "equivalent_plastic_strain", "@failed"):
        mine, theirs = np.asarray(found[name]), wanted[name]
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        largest = np.nanmax(np.abs(theirs).astype(float))
        assert np.allclose(mine, theirs, rtol=0, atol=1e-12 * largest, equal_nan=True), name


def joined(parts: list[Arrays]) -> Arrays:
    """What a function was given."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def put(kind: str, folder: Path, rows: Arrays) -> Any:
    """Rows as a source of a kind: a folder of files, the folder of a Zarr group, or arrays."""
    if kind == "arrays":
        return rows
    if kind == "zarr":
        import zarr

        group = zarr.open_group(str(folder / "in.zarr"), mode="w")
        for name, value in rows.items():
            group.create_array(name, data=value)
        return folder / "in.zarr"
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for name, value in rows.items():
        np.save(folder / "in" / f"{name}.npy", value)
    return folder / "in"


class Run:
    """A run from files to files in a folder, or as its options say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"

    @property
    def source(self) -> Path:
        """The folder of the source's files."""
        found = self.folder / "in"
        if not found.exists():
            put("files", self.folder, arrays())
        return found

    def __call__(self, source: object = None, sink: object = None, model: Any = None, **options: Any) -> Mapped:
        source, sink = self.source if source is None else source, self.out if sink is None else sink
        options = {"progress": False, "chunk": 64, **options}
        return map_rows(case().model if model is None else model, source, sink, **options)

    def results(self) -> Arrays:
        return {file.stem: np.load(file) for file in self.out.glob("*.npy")}

    def files(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.out.iterdir()}

    @property
    def journal(self) -> Path:
        return self.out / "journal.jsonl"

    def done(self) -> list[tuple[int, int]]:
        """The rows that are done, chunk by chunk, as whole lines of the journal say."""
        lines = [line for line in self.journal.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
        return [(found["start"], found["stop"]) for found in map(json.loads, lines)]
