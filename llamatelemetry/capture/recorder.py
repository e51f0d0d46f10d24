"""What happens at a node: edits are written into it, stages are copied out of it, reducers look at
it in place."""

from dataclasses import dataclass

import numpy as np

from ..errors import CaptureError
from .edits import Edit
from .ggml import Scratch, Tensor
from .names import STAGES


class PlanMismatch(Exception):
    """The graph that is being evaluated is not the one that was planned: plan again with these
    tokens."""


class Recorder:
    """Actions by node index for one run. `observe` is the evaluation callback."""

    def __init__(self, ggml, plan):
        self.ggml, self.plan = ggml, plan
        self._actions = {}  # node index -> [(tap, action)], in the order in which they were added
        self._scratch = Scratch()
        self._number, self._past, self._count = -1, 0, 0

    def on(self, tap, action):
        """Call action(values, past) when the tap's node is computed; it returns whether it changed
        the values.

        values: (token, *tap.shape), or (head, query, key) for a grid, or (query, key) for a mask;
        where `key` runs over the cache, beyond the last token too."""
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
        """After each decode: waits for copies, raises PlanMismatch when the graph was another
        one."""
        if self.ggml.device:
            self.ggml.device.drain()
        if self._number + 1 != self.plan.n_nodes:
            raise PlanMismatch

    def _apply(self, address, tap, action):
        tensor = Tensor.from_address(address)
        if tensor.name.decode("utf-8", "replace") != tap.name:
            raise PlanMismatch
        if tap.source is not None:
            address = tensor.src[tap.source]
            tensor = Tensor.from_address(address)
        layout = None
        if tap.view is not None:
            offset, ne, nb = tap.view
            ne = tuple(self._count if dim == tap.token_dim else size for dim, size in enumerate(ne))
            layout = offset, ne, nb
        values = self.ggml.array(address, layout, self._scratch)
        if tap.grid:
            values = values.reshape(values.shape[-1 - tap.grid :])
        elif tap.view is None:
            values = values.reshape((self._count, *tap.shape))
        changed = action(values, self._past)
        if not isinstance(values, np.ndarray):
            self.ggml.device.synchronize()
        elif changed and not self.ggml.on_host(tensor.buffer):
            self.ggml.write(address, self._scratch.last, layout[0] if layout else 0)


def on_host(values):
    """A NumPy array of values that may be CuPy's."""
    return values if isinstance(values, np.ndarray) else values.get()


@dataclass
class Copy:
    """Copies one stage of one layer into its place in a capture. Several taps of a stage add up.

    target: (token, ...) or (..., query, key), the whole text; first: this tap is written, the
    others are added; queries: {position: row} or None for all; rounded: the cache's number format,
    in which attention sees keys and values; device: for CuPy's values."""

    target: np.ndarray
    stage: str
    first: bool
    queries: dict | None = None
    rounded: np.dtype | None = None
    device: object = None

    def __call__(self, values, past):
        if STAGES[self.stage].grid:
            return self._grid(values, past)
        place = self.target[past : past + len(values)]
        place = place[(slice(None), *(slice(size) for size in values.shape[1:]))]
        if self.rounded:
            values = values.astype(self.rounded)
        if self.first:
            self._store(place, values)
        else:
            if self.device:
                self.device.drain()  # what is added to must have arrived
            place += on_host(values)

    def _store(self, place, values):
        if isinstance(values, np.ndarray):
            place[...] = values
        else:
            self.device.to_host(place, values)

    def _grid(self, values, past):
        if values.ndim > self.target.ndim:
            values = on_host(values.mean(0))  # over the heads
        n_query = values.shape[-2]
        n_key = min(values.shape[-1], self.target.shape[-1])
        heads = (slice(len(values)),) if values.ndim == 3 else ()
        if self.queries is None:
            place = self.target[(*heads, slice(past, past + n_query))]
            self._store(place[..., :n_key], values[..., :n_key])
            place[..., n_key:] = 0  # keys that came after these queries' part of the text
            return
        here = [
            (row, position - past)
            for position, row in self.queries.items()
            if 0 <= position - past < n_query
        ]
        if here:
            rows, chosen = map(list, zip(*here))
            self.target[(*heads, rows, slice(n_key))] = on_host(values[..., chosen, :n_key])
            self.target[(*heads, rows, slice(n_key, None))] = 0


@dataclass
class Apply:
    """Applies an Edit at a tap. first: of several taps that add up, this one takes the new values,
    the others none."""

    edit: Edit
    first: bool = True
    mean: np.ndarray | None = None

    def __call__(self, values, past):
        edit = self.edit
        target = values.swapaxes(0, 1) if STAGES[edit.stage].grid else values  # (token, ...)
        everywhere = range(past, past + len(target))
        positions = everywhere if edit.positions is None else edit.positions
        rows = np.array([one - past for one in positions if one in everywhere], int)
        if not rows.size:
            return False
        if edit.head is not None:
            target = target[:, edit.head]
        new = self._new(on_host(target[rows]), rows + past)
        if not isinstance(values, np.ndarray):
            import cupy

            new = cupy.asarray(new)
        target[rows] = new
        return True

    def _new(self, old, positions):
        edit = self.edit
        if edit.mean:
            return self.mean if self.first else np.zeros_like(old)
        if edit.values is None:
            return old * np.float32(edit.factor) if edit.factor else np.zeros_like(old)
        if not self.first:
            return np.zeros_like(old)
        given = edit.values.swapaxes(0, 1) if STAGES[edit.stage].by_head else edit.values
        if edit.head is not None:
            given = given[:, edit.head]
        if positions[-1] >= len(given):
            raise CaptureError(
                f"the patch for {edit.stage!r} of layer {edit.layer} holds {len(given)} positions and position "
                f"{int(positions[-1])} was asked for: name `positions` that both runs have."
            )
        given = given[positions]
        if STAGES[edit.stage].grid:
            # The cache is longer than the text, or holds only what came in this batch and before.
            n_key = old.shape[-1]
            if given[..., n_key:].any():
                raise CaptureError(
                    f"the patch for {edit.stage!r} of layer {edit.layer} gives weight to keys after position "
                    f"{n_key - 1}, which position {int(positions[-1])} cannot see yet: leave them zero."
                )
            given = np.concatenate([given[..., :n_key], old[..., given.shape[-1] :]], -1)
        if given.shape != old.shape:
            raise CaptureError(
                f"the patch for {edit.stage!r} has shape {given.shape}, the model has {old.shape}."
            )
        return given
