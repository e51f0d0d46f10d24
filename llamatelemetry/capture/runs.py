"""One model inside the worker: its graph planned once, then run with edits, copies and reducers."""

from pathlib import Path

import numpy as np

from ..errors import CaptureError, NotFiniteError
from .edits import where
from .finite import MISSING, check_finite
from .ggml import DTYPES
from .names import STAGES
from .recorder import Apply, Copy, Cut, PlanMismatch, Recorder, named, on_host
from .stages import find_stages

# Enough for the graph of a prompt; recurrent models have another graph for a single token.
PLAN_TOKENS = 3


class Runs:
    def __init__(self, runtime, architecture):
        self.runtime, self.architecture = runtime, architecture
        self.n_layer = runtime.n_layer
        self._plans = {}  # whether a single token -> Plan
        # Of the last predict: tokens, how many of them the context holds unedited, runtime.steps
        self.kept = [], 0, -1

    def plan(self, tokens):
        """The Plan of the graph that decodes these tokens."""
        single = len(tokens) == 1
        if single not in self._plans:
            self._make_plan(tokens[:PLAN_TOKENS])
        return self._plans[single]

    def _make_plan(self, tokens):
        graph = self.runtime.graph(tokens)
        self._plans[len(tokens) == 1] = find_stages(graph, len(tokens), self.n_layer)

    def taps(self, plan, stage, layer):
        """The Taps of a stage of a layer, in the order of evaluation; raises CaptureError where
        there is none."""
        found = plan.of(stage).get(layer)
        if found is None:
            reason = plan.why(stage)
            where = "" if layer is None else f"layer {layer} of "
            raise CaptureError(
                f"{where}architecture {self.architecture!r} gives no stage {stage!r}: {reason}."
            )
        return sorted(found, key=lambda tap: tap.index)

    def stages(self):
        """{stage: {"layers", "why"}}: which layers have it, and why the others have not; from the
        graph of a prompt."""
        plan = self.plan(list(range(min(PLAN_TOKENS, self.runtime.n_vocab))))
        return {name: {"layers": plan.found(name), "why": plan.why(name)} for name in STAGES}

    def layers_of(self, plan, stage, wanted=None):
        """The layers that have a stage, [None] for one without layers; wanted: only these."""
        if not STAGES[stage].per_layer:
            self.taps(plan, stage, None)
            return [None]
        for layer in () if wanted is None else wanted:
            if not 0 <= layer < self.n_layer + 1:
                last = self.n_layer - (stage != "hidden")
                raise CaptureError(
                    f"layer {layer} is out of range: {stage!r} has layers 0 to {last}."
                )
        layers = [layer for layer in plan.found(stage) if wanted is None or layer in wanted]
        if not layers:
            self.taps(plan, stage, next(iter(wanted)) if wanted else 0)
        return layers

    def run(self, tokens, setup=None, *, past=0, restart=None, **how):
        """Decode tokens in an empty context; setup(recorder, plan) adds the actions.

        past: so many of them are in the context from the run before; only the others are decoded.
        how: all_logits=True; else each text's last. on_logits(logits, past): after each chunk,
        (n_outputs, n_vocab).
        sampler: its `next(logits row)` gives the following token or None; each is decoded alone.
        lengths: of several texts that follow one another, together at most one batch. restart():
        forget what a run gave that has to be done again because its graph was not the planned one.
        Returns all tokens, those generated included. CaptureError where logits are wanted of a
        model that predicts nothing, NotFiniteError where they are no numbers."""
        sampler = how.get("sampler")
        if how.get("on_logits") or sampler:
            self.runtime.check_predicts()
        for last in (False, True):
            try:
                return self._run(list(tokens), setup, past=past, **how)
            except PlanMismatch:
                if last:
                    raise CaptureError(
                        f"the graph of architecture {self.architecture!r} changes within one prompt in a way that "
                        "capture does not follow; try a prompt of at most 512 tokens."
                    ) from None
                self._make_plan(tokens[: self.runtime.n_batch])
                past = 0
                for again in filter(None, (restart, sampler and sampler.restart)):
                    again()
            except NotFiniteError:
                self.locate(tokens, setup)
                raise

    def locate(self, tokens, setup=None):
        """Raise NotFiniteError for the first stage, in the order of evaluation, that holds a value
        that is no number; return where a run of these tokens has none."""

        file = Path(self.runtime.path).name

        def watch(stage, layer):
            return lambda values, past: check_finite(on_host(values), stage, layer, file) is None

        def watch_all(recorder, plan):
            if setup:
                setup(recorder, plan)
            for stage in (name for name in plan.taps if not STAGES[name].masked):
                for layer in plan.taps[stage]:
                    for tap in self.taps(plan, stage, layer):
                        recorder.on(tap, watch(stage, layer))

        self._run(list(tokens), watch_all)

    def _run(
        self, tokens, setup, *, all_logits=True, on_logits=None, sampler=None, past=0, lengths=()
    ):
        total = len(tokens) + (sampler.limit if sampler else 0)
        self._edges = {}  # (edit, layer) -> edges cut
        if not (past and self.runtime.rewind(past)):
            past = 0
        pieces = [(past + at, piece) for at, piece in self.runtime.pieces(tokens[past:], total)]
        kinds = {len(piece) == 1 for _, piece in pieces} | ({True} if sampler else set())
        recorders = {}
        for single in kinds:
            plan = self.plan(tokens[:1] if single else tokens)
            recorders[single] = Recorder(self.runtime.ggml, plan)
            if setup:
                setup(recorders[single], plan)
        if not past:
            self.runtime.open(total, len(lengths) > 1)
        if len(pieces) > 1 and self.runtime.reads_whole:
            raise CaptureError(
                f"{self.runtime.name} reads a text as a whole, at most {len(pieces[0][1])} tokens at "
                f"once: this one has {len(tokens)}. Shorten it."
            )

        def decode(piece, past):
            recorder = recorders[len(piece) == 1]
            recorder.start(past, len(piece))
            first = 0 if all_logits else past + len(piece) - 1
            self.runtime.decode(piece, past, first, recorder.observe, lengths)
            recorder.finish()
            if not on_logits and not sampler:
                return None
            logits = self.runtime.logits(len(piece) if all_logits else 1)
            if on_logits:
                on_logits(logits, past)
            return logits

        for past, piece in pieces:
            logits = decode(piece, past)
        while sampler and (token := sampler.next(logits[-1])) is not None:
            logits = decode([token], len(tokens))
            tokens.append(token)
        if none := [layer for (_, layer), count in self._edges.items() if not count]:
            raise CaptureError(
                f"a knock-out names no edge of layer {none[0]}: the model's mask hides every key that "
                "it names from every query that it names (keys come before, within a window)."
            )
        return tokens

    def apply(self, recorder, plan, edits, total, means=()):
        """Add the actions of edits to a recorder. Edits come first: a capture shows the edited
        values.

        total: tokens that the run may have; an edit beyond them would do nothing and is refused.
        """
        for number, edit in enumerate(edits):
            self._check_places(edit, total)
            for layer in self._edited(plan, edit):
                if edit.cut:
                    taps, sinks = plan.edges[layer], plan.layers[layer]["sinks"]
                    self._edges.setdefault((number, layer), 0)
                    cut = Cut(edit, layer, sinks, self._edges, (number, layer))
                    recorder.before(taps, cut)
                    continue
                for place, tap in enumerate(self.taps(plan, edit.stage, layer)):
                    mean = means[layer] if edit.mean else None
                    recorder.on(tap, Apply(edit, layer, place == 0, mean))

    def late(self, edits):
        """Whether edits change what the last layer has only of the positions whose logits are asked
        for."""
        last = self.n_layer - 1
        return any(
            STAGES[edit.stage].late and {last, last + 1} & set(named(edit.layer, range(last + 2)))
            for edit in edits
        )

    def _edited(self, plan, edit):
        """The layers of an edit, each of which has the heads and the width that it names."""
        there = STAGES[edit.stage].layers(self.n_layer)
        chosen = edit.layer
        if isinstance(chosen, slice):
            chosen = [layer for layer in plan.found(edit.stage) if layer in where(chosen)]
        for layer in chosen or [edit.layer.start]:
            if layer not in there:
                raise CaptureError(
                    f"an edit names layer {layer} of {edit.stage!r}: there are layers 0 to {there[-1]}."
                )
            tap = self.taps(plan, edit.stage, layer)[0]
            if isinstance(edit.head, tuple) and edit.head[-1] >= tap.shape[0]:
                raise CaptureError(
                    f"an edit names head {edit.head[-1]} of layer {layer}: it has heads 0 to "
                    f"{tap.shape[0] - 1}."
                )
            self._check_width(edit, layer, tap.shape)
            other = plan.of({"k": "v", "v": "k"}.get(edit.stage)).get(layer, [])
            if any(tap.overlaps(one) for one in other):
                raise CaptureError(
                    f"layer {layer} of architecture {self.architecture!r} keeps keys and values in one "
                    "vector (multi-head latent attention): an edit of one is an edit of both. Edit "
                    "its scores or attn_heads."
                )
            owner = next(one for one, taps in plan.of(edit.stage).items() if tap in taps)
            if owner != layer:
                raise CaptureError(
                    f"layer {layer} has no {edit.stage!r} of its own: it reads those of layer {owner}, "
                    "and an edit there is one for both. Name that layer."
                )
        return chosen

    @staticmethod
    def _check_width(edit, layer, shape):
        """CaptureError where a summand is not as wide as a stage: shape (width,) or (head,
        feature)."""
        given = () if edit.values is None else edit.values.shape
        if edit.whole:  # without its positions
            given = given[:1] if STAGES[edit.stage].grid else given[:-2] + given[-1:]
        if given != shape[len(shape) - len(given) :]:
            raise CaptureError(
                f"an edit of {edit.stage!r} has values of shape {edit.values.shape}, and layer {layer} "
                f"of this model has {' x '.join(map(str, shape))} per token: it is of another model?"
            )

    @staticmethod
    def _check_places(edit, total):
        for name, some in (("position", edit.positions), ("key", edit.keys)):
            last = where(some)[-1] if isinstance(some, tuple) else where(some)[0]
            if last >= total:
                raise CaptureError(f"an edit names {name} {last}: the text has {total} tokens.")

    def means(self, tokens, edits):
        """{layer: (head, feature)} mean over positions of every head's output, of the layers that
        mean ablation among the edits needs."""
        needs, sums = [edit for edit in edits if edit.mean], {}

        def setup(recorder, plan):
            for layer in sorted({layer for edit in needs for layer in self._edited(plan, edit)}):
                for tap in self.taps(plan, "attn_heads", layer):
                    recorder.on(tap, lambda values, past, layer=layer: add(layer, values))

        def add(layer, values):
            sums[layer] = sums.get(layer, 0) + on_host(values.sum(0, dtype=np.float64))

        if needs:
            self.run(tokens, setup, all_logits=False, restart=sums.clear)
        return {layer: (total / len(tokens)).astype(np.float32) for layer, total in sums.items()}

    def capture(self, tokens, stages, arena, positions, *, layers=None, edits=(), sampler=None):
        """Copy stages of a run into an arena. Returns (tokens, {stage: {layers, offset, shape,
        dtype}}, layer facts).

        arena(n_bytes) gives a buffer, which may hold what an earlier capture left there. positions:
        {stage: those that are copied, in order}, of a stage that is not there all.
        """
        means, plan = self.means(tokens, edits), self.plan(tokens)
        total = len(tokens) + (sampler.limit if sampler else 0)
        layout, n_bytes = self._layout(plan, stages, layers, total, positions)
        memory, arrays = arena(n_bytes), {}
        for stage, part in layout.items():
            array = np.ndarray(part["shape"], part["dtype"], memory, part["offset"])
            if part["uneven"]:  # what a layer does not have is not a number
                array.fill(MISSING if array.dtype.kind == "f" else -1)
            arrays[stage] = array if STAGES[stage].per_layer else array[None]
        # Quantized keys are shown as they go into the cache.
        cache = {stage: DTYPES.get(kind) for stage, kind in self.runtime.cache_types.items()}
        device = self.runtime.ggml.device
        layer_facts = [dict(facts) for facts in plan.layers]

        def setup(recorder, plan):
            self._watch_masks(recorder, plan, layer_facts)
            self.apply(recorder, plan, edits, total, means)
            for stage, array in arrays.items():
                rounded = cache[stage] if STAGES[stage].cached else None
                chosen = positions.get(stage)
                for target, layer in zip(array, layout[stage]["layers"]):
                    if not STAGES[stage].grid and target.ndim == 3:
                        target = target.swapaxes(0, 1)  # (token, head, feature), as in the graph
                    for number, tap in enumerate(self.taps(plan, stage, layer)):
                        recorder.on(tap, Copy(target, stage, number == 0, chosen, rounded, device))

        needs_all = any(STAGES[stage].late for stage in stages) or self.late(edits)
        tokens = self.run(tokens, setup, all_logits=needs_all, sampler=sampler)
        return tokens, layout, layer_facts

    def _layout(self, plan, stages, layers, total, positions):
        """({stage: where its array lies in an arena}, bytes of the arena)."""
        layout, n_bytes = {}, 0
        for stage in stages:
            facts, kept = STAGES[stage], self.layers_of(plan, stage, layers)
            shapes = [self.taps(plan, stage, layer)[0].shape for layer in kept]
            widths = tuple(max(sizes) for sizes in zip(*shapes))
            count = len(positions.get(stage, range(total)))
            shape = (*widths, count, total) if facts.grid else (*widths[:-1], count, widths[-1])
            shape = (len(kept), *shape) if facts.per_layer else shape
            layout[stage] = {
                "layers": kept,
                "offset": n_bytes,
                "shape": shape,
                "dtype": facts.dtype,
                "uneven": len(set(shapes)) > 1,
            }
            n_bytes += -(-int(np.prod(shape)) * 4 // 64) * 64
        return layout, n_bytes

    def _watch_masks(self, recorder, plan, layer_facts):
        """Note which layers' masks hide earlier positions in this run: a sliding window that the
        text outgrew."""

        def watch(layers):
            def look(values, past):
                row = on_host(values[-1, : past + len(values)])
                for layer in layers if np.isneginf(row).any() else ():
                    layer_facts[layer]["sliding"] = True

            return look

        for layers in plan.masks.values():
            recorder.on(plan.taps["mask"][layers[0]][0], watch(layers))
