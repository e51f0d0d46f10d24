"""`explore(engine)`: type a prompt, choose a head, switch it off, cut its edges, add a direction,
and see the next token change.

Controls are ipywidgets' own: Kaggle's editor has them, and no others (a widget of one's own, also
anywidget's, needs an extension that is there before the editor starts). The picture is a plain
output that is replaced, so that a saved notebook keeps the last one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import CaptureError, LlamaTelemetryError
from ..imports import uninterrupted
from ..views.text import shorten, token_text
from . import picture
from .question import Answer, Asker, Question

if TYPE_CHECKING:
    from ..engine import InferenceEngine

PROMPT = "The capital of France is"


class Explorer:
    """The controls and the picture that `explore` shows. question, answer: what was asked last, and
    what came of it."""

    def __init__(self, asker: Asker, question: Question, model: str) -> None:
        with uninterrupted():
            import ipywidgets as widgets

        self.asker, self.question, self.model = asker, question, model
        self.answer: Answer | None = None
        self._shown: Any = None
        self._setting = False
        gguf = asker.engine.model
        assert gguf is not None  # explore() has looked
        wide, small = widgets.Layout(width="98%"), widgets.Layout(width="150px")
        count = dict(layout=small, min=0)
        self.prompt = widgets.Text(
            question.prompt, description="Prompt", continuous_update=False, layout=wide
        )
        self.layer = widgets.BoundedIntText(
            question.layer, description="Layer", max=gguf.n_layer - 1, **count
        )
        self.head = widgets.BoundedIntText(
            question.head, description="Head", max=gguf.n_head - 1, **count
        )
        self.switch = widgets.Button(description="Switch head off", layout=small)
        self.query = widgets.Dropdown(description="Query", layout=widgets.Layout(width="230px"))
        self.key = widgets.Dropdown(description="Key", layout=widgets.Layout(width="230px"))
        self.cut = widgets.Button(description="Cut edge", layout=small)
        self.clear = widgets.Button(description="Clear edits", layout=small)
        self.vector = widgets.Dropdown(description="Direction", options=list(asker.vectors))
        self.strength = widgets.FloatSlider(
            0.0, min=-20, max=20, step=0.5, description="Strength", continuous_update=False
        )
        self.status = widgets.HTML()
        rows = [
            self.prompt,
            widgets.HBox([self.layer, self.head, self.switch, self.clear]),
            widgets.HBox([self.query, self.key, self.cut]),
            *([widgets.HBox([self.vector, self.strength])] if asker.vectors else []),
            self.status,
        ]
        self.controls = widgets.VBox(rows, layout=widgets.Layout(max_width="900px"))
        self._connect()

    def _connect(self):
        for control in (self.prompt, self.layer, self.head, self.strength):
            control.observe(lambda _: self._changed(), "value")
        self.vector.observe(lambda _: self._chosen(), "value")
        self.query.observe(lambda _: self._keys(), "value")
        self.switch.on_click(lambda _: self.ask(self.question.switched()))
        self.cut.on_click(
            lambda _: self.ask(self.question.with_cut(self.query.value, self.key.value))
        )
        self.clear.on_click(lambda _: self.ask(replace(self.question, off=(), cut=(), added={})))

    def show(self) -> "Explorer":
        """Display controls and picture, the first answer in it."""
        from IPython.display import HTML, display

        display(self.controls)
        self._shown = display(HTML(picture.trouble("asking the model")), display_id=True)
        self.ask(self.question)
        return self

    def ask(self, question: Question) -> Answer | None:
        """Put a question and show its answer. What cannot be done is said in the status line, and
        the last answer stays."""
        self.status.value = "asking the model"
        try:
            if not question.prompt.strip():
                raise CaptureError("The prompt is empty: type one.")
            answer = self.asker.ask(question)
        except LlamaTelemetryError as error:
            self.status.value = picture.trouble(str(error))
            if self.answer is None:
                self._draw(picture.trouble(str(error)))
            self._set(self.question)
            return None
        self.question, self.answer = question, answer
        self.status.value = ""
        self._set(question)
        self._draw(picture.picture(answer, self.model))
        return answer

    def _changed(self):
        if self._setting:
            return
        asked = replace(
            self.question, prompt=self.prompt.value, layer=self.layer.value, head=self.head.value
        )
        if asked.prompt != self.question.prompt:  # its positions are other tokens
            asked = replace(asked, cut=())
        if self.vector.value is not None:
            added = {**asked.added, self.vector.value: self.strength.value}
            asked = replace(asked, added={name: much for name, much in added.items() if much})
        if asked != self.question:
            self.ask(asked)

    def _chosen(self):
        self._set(self.question)

    def _keys(self):
        """The keys that the chosen query sees."""
        if self.answer is not None and self.query.value is not None:
            was = self.key.value
            self.key.options = self._tokens(self.query.value + 1)
            self.key.value = was if was is not None and was <= self.query.value else 0

    def _tokens(self, n):
        pieces = self.answer.pieces[:n] if self.answer else []
        return [(f"{i} {shorten(token_text(piece), 16)}", i) for i, piece in enumerate(pieces)]

    def _set(self, question):
        """The controls as a question has them, without asking again."""
        self._setting = True
        self.prompt.value, self.layer.value, self.head.value = (
            question.prompt,
            question.layer,
            question.head,
        )
        off = (question.layer, question.head) in question.off
        self.switch.description = "Switch head on" if off else "Switch head off"
        if self.vector.value is not None:
            self.strength.value = question.added.get(self.vector.value, 0.0)
        tokens = self._tokens(None)
        if list(self.query.options) != tokens:
            self.query.options = tokens
            if tokens:
                self.query.value = len(tokens) - 1
        self._keys()
        self._setting = False

    def _draw(self, html):
        from IPython.display import HTML

        if self._shown is not None:
            self._shown.update(HTML(html))


def explore(
    engine: "InferenceEngine",
    prompt: str = PROMPT,
    *,
    layer: int = 0,
    head: int = 0,
    vectors: Mapping[str, tuple[int, Any]] | None = None,
) -> Explorer:
    """Show a page to try a model live: each change runs through llama.cpp, and the picture says how
    long it took.

    layer, head: whose attention map is drawn. vectors: {name: (layer, (embd,) vector)} that can be
    added to `hidden` of that layer (see `add`), with a slider of strengths from -20 to 20. Needs a
    running kernel; a saved notebook keeps the last picture. Returns the Explorer, whose `ask` takes
    a Question. Raises CaptureError where no model is loaded, or it has no such layer or head."""
    if engine.model is None:
        raise CaptureError("No model is loaded: call load_model first.")
    for what, number, n in (
        ("layer", layer, engine.model.n_layer),
        ("head", head, engine.model.n_head),
    ):
        if number not in range(n):
            raise CaptureError(f"{what} is 0 to {n - 1}, not {number!r:.50}.")
    asker = Asker(engine, vectors)
    return Explorer(asker, Question(prompt, layer, head), engine.model.path.stem).show()
