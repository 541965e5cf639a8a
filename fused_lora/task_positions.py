"""Indices that a network makes itself, such as positions: an embedding of them has no row for each row of the batch.

With a task per row a layer takes the first dimension of what it gets for the batch. Whisper looks up positions (L,),
T5 the distance of every two tokens, (L, L): where L is by chance the number of rows, the size alone does not tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_CONSTANTS = {
    getattr(_aten, name)
    for name in ("arange", "linspace", "full", "zeros", "ones", "scalar_tensor", "eye", "tril_indices", "triu_indices")
}


class MadeInside(TorchDispatchMode):
    """Knows which tensors were made from constants alone while it was on: from arange and the like, and from those."""

    def __init__(self) -> None:
        super().__init__()
        # Held, so that no later tensor gets the memory, and with it the name, of one of them.
        self._storages: dict[int, Any] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that compiled blocks run compiled all the same; what they make inside is not seen."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = all(t in self for t in inputs) if inputs else func.overloadpacket in _CONSTANTS
        for leaf in tree_leaves(output):
            storage = _storage(leaf)
            if storage is not None and made:
                self._storages[storage._cdata] = storage
            elif storage is not None:
                self._storages.pop(storage._cdata, None)
        return output

    def __contains__(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._storages


def _storage(leaf: Any) -> Any:
    """None where a tensor has no memory of its own: sparse, a subclass, inside a transform of torch.func."""
    if not isinstance(leaf, Tensor):
        return None
    try:
        return leaf.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def differ_by_row(indices: Tensor) -> bool:
    """Whether the first dimension holds different things; token types and the like, the same for all rows, do not."""
    with torch.no_grad():
        return bool((indices != indices[:1]).any())
