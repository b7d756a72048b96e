"""Counts of the operations that torch is asked for."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"alias", "detach", "expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unbind"}
VIEWS |= {"unsqueeze", "view", "_unsafe_view", "_reshape_alias"}


class Count(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    @property
    def total(self):
        return sum(self.counts.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
