"""Promoted parameters as one call sees them: a snapshot, each value common to all rows or one per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


class Values:
    """The parameters in force during one call.

    Args:
        tensors: by authored name, `base_shape` when common to all rows, else `(rows, *base_shape)`.
        base_ranks: number of base axes of each.
    """

    def __init__(self, tensors: Mapping[str, Tensor], base_ranks: Mapping[str, int]) -> None:
        self._tensors = dict(tensors)
        self._base_ranks = base_ranks

    def per_row(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose value differs from row to row."""
        return [name for name in names if self._tensors[name].ndim > self._base_ranks[name]]

    def common(self, names: Iterable[str]) -> list[Tensor]:
        """Values without a batch axis, for graphs that were traced so."""
        return [self._tensors[name] for name in names]

    def expanded(self, names: Iterable[str], rows: int) -> list[Tensor]:
        """Values with one entry per row, `(rows, *base_shape)`."""
        found = []
        for name in names:
            value = self._tensors[name]
            found.append(value if value.ndim > self._base_ranks[name] else value.expand(rows, *value.shape))
        return found

    def take(self, rows: Tensor | slice, fixed: Mapping[str, Tensor] | None = None) -> Values:
        """The values of some rows.

        Args:
            rows: the rows.
            fixed: values that take the place of those that differ from row to row.
        """
        tensors = {n: t[rows] if t.ndim > self._base_ranks[n] else t for n, t in self._tensors.items()}
        return Values({**tensors, **(fixed or {})}, self._base_ranks)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]
