"""A checked request: its head, which many requests have in common, and its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from ._asgi import Headers
from ._operations import Operation
from ._tensors import DTYPES, Array

# Where a tensor lies in the binary data: its first entry, the one behind its last, and its shape.
Place = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Head:
    """What a request asks for; requests that differ in their binary data alone share it.

    Args:
        operation: that it asks for.
        names: of its tensors, in the operation's order.
        rows: how many.
        overrides: values of promoted parameters, `base` or `(rows, *base)`.
        pairs: derivative blocks to evaluate; None where the operation has none.
        outputs: names of the tensors of the answer, each with whether it is sent as binary data.
        id: that the client gave.
        key: calls with the same key may be evaluated together.
        places: where its tensors lie in the binary data; empty where any of them is JSON.
        size: of the binary data, in bytes.
        answers: heads of answers in which all tensors are binary data, by the shapes of these; `answers` keeps them.
    """

    operation: Operation
    names: tuple[str, ...]
    rows: int
    overrides: dict[str, Array]
    pairs: tuple[tuple[str, str], ...] | None
    outputs: tuple[tuple[str, bool], ...]
    id: str | None
    key: Hashable
    places: tuple[Place, ...] = ()
    size: int = 0
    answers: dict[tuple[tuple[int, ...], ...], tuple[Headers, bytes]] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the tensors, which all have the model's."""
        return DTYPES[self.operation.ports[self.names[0]].datatype]


class Call:
    """A request, checked.

    Args:
        head: what it asks for.
        data: its tensors, each `(rows, ...)`, in the order of `head.names`; or all of them as binary data.
    """

    __slots__ = ("data", "head", "operation", "rows")

    def __init__(self, head: Head, data: list[Array] | memoryview) -> None:
        self.head, self.data = head, data
        self.operation, self.rows = head.operation, head.rows

    @property
    def arrays(self) -> list[Array]:
        """The tensors; where they are views on the binary data, not to be written to."""
        if isinstance(self.data, list):
            return self.data
        entries = np.frombuffer(self.data, self.head.dtype)
        return [entries[begin:end].reshape(shape) for begin, end, shape in self.head.places]


def joined(calls: list[Call]) -> list[Array]:
    """The tensors of calls one behind the other, `(rows of all calls, ...)`: the only copy that is made of them.

    Args:
        calls: with the same operation and the same names of tensors.
    """
    head = calls[0].head
    if not head.places or any(call.head is not head for call in calls):
        every = [call.arrays for call in calls]
        return [np.concatenate(parts) for parts in zip(*every, strict=True)]
    entries = np.frombuffer(b"".join([call.data for call in calls]), head.dtype)  # type: ignore[misc]
    matrix = entries.reshape(len(calls), -1)
    rows = len(calls) * head.rows
    return [np.array(matrix[:, begin:end]).reshape(rows, *shape[1:]) for begin, end, shape in head.places]
