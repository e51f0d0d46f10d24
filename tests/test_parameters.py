"""Every parameter of every notebook: its default passes the notebook's own check, a wrong value is
named by it."""

import ast
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pandas as pd
import pytest

from llamatelemetry import GGUFFile, ModelNotFoundError, ParameterError
from llamatelemetry.files.registry import TYPES
from llamatelemetry.heads import behaviours
from llamatelemetry.tools import parameter_rules, parameters
from llamatelemetry.tools.parameter_types import declared, fit, parameters_cell

NOTEBOOKS = {
    path.name[:2]: path
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
}
CELLS = {number: parameters_cell(path) for number, path in NOTEBOOKS.items()}
TYPED = {number: declared(cell) for number, cell in CELLS.items()}
NAMES = [(number, name) for number, names in TYPED.items() for name in names]


@cache
def check_cell(number):
    """The notebook's imports that its check needs, and the check itself: the statements of
    `parameters` up to its check."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOKS[number].read_text())["cells"]
        if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", [])
    ]
    found = []
    for node in (node for source in cells[1:] for node in ast.parse(source).body):
        said = ast.unparse(node)
        if (
            isinstance(node, ast.ImportFrom | ast.Import)
            and "cuda" not in said
            or "parameters." in said
            or said.startswith(("words = ", "cases = "))
        ):
            found.append(node)
    place = max(i for i, node in enumerate(found) if "parameters.check(" in ast.unparse(node))
    return compile(ast.Module(found[: place + 1], []), f"check of {number}", "exec")


def has_quantizer():
    from llamatelemetry import LlamaTelemetryError
    from llamatelemetry.files.programs import tool

    try:
        return tool("llama-quantize")
    except LlamaTelemetryError:
        return None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_check(tiny, tmp_path, monkeypatch):
    """run_check(number, NAME=value): the notebook's check with its own defaults but for what is
    given."""
    from llamatelemetry.embeddings import context, lists, vectors

    # The tiny vocabulary has no words
    words = pd.DataFrame({"word": [f"w{i}" for i in range(60)]})
    monkeypatch.setattr(vectors, "word_table", lambda *_, **__: words)
    cases = pd.DataFrame({"word": list(lists.SENSES)})
    monkeypatch.setattr(context, "occurrences", lambda *_: cases)
    if not has_quantizer():
        from llamatelemetry.convert import quantize

        monkeypatch.setattr(quantize, "needs_imatrix", lambda *_: False)

    def run(number, **given):
        values = {}
        exec(CELLS[number], values)
        values |= {"MODEL": str(tiny), "OUTPUT_DIR": str(tmp_path / "out")} | given
        exec(check_cell(number), values)

    return run


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_defaults_pass(number, run_check):
    run_check(number)
    assert set(TYPED[number]) - {"MODEL", "CATEGORIES", "WORD", "PROBES"} <= set(parameters.RULES)
    assert None not in TYPED[number].values(), "every default says what it takes"


@pytest.mark.parametrize("number, name", NAMES)
def test_a_value_of_another_type_is_named(number, name, run_check):
    for wrong in (object(), {"a": 1.5}, [None], b"x"):
        with pytest.raises(
            ParameterError, match=rf"^{name} = .*Change {name} in the parameters cell\.$"
        ):
            run_check(number, **{name: wrong})


WRONG = {
    "MODEL": ["", "  "],
    "REFERENCE_MODEL": ["", "no-such-model"],
    "OTHER_MODEL": ["", "/no/such/file.gguf"],
    "PROMPT": ["", " \n", None],
    "SECOND_PROMPT": ["", None],
    "STEER_TO": ["", None],
    "STEER_FROM": [" ", None],
    "MORE": ["", None],
    "LESS": ["\n", None],
    "TEXT": [""],
    "TEXTS": [
        {},
        [],
        {"prose": []},
        {"prose": ["a", ""]},
        {"prose": "a"},
        {"random": ["a"]},
        {1: ["a"]},
    ],
    "LAYER": [3, -1, 1.0, "1", True],
    "HEAD": [4, -1, 0.0, False],
    "CONTEXT": [0, 3, 100.5, "many", True],
    "N_CTX": [3, 513, 0, "512", None, 64.0],
    "GENERATE": [0, -1, 2.5, None],
    "ALIGN": ["tokens", "", None, "POSITION"],
    "TEXT_TOKENS": [2, 0, 513, 4.5, None],
    "MAX_TOKENS": [16, 513, None],
    "PATCH_EVERY": [0, -2, None, 1.5],
    "PATCH_POSITIONS": [0, -1, None],
    "PROBES": [[], "number", ["colour"], ["number", "number"], None],
    "PROBE_TEXTS": [39, 401, 0, None, 99.5],
    "WINDOWS": [0, -1, 1.5, True, "2"],
    "SAMPLE": [0, 1e3, None],
    "WHOLE_VOCABULARY": [1, "True", 0],
    "CATEGORIES": [[], "animals", ["animals", "planets"], ["animals", "animals"]],
    "METRIC": ["cosin", "", None, "COSINE", 3],
    "N_NEIGHBORS": [1, 60, 500, 15.0, None],
    "MIN_DIST": [-0.1, 1.5, float("nan"), "0.1", None],
    "K": [0, 60, 10.0, None],
    "THRESHOLD": [1.01, -2, float("nan"), None],
    "WORD": ["banks", ""],
    "MARGIN": [-0.1, 2, float("nan"), "0.1"],
    "N_CLUSTERS": [0, 1, 2.0, "8"],
    "ABLATION_SECONDS": [-1, -(10**400), float("inf"), float("nan"), None],
    "OTHER_TYPE": ["Q4", "q4_k_x", "", 4],
    "QUANTIZATION": ["Q9_0", "NVFP4"],
    "REQUANTIZE": ["fp16", ""],
    "QUANTIZATIONS": [[], "Q8_0", ["Q8_0", "Q9_9"], ["Q8_0", ""], ["Q8_0", "Q8_0"], [None]],
    "FOCUS": ["Q2_K", "", None, "q4_k_m"],
    "CACHE_TYPES": [[], "q8_0/q8_0", ["q8_0"], ["q3_K/q8_0"], ["q8_0/q8_0"] * 2, [1], None],
    "CACHE_TOKENS": [0, -1, 1.5, "8192"],
    "IMATRIX": [0, "False", None],
    "LONGER": [0, "True", 1.0],
    "FEATURES": ["", "  ", 3, b"x"],
    "TASKS": ["", " ", 3],
    "N_TASKS": [0, -1, 2.5, "40"],
    "SIZE_MB": [0, -1, float("nan"), "80", float("inf")],
    "COST_SECONDS": [-1, float("inf"), None, "60"],
    "WORKERS": [-1, 1.5, None, True],
    "OUTPUT_DIR": ["", None, "x" * 300, str(Path(__file__)), str(Path(__file__) / "below")],
    "BACKEND": ["cuda", "", "GPU", None],
    "SEED": [-1, 2**32, 0.5, None, True],
}


def test_every_parameter_has_wrong_values():
    assert {name for _, name in NAMES} == set(WRONG)


@pytest.mark.parametrize("number, name", NAMES)
def test_wrong_values_are_named(number, name, run_check):
    for wrong in WRONG[name]:
        with pytest.raises(ParameterError) as error:
            run_check(number, **{name: wrong})
        assert str(error.value).startswith(f"{name} = {wrong!r}"[:60]), error.value


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_a_model_that_is_not_there_is_named(number, run_check):
    with pytest.raises(ModelNotFoundError, match="^MODEL = 'no-such-model': "):
        run_check(number, MODEL="no-such-model")


@pytest.mark.parametrize(
    "number, given",
    [
        ("12", {"LAYER": 2, "HEAD": 3, "CONTEXT": 4}),
        ("13", {"CATEGORIES": ["food"], "WORD": "match", "K": 1}),
        (
            "13",
            {
                "WHOLE_VOCABULARY": False,
                "MIN_DIST": 0,
                "THRESHOLD": 1,
                "N_NEIGHBORS": 59,
                "OTHER_TYPE": "q4_k_m",
            },
        ),
        ("14", {"ALIGN": "token", "TEXT": "Call me Ishmael.", "SEED": 2**32 - 1}),
        (
            "15",
            {
                "TEXTS": {"mine": ["a text"]},
                "N_CLUSTERS": None,
                "MARGIN": 0,
                "ABLATION_SECONDS": 0.5,
            },
        ),
        (
            "16",
            {
                "QUANTIZATIONS": ["q4_0", "Q8_0"],
                "FOCUS": "Q8",
                "WINDOWS": None,
                "N_CTX": 512,
                "IMATRIX": True,
                "LONGER": True,
                "TASKS": Path("tasks.txt"),
                "N_TASKS": None,
                "SIZE_MB": 80.5,
                "COST_SECONDS": 0,
            },
        ),
    ],
)
def test_what_is_allowed_passes(number, given, run_check):
    run_check(number, **given)


def test_a_second_model_is_compared(tiny, tmp_path, run_check):
    """Another vocabulary is refused everywhere; another shape where states or heads are
    compared."""

    def second(folder, **changes):
        (tmp_path / folder).mkdir()
        return str(models.tiny_model("llama", tmp_path / folder, seed=1, **changes))

    same, deeper, smaller = second("a"), second("b", n_layer=4), second("c", n_vocab=300)
    for number, name in (
        ("12", "REFERENCE_MODEL"),
        ("13", "OTHER_MODEL"),
        ("14", "REFERENCE_MODEL"),
        ("15", "REFERENCE_MODEL"),
        ("16", "REFERENCE_MODEL"),
    ):
        run_check(number, **{name: same})
        with pytest.raises(ParameterError, match=f"^{name} = .*n_vocab 300 instead of 320"):
            run_check(number, **{name: smaller})
        if number == "14":
            run_check(number, **{name: deeper})
        else:
            with pytest.raises(ParameterError, match=f"^{name} = .*n_layer 4 instead of 3"):
                run_check(number, **{name: deeper})
    run_check("16", QUANTIZATIONS=["Q8_0", same], FOCUS="tiny-llama")
    run_check(
        "16", QUANTIZATIONS=[Path(same)], FOCUS="tiny-llama", MODEL=Path(same), TEXT=Path("a.txt")
    )
    with pytest.raises(ParameterError, match="^QUANTIZATIONS = .*n_vocab 300 instead of 320"):
        run_check("16", QUANTIZATIONS=["Q8_0", smaller], FOCUS="Q8_0")


class Model:
    architecture, n_layer, n_head, n_kv_head, n_embd, n_vocab = "llama", 3, 2, 1, 8, 3
    pieces = ["a", "b", "c"]
    path = Path("m.gguf")


def test_the_same_vocabulary_is_the_same_pieces():
    class Renamed(Model):
        pieces = ["a", "b", "d"]

    class Silent(Model):
        pieces = []

    assert parameter_rules.differences(Model, Model) is None
    assert "token 2 is 'd' instead of 'c'" in parameter_rules.differences(
        Model, Renamed, parameter_rules.VOCABULARY
    )
    assert "another vocabulary" in parameter_rules.differences(Model, Silent)


class Engine:
    """Tokens are words; attention in these layers, of as many heads each."""

    def __init__(self, layers=(1, 2), heads=4):
        n_head = heads if isinstance(heads, list) else [heads] * (max(layers) + 1)
        self.layers, self.model = list(layers), SimpleNamespace(n_head_per_layer=n_head)

    def tokenize(self, text):
        return pd.DataFrame({"id": range(len(text.split()))})

    def capture(self, ids, stages):
        import xarray

        assert len(ids) == 2 and stages == ("attention",)
        layers = {"layer": self.layers}
        return SimpleNamespace(
            attention=xarray.DataArray(np.zeros((len(self.layers), 1)), layers, ("layer", "x"))
        )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"PROMPT": "one"}, r"PROMPT is 1 token\(s\) long; 2 to 7 fit \(CONTEXT 10 - GENERATE 3\)"),
        ({"PROMPT": "a " * 8}, r"PROMPT is 8 token\(s\) long; 2 to 7 fit"),
        ({"SECOND_PROMPT": "one"}, r"SECOND_PROMPT is 1 token\(s\) long"),
        (
            {"GENERATE": 9},
            "GENERATE = 9: a whole number from 1 to 8 fits beside a prompt in CONTEXT 10",
        ),
        ({"TEXT": "a b"}, r"TEXT = 'a b': it is 2 token\(s\) long, 3 are needed"),
        ({"TEXT": "a b c", "N_CTX": 4}, r"TEXT = 'a b c': it is 3 token\(s\) long, 4 are needed"),
    ],
)
def test_texts_that_do_not_do_are_named(given, message):
    values = {"PROMPT": "a b c", "CONTEXT": 10, "GENERATE": 3}
    assert len(parameters.check_texts(values | {"TEXT": "a b c"}, Engine())["PROMPT"]) == 3
    with pytest.raises(ParameterError, match=message):
        parameters.check_texts(values | given, Engine())


@pytest.mark.parametrize(
    "layers, heads, chosen, said",
    [
        (range(30), 9, (18, 6), "layer 18 (of 0 to 29) and head 6 (of 0 to 8)"),  # SmolLM2
        (range(16), 32, (9, 21), "layer 9 (of 0 to 15) and head 21 (of 0 to 31)"),  # Llama 3.2 1B
        (range(18), 4, (10, 2), "layer 10 (of 0 to 17) and head 2 (of 0 to 3)"),  # Gemma 3 270M
        (range(2), 2, (1, 1), "layer 1 (of 0 to 1) and head 1 (of 0 to 1)"),
        ([0], 1, (0, 0), "layer 0 (of 0) and head 0 (of 0)"),
        ([2, 5, 8, 11], 16, (8, 10), "layer 8 (of 2, 5, 8, 11) and head 10 (of 0 to 15)"),
        ([1, 2, 3], [0, 2, 6, 4], (2, 4), "layer 2 (of 1 to 3) and head 4 (of 0 to 5)"),
    ],
)
def test_a_layer_and_a_head_that_the_model_has_are_chosen(layers, heads, chosen, said, capsys):
    engine, values = Engine(layers, heads), {"PROMPT": "a b c", "LAYER": None, "HEAD": None}
    assert parameters.layer_and_head(values, engine) == chosen
    printed = capsys.readouterr().out
    assert said in printed.replace("Layer", "layer") and printed.count("\n") == 1
    given = dict(zip(("LAYER", "HEAD"), chosen))
    assert parameters.layer_and_head(values | given, engine) == chosen
    assert not capsys.readouterr().out, "nothing was left open"
    for name, value in given.items():
        assert parameters.layer_and_head(values | {name: value}, engine) == chosen


@pytest.mark.parametrize(
    "given, message",
    [
        ({"LAYER": 0}, "^LAYER = 0: attention is in layers 1, 2. Change LAYER in the parameters"),
        ({"LAYER": 2, "HEAD": 5}, "^HEAD = 5: layer 2 has 2 heads, 0 to 1. Change HEAD"),
    ],
)
def test_a_layer_or_head_that_is_not_there_is_named(given, message):
    values = {"PROMPT": "a b c", "LAYER": None, "HEAD": None} | given
    with pytest.raises(ParameterError, match=message):
        parameters.layer_and_head(values, Engine((1, 2), [0, 6, 2]))


@pytest.mark.parametrize(
    "given, trained, size, said",
    [(None, 8192, 2048, ""), (None, 0, 2048, ""), (None, 1024, 1024, "no more"), (4, 1024, 4, "")],
)
def test_the_context_is_no_longer_than_the_training(given, trained, size, said, capsys):
    model = SimpleNamespace(n_ctx_train=trained, path=Path("m.gguf"))
    assert parameters.context({"CONTEXT": given}, model) == size
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)


@pytest.mark.parametrize(
    "name, own, kind",
    [
        ("QUANTIZATION", "Q4_1", "Q4_K_M"),  # SmolLM2
        ("QUANTIZATION", "F16", "Q4_K_M"),
        ("QUANTIZATION", None, "Q4_K_M"),
        ("QUANTIZATION", "Q4_K_M", "Q3_K_M"),
        ("QUANTIZATION", "Q4_K_S", "Q3_K_M"),
        ("QUANTIZATION", "Q3_K_M", "Q2_K"),
        ("QUANTIZATION", "Q2_K", "Q4_K_M"),
        ("REQUANTIZE", "Q4_1", "Q3_K_M"),
        ("REQUANTIZE", "Q3_K_L", "Q2_K"),
        ("REQUANTIZE", "IQ2_M", "Q2_K"),
        ("OTHER_TYPE", "Q8_0", "Q4_0"),
        ("OTHER_TYPE", "Q4_0", "Q2_K"),
    ],
)
def test_a_model_is_requantized_to_what_it_is_not(name, own, kind, capsys):
    assert parameters.coarser({name: None}, name, own) == kind
    assert f"{kind} is taken" in capsys.readouterr().out
    second = {"OTHER_MODEL" if name == "OTHER_TYPE" else "REFERENCE_MODEL": "a.gguf"}
    assert parameters.coarser({name: None} | second, name, own) == kind
    assert parameters.coarser({name: "Q5_0"}, name, own) == "Q5_0"
    assert not capsys.readouterr().out


@pytest.mark.parametrize("n_layer, n_head", [(1, 1), (16, 4), (2, 32)])
def test_defaults_pass_whatever_the_model_has(n_layer, n_head, run_check, tmp_path):
    shape = dict(n_layer=n_layer, n_head=n_head, n_kv_head=1, head_dim=64 // n_head)
    path = str(models.tiny_model("llama", tmp_path, **shape))
    for number in NOTEBOOKS:
        run_check(number, MODEL=path)
    for number in ("12", "15"):
        with pytest.raises(ParameterError, match=f"^LAYER = {n_layer}: the model has {n_layer} "):
            run_check(number, MODEL=path, LAYER=n_layer)


def test_the_kinds_that_are_made_are_reserved():
    rule = parameters.texts(reserved=behaviours.MADE)
    assert (
        all(rule({name: ["a"]}, None, {}) for name in behaviours.MADE)
        and rule({"mine": ["a"]}, None, {}) is None
    )


def test_types_are_those_of_the_tool():
    if not (program := has_quantizer()):
        pytest.skip("no engine")
    said = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    listed = re.findall(r"^ *\d+ +or +(\w+) *:(?! alias)", said, re.MULTILINE)
    assert sorted(listed) == sorted(TYPES)


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_defaults_are_of_the_declared_types(number):
    values = {}
    exec(CELLS[number], values)
    given = {name: values[name] for name in TYPED[number]}
    assert fit(NOTEBOOKS[number], given) == given


def test_a_type_that_needs_a_matrix_is_refused_without_one(run_check, tmp_path):
    """Rows of 256 weights are what such types pack; narrower ones fall back and need none."""
    if not has_quantizer():
        pytest.skip("no engine")
    wide = str(models.tiny_model("llama", tmp_path, n_embd=256, n_ff=256))
    for number, name in (("13", "OTHER_TYPE"), ("14", "QUANTIZATION"), ("15", "REQUANTIZE")):
        with pytest.raises(
            ParameterError,
            match=f"^{name} = 'IQ2_XXS': IQ2_XXS of this model needs an importance matrix",
        ):
            run_check(number, MODEL=wide, **{name: "IQ2_XXS"})
        run_check(number, **{name: "IQ2_XXS"})
    with pytest.raises(
        ParameterError, match="^QUANTIZATIONS = .*: IQ1_S of this model needs an importance matrix"
    ):
        run_check("16", MODEL=wide, QUANTIZATIONS=["Q4_K_M", "IQ1_S"])
    run_check("16", MODEL=wide, QUANTIZATIONS=["Q4_K_M", "IQ1_S"], IMATRIX=True)


def test_facts_come_from_the_header(tiny):
    assert isinstance(parameters.check({"MODEL": str(tiny), "LAYER": 2}), GGUFFile)
