"""The floor: what the compiled graphs alone take, called by torch's bare package loader.

For a forward segment that is one graph call. For an implicit segment it is, for the first, second, ... update, the
Jacobian graph and the solve graph on the rows that still need that update. There is no test, no line search, no
choice of rows and no packing. Rows are cut into blocks of whichever size is fastest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCKS = (512, 2048, 8192, 32768)
# So many rows tell which block is the fastest.
SAMPLE = 1 << 16


class Floor:
    """The graphs of an artifact, to be called as a model with given numbers of updates would call them.

    Args:
        artifact: its folder.
        inputs: of the model, `(rows, ...)`.
        outputs: of the model; the unknowns are taken from here.
        updates: Newton updates of each row, `(rows,)`.
    """

    def __init__(
        self, artifact: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], updates: Tensor
    ) -> None:
        self._leaf = artifact / "cpu" / "float64"
        segments = json.loads((artifact / "metadata.json").read_text(encoding="utf-8"))["segments"]
        self.rows = len(updates)
        self._forward: list[tuple[Any, list[Tensor]]] = []
        self._implicit: tuple[Any, Any, list[Tensor], int] | None = None
        self._updates = updates
        state = dict(inputs)
        for segment in segments:
            if segment["kind"] == "forward":
                run = self._runner(segment["package"])
                arguments = [state[v["name"]].contiguous() for v in segment["inputs"]]
                self._forward.append((run, arguments))
                names = [v["name"] for v in segment["outputs"]]
                state.update(zip(names, run(arguments), strict=True))
            else:
                state.update({v["name"]: outputs[v["name"]] for v in segment["unknowns"]})
                unknowns, givens = segment["unknown_group_infos"], segment["given_group_infos"]
                packed = [_packed(group, state) for group in (*unknowns, *givens)]
                jacobian, solve = self._runner(segment["jacobian_package"]), self._runner(segment["solve_package"])
                self._implicit = (jacobian, solve, packed, len(unknowns))
        self.block = self._fastest_block()

    def _runner(self, file: str) -> Any:
        return torch._C._aoti.AOTIModelPackageLoader(str(self._leaf / file), "model", False, 1, -1).run

    def forward(self) -> None:
        """Call all graphs: the floor."""
        for run, arguments in self._forward:
            run(arguments)
        self._newton(self.block, self.rows)

    def last_test(self) -> None:
        """Call the Jacobian graph once for each row, as the test that ends its solve does."""
        if self._implicit is None:
            return
        jacobian, _, packed, _ = self._implicit
        for start in range(0, self.rows, self.block):
            jacobian([x[start : start + self.block] for x in packed])

    def _newton(self, block: int, rows: int) -> None:
        if self._implicit is None:
            return
        jacobian, solve, packed, _ = self._implicit
        for start, active in self._plan(block):
            if start >= rows:
                break
            for count in active:
                solve(jacobian([x[start : start + count] for x in packed]))

    def _plan(self, block: int) -> list[tuple[int, list[int]]]:
        """For each block its start, and the number of rows with at least 1, 2, ... updates."""
        if block not in self._plans:
            plan = []
            for start in range(0, self.rows, block):
                updates = self._updates[start : start + block]
                most = int(updates.max()) if len(updates) else 0
                plan.append((start, [int((updates >= k).sum()) for k in range(1, most + 1)]))
            self._plans[block] = plan
        return self._plans[block]

    def _fastest_block(self) -> int:
        """Try the sizes on the first rows, each twice."""
        self._plans: dict[int, list[tuple[int, list[int]]]] = {}
        if self._implicit is None:
            return self.rows
        sizes = [size for size in BLOCKS if size < self.rows]
        if self.rows <= SAMPLE:
            sizes.append(self.rows)
        rows = min(self.rows, SAMPLE)
        seconds = {}
        for size in sizes:
            self._newton(size, min(rows, size))
            start = time.perf_counter()
            self._newton(size, rows)
            seconds[size] = time.perf_counter() - start
        return min(seconds, key=lambda size: seconds[size])


def _packed(group: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tensor:
    """A group's tensor, all variables side by side."""
    if group["structure"] != "dense" or group["sub_batch_shape"]:
        raise ValueError("a group of unknowns has a sub-batch, for which there is no floor here")
    parts: Sequence[Tensor] = [state[name].reshape(len(state[name]), -1) for name in group["var_names"]]
    return torch.cat(list(parts), -1).contiguous()
