"""What happens at a node: edits are written into it, stages are copied out of it, reducers look at
it in place."""

from dataclasses import dataclass

import numpy as np

from ..errors import CaptureError
from .edits import Edit, where
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
        self._before = {}  # node index -> [(taps, action)]
        self._scratch = Scratch(), Scratch()
        self._number, self._past, self._count = -1, 0, 0
        # ends: the computation ends after the last action; some: the last layer may have gone on
        # with some of the tokens, whose rows are all there are
        self.ends, self.some, self._last, self._ended = False, False, None, False

    def on(self, tap, action):
        """Call action(values, past) when the tap's node is computed; it returns whether it changed
        the values.

        values: (token, *tap.shape), or (head, query, key) for a grid, or (query, key) for a mask;
        where `key` runs over the cache, beyond the last token too."""
        self._actions.setdefault(tap.index, []).append((tap, action))

    def before(self, taps, action):
        """Call action(values, ..., past) with the values of several sources of one node, or None
        for a tap that is not there, before it is computed."""
        self._actions.setdefault(taps[0].after, [])  # computed by itself: what follows waits
        self._before.setdefault(taps[0].index, []).append((taps, action))

    def start(self, past, count):
        """Before each decode: how many tokens came before and how many come now."""
        self._number, self._past, self._count = -1, past, count
        self._last, self._ended = max(self._actions) if self.ends else None, False

    def observe(self, address, ask):
        if ask:
            if self._ended:  # another device goes on with nodes of its own
                return False
            self._number += 1
            for taps, action in self._before.get(self._number, ()):
                self._apply(address, taps, action)
            return self._number in self._actions
        for tap, action in self._actions[self._number]:
            self._apply(address, (tap,), action)
        self._ended = self._number == self._last
        return not self._ended

    def finish(self):
        """After each decode: waits for copies, raises PlanMismatch when the graph was another
        one."""
        if self.ggml.device:
            self.ggml.device.drain()
        if not self._ended and self._number + 1 != self.plan.n_nodes:
            raise PlanMismatch

    def _apply(self, address, taps, action):
        (values, where, tensor, at), *others = map(self._look, [address] * 2, taps, self._scratch)
        changed = action(values, *(other and other[0] for other in others), self._past)
        if not isinstance(values, np.ndarray):
            self.ggml.device.synchronize()
        elif changed and not self.ggml.on_host(tensor.buffer):
            self.ggml.write(where, self._scratch[0].last, at)

    def _look(self, address, tap, scratch):
        """(values, address, Tensor, offset in bytes) of what a tap looks at; None for no tap."""
        if not tap:
            return None
        tensor = Tensor.from_address(address)
        if tensor.name.decode("utf-8", "replace") != tap.name:
            raise PlanMismatch
        if tap.source is not None:
            address = tensor.src[tap.source]
            tensor = Tensor.from_address(address)
        layout = None
        if tap.view is not None:
            offset, ne, nb = tap.view
            count = tensor.ne[1] if self.some and tap.token_dim == 1 else self._count
            ne = (count if dim == tap.token_dim else size for dim, size in enumerate(ne))
            layout = offset, tuple(ne), nb
        values = self.ggml.array(address, layout, scratch)
        if tap.grid:
            values = values.reshape(values.shape[-1 - tap.grid :])
        elif tap.view is None:
            values = values.reshape((-1 if self.some else self._count, *tap.shape))
        return values, address, tensor, layout[0] if layout else 0


def on_host(values):
    """A NumPy array of values that may be CuPy's."""
    return values if isinstance(values, np.ndarray) else values.get()


@dataclass
class Copy:
    """Copies one stage of one layer into its place in a capture. Several taps of a stage add up.

    target: (token, ...) or (..., query, key), of the whole text or of `positions`, which are in
    order; first: this tap is written, the others are added; rounded: the cache's number format, in
    which attention sees keys and values; device: for CuPy's values."""

    target: np.ndarray
    stage: str
    first: bool
    positions: list | None = None
    rounded: np.dtype | None = None
    device: object = None

    def __call__(self, values, past):
        grid = STAGES[self.stage].grid
        axis = values.ndim - 2 if grid else 0
        rows = slice(past, past + values.shape[axis])
        if self.positions is not None:
            rows = slice(*np.searchsorted(self.positions, (past, rows.stop)))
            if rows.start == rows.stop:
                return
            here = [position - past for position in self.positions[rows]]
            values = on_host(values[(slice(None),) * axis + (here,)])
        if grid:
            if values.ndim > self.target.ndim:
                values = on_host(values.mean(0))  # over the heads
            place = self.target[(*map(slice, values.shape[:-2]), rows)]
            n_key = min(values.shape[-1], place.shape[-1])
            place[..., n_key:] = 0  # keys that came after these queries' part of the text
            place, values = place[..., :n_key], values[..., :n_key]
        else:
            place = self.target[(rows, *map(slice, values.shape[1:]))]
        if self.rounded:
            values = values.astype(self.rounded)
        if not self.first:
            if self.device:
                self.device.drain()  # what is added to must have arrived
            place += on_host(values)
        elif isinstance(values, np.ndarray):
            place[...] = values
        else:
            self.device.to_host(place, values)


@dataclass
class Apply:
    """Applies an Edit at a tap. first: of several taps that add up, this one takes the new values,
    the others none. mean: (head, feature)."""

    edit: Edit
    layer: int
    first: bool = True
    mean: np.ndarray | None = None

    def __call__(self, values, past):
        edit, stage = self.edit, STAGES[self.edit.stage]
        target = values.swapaxes(0, 1) if stage.grid else values  # (token, ...)
        rows = named(edit.positions, range(past, past + len(target))) - past
        if not rows.size:
            return False
        index = [rows]
        if stage.by_head:
            index.append(named(edit.head, range(target.shape[1])))
        if stage.grid:
            index.append(named(edit.keys, range(target.shape[2])))
            if not index[2].size:  # keys that come later
                return False
        place = np.ix_(*index) if len(index) > 1 else rows
        new = self._new(on_host(target[place]), [rows + past, *index[1:]])
        if not isinstance(values, np.ndarray):
            import cupy

            new = cupy.asarray(new)
        target[place] = new
        return True

    def _new(self, old, index):
        edit = self.edit
        if edit.mean:
            return self.mean[index[1]] if self.first else np.zeros_like(old)
        new = old * np.float32(edit.factor) if edit.factor else np.zeros_like(old)
        if edit.values is None or not self.first:
            return new
        given = self._given(old, index)
        return new + given if edit.factor else given

    def _given(self, old, index):
        """The summand at positions, heads and keys, as `old`."""
        edit, stage = self.edit, STAGES[self.edit.stage]
        if not edit.whole:
            given = edit.values[index[1]] if edit.values.ndim == 2 else edit.values
            return np.broadcast_to(given, old.shape)
        given = edit.values.swapaxes(0, 1) if stage.by_head else edit.values
        what, last = f"the patch for {edit.stage!r} of layer {self.layer}", int(index[0][-1])
        if last >= len(given):
            raise CaptureError(
                f"{what} holds {len(given)} positions and position {last} was asked for: name "
                "`positions` that both runs have."
            )
        given = given[index[0]]
        if stage.by_head:
            given = given[:, index[1]]
        if not stage.grid:
            return given
        # The cache is longer than the text, or holds only what came in this batch and before.
        count = given.shape[-1]
        later = named(edit.keys, range(index[2][-1] + 1, count))
        if edit.stage == "attention" and given[..., later].any():
            raise CaptureError(
                f"{what} gives weight to keys after position {int(index[2][-1])}, which position "
                f"{last} cannot see yet: leave them zero."
            )
        inside = index[2] < count
        return np.concatenate([given[..., index[2][inside]], old[..., ~inside]], -1)


def named(some, there):
    """Those of a range that a tuple, a slice or None names, as an array."""
    wanted = where(some)
    return np.array([one for one in there if one in wanted], int)


@dataclass
class Cut:
    """Cuts the edges of a knock-out before a softmax. counts: what it adds up the edges in, under
    `name`; sinks: rows may stay without a key, as the sink takes their attention."""

    edit: Edit
    layer: int
    sinks: bool
    counts: dict
    name: tuple

    def __call__(self, scores, mask, past):
        rows = named(self.edit.positions, range(past, past + scores.shape[1])) - past
        heads = named(self.edit.head, range(len(scores)))
        keys = named(self.edit.keys, range(scores.shape[2]))
        if not rows.size or not keys.size:
            return False
        seen = np.ones((len(rows), scores.shape[2]), bool)
        if mask is not None:
            seen = ~np.isneginf(on_host(mask[rows]).astype(np.float32))
        self.counts[self.name] += int(seen[:, keys].sum())
        place = np.ix_(heads, rows, keys)
        scores[place] = -np.inf
        # What other edits cut before counts, too
        left = (seen & ~np.isneginf(on_host(scores[np.ix_(heads, rows)]))).any(-1)
        if not left.all() and not self.sinks:
            head, row = np.argwhere(~left)[0]
            raise CaptureError(
                f"no key would be left for query {int(rows[row]) + past} in head {int(heads[head])} "
                f"of layer {self.layer}: leave it one, or ablate the head."
            )
        return True
