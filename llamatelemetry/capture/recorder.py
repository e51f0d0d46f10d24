"""What happens at a node: edits are written into it, stages are copied out of it, reducers look at it in place."""

import numpy as np

from ..errors import CaptureError
from .ggml import Scratch, Tensor
from .names import GRIDS, STAGES


class PlanMismatch(Exception):
    """The graph that is being evaluated is not the one that was planned: plan again with these tokens."""


class Recorder:
    """Actions by node index for one run. `observe` is the evaluation callback."""

    def __init__(self, ggml, plan):
        self.ggml, self.plan = ggml, plan
        self._actions = {}  # node index -> [(tap, action)], in the order in which they were added
        self._scratch = Scratch()
        self._number, self._past, self._count = -1, 0, 0

    def on(self, tap, action):
        """Call action(values, past) when the tap's node is computed; it returns whether it changed the values.

        values: (token, *tap.shape), or (head, query, key) for a grid, or (query, key) for a mask; where `key` runs
        over the cache, beyond the last token too.
        """
        self._actions.setdefault(tap.index, []).append((tap, action))

    def start(self, past, count):
        """Before each decode: how many tokens came before and how many come now."""
        self._number, self._past, self._count = -1, past, count

    def observe(self, address, ask):
        if ask:
            self._number += 1
            return self._number in self._actions
        for tap, action in self._actions[self._number]:
            self._apply(address, tap, action)
        return True

    def finish(self):
        """After each decode: raises PlanMismatch when the graph was another one."""
        if self._number + 1 != self.plan.n_nodes:
            raise PlanMismatch

    def _apply(self, address, tap, action):
        tensor = Tensor.from_address(address)
        if tensor.name.decode("utf-8", "replace") != tap.name:
            raise PlanMismatch
        if tap.source is not None:
            address = tensor.src[tap.source]
            tensor = Tensor.from_address(address)
        offset, ne, nb = tap.view or (0, None, None)
        if ne is not None:
            ne = tuple(self._count if dim == tap.token_dim else size for dim, size in enumerate(ne))
        values = self.ggml.array(address, offset, ne, nb, self._scratch)
        if tap.grid:
            values = values.reshape(values.shape[-1 - tap.grid :])
        elif tap.view is None:
            values = values.reshape((self._count, *tap.shape))
        if action(values, self._past) and not self.ggml.on_host(tensor.buffer):
            self.ggml.write(address, self._scratch.last, offset)


class Copy:
    """Copies one stage of one layer into its place in a capture. Several taps of a stage add up."""

    def __init__(self, target, stage, first, queries=None, rounded=None):
        """target: (token, ...) or (..., query, key), the whole text; queries: {position: row} or None for all;
        rounded: the cache's number format, in which attention sees keys and values."""
        self.target, self.stage, self.first, self.queries, self.rounded = target, stage, first, queries, rounded

    def __call__(self, values, past):
        if self.stage in GRIDS:
            return self._grid(values, past)
        place = self.target[past : past + len(values)]
        place = place[(slice(None), *(slice(size) for size in values.shape[1:]))]
        if self.rounded:
            values = values.astype(self.rounded)
        if self.first:
            place[...] = values
        else:
            place += values

    def _grid(self, values, past):
        n_query = values.shape[-2]
        n_key = min(values.shape[-1], self.target.shape[-1])
        heads = (slice(len(values)),) if values.ndim == 3 else ()
        if self.queries is None:
            self.target[(*heads, slice(past, past + n_query), slice(n_key))] = values[..., :n_key]
            return
        for position, row in self.queries.items():
            if past <= position < past + n_query:
                self.target[(*heads, row, slice(n_key))] = values[..., position - past, :n_key]


class Apply:
    """Applies an Edit at a tap. first: of several taps that add up, this one takes the new values, the others none."""

    def __init__(self, edit, first=True, mean=None):
        self.edit, self.first, self.mean = edit, first, mean

    def __call__(self, values, past):
        edit = self.edit
        target = values.swapaxes(0, 1) if edit.stage in GRIDS else values  # (token, ...)
        positions = range(len(target)) if edit.positions is None else [p - past for p in edit.positions]
        rows = np.array([row for row in positions if 0 <= row < len(target)], int)
        if not rows.size:
            return False
        if edit.head is not None:
            target = target[:, edit.head]
        target[rows] = self._new(target[rows], rows + past)
        return True

    def _new(self, old, positions):
        edit = self.edit
        if edit.mean:
            return self.mean if self.first else np.zeros_like(old)
        if edit.values is None:
            return old * np.float32(edit.factor) if edit.factor else np.zeros_like(old)
        if not self.first:
            return np.zeros_like(old)
        given = edit.values.swapaxes(0, 1) if "head" in STAGES[edit.stage].dims else edit.values
        if edit.head is not None:
            given = given[:, edit.head]
        if positions[-1] >= len(given):
            raise CaptureError(
                f"the patch for {edit.stage!r} of layer {edit.layer} holds {len(given)} positions and position "
                f"{int(positions[-1])} was asked for: name `positions` that both runs have."
            )
        given = given[positions]
        if edit.stage in GRIDS:  # the cache is longer than the text
            given = np.concatenate([given, old[..., given.shape[-1] :]], -1)
        if given.shape != old.shape:
            raise CaptureError(f"the patch for {edit.stage!r} has shape {given.shape}, the model has {old.shape}.")
        return given
