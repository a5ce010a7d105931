"""Copies that stay in the calling thread.

torch copies a large tensor with all its threads. For the blocks of rows here that wins next to nothing; and where other
programs use the processors too, the call waits at each copy until its helpers have had their turn. Nothing is recorded
for autograd here, whatever the tensors ask for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Up to so many entries torch's operators use one thread (at::internal::GRAIN_SIZE).
GRAIN = 32768


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors side by side along their last axis; a single one is given as it is."""
    if len(parts) == 1:
        return parts[0]
    if _stays(parts[0]):
        return torch.cat(list(parts), -1)
    return torch.from_numpy(np.concatenate([part.detach().numpy() for part in parts], -1))


def contiguous(x: Tensor) -> Tensor:
    """A tensor, or its copy with rows one after the other in memory."""
    if x.is_contiguous():
        return x
    return x.contiguous() if _stays(x) else torch.from_numpy(np.ascontiguousarray(x.detach().numpy()))


def put(target: Tensor, index: Tensor | slice, x: Tensor) -> None:
    """Write rows in their places.

    Args:
        target: `(rows, ...)`.
        index: which rows.
        x: `(as many, ...)`, or `(1, ...)` for all of them.
    """
    if isinstance(index, Tensor) or _stays(x):
        target[index] = x
    else:
        target.numpy()[index] = x.detach().numpy()


def _stays(x: Tensor) -> bool:
    """Whether torch copies it in the calling thread, or must do it in any case."""
    return x.numel() < GRAIN or not x.is_cpu
