"""What the documents say exists: commands, files, names, messages, figures; what they measure is
what is stored."""

import argparse
import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamatelemetry import InferenceEngine, cli
from llamatelemetry.tools.parameter_types import declared

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "SUMMARY.md", "notebooks/README.md")
MEASURED = re.compile(r"<!-- measured: (\S+) -->.*?<!-- end -->", re.DOTALL)
# Amounts that are facts of others, settings or arithmetic, not measurements of ours.
AMOUNTS = {"2.5 GB"}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location(
        "make_documents", ROOT / "docs" / "make_documents.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(name):
    """A document without its measured parts."""
    return MEASURED.sub("", (ROOT / name).read_text())


def everything():
    """All text in which a name of a document may be found."""
    folders = [
        ("llamatelemetry", "*"),
        ("kaggle", "*"),
        ("tests", "*.py"),
        ("notebooks", "*.ipynb"),
    ]
    files = [
        path
        for folder, pattern in folders
        for path in (ROOT / folder).rglob(pattern)
        if path.suffix in (".py", ".json", ".ipynb", ".js", ".html") and path != Path(__file__)
    ]
    return "\n".join(
        path.read_text() for path in [*files, ROOT / "pyproject.toml", ROOT / "Makefile"]
    )


def spans(text):
    """The inline code of a document, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands():
    for name in DOCUMENTS:
        text = written(name)
        found = [
            line.strip()
            for line in text.splitlines()
            if re.match(r"(    |```)?\s*llamatelemetry [a-z]", line)
        ]
        found += [span for span in spans(text) if re.match(r"llamatelemetry (?!is )[a-z]", span)]
        yield from ((name, command) for command in found)


@pytest.mark.parametrize("name, command", sorted(set(commands())))
def test_commands_are_commands(name, command):
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    parser, path = cli.parser(), []
    while words and (
        group := next(
            (
                action
                for action in parser._actions
                if isinstance(action, argparse._SubParsersAction)
            ),
            None,
        )
    ):
        assert words[0] in group.choices, f"{name}: {command}"
        path, parser, words = [*path, words[0]], group.choices[words[0]], words[1:]
    options = {option for action in parser._actions for option in action.option_strings}
    assert all(word in options for word in words if word.startswith("-")), (
        f"{name}: {command} has {options}"
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = {span.split()[1] for span in spans(written(name)) if span.startswith("make ")}
    mentioned |= set(re.findall(r"^    make ([a-z]+)$", written(name), re.MULTILINE))
    assert mentioned <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_and_named_files_exist(name):
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert link.startswith("https://") or (folder / link).exists(), link
    for span in spans(written(name)):
        if re.fullmatch(r"(tests|docs|notebooks|kaggle|llamatelemetry)/[\w./-]*", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_exist(name):
    known = everything()
    for span in spans(written(name)):
        if (
            span.startswith(("make ", "pip ", "llamatelemetry ", "apt-get ", ".", "~", "$", "--"))
            or "/" in span
        ):
            continue
        for part in re.findall(r"[A-Za-z_][A-Za-z_0-9]{2,}", re.sub(r"([\"']).*?\1", "", span)):
            assert part in known, f"{name}: `{span}`: nothing here is called {part}"
        if method := re.match(r"engine\.(\w+)\(", span):
            assert callable(getattr(InferenceEngine, method[1]))
    for span in spans(written(name)):  # options outside a command
        if span.startswith("--"):
            assert f'"{span.split()[0]}"' in known, span


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_use_what_there_is(name):
    import llamatelemetry

    for block in re.findall(r"```python\n(.*?)```", written(name), re.DOTALL):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "llamatelemetry":
                assert all(alias.name in llamatelemetry.__all__ for alias in node.names)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "engine"
            ):
                method = getattr(InferenceEngine, node.func.attr)
                known = set(inspect.signature(method).parameters)
                known |= (
                    {"stages", "layers", "queries", "edits", "generate"}
                    if node.func.attr == "capture"
                    else set()
                )
                assert {keyword.arg for keyword in node.keywords} <= known


def test_parameters_of_the_guide_are_parameters():
    """Every NAME = value of the guide, and every `-p NAME`, is in the parameters cell of some
    notebook."""
    cells = [
        cell
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text())["cells"]
    ]
    known = {
        name
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
        for name in declared("".join(cell["source"]))
    }
    guide = spans(written("notebooks/README.md"))
    names = {match[1] for span in guide if (match := re.match(r"([A-Z_]{4,}) = ", span))}
    asked = {
        name
        for document in DOCUMENTS
        for name in re.findall(r" -p (\w+) ", (ROOT / document).read_text())
    }
    assert names and asked and names | asked <= known, (names | asked) - known


def test_messages_of_the_guide_are_messages():
    """The troubleshooting table quotes what the code says: every three words in a row are in a
    source in that order."""
    joined = re.sub(
        r"[\"']\s*\n\s*f?[\"']", "", everything().replace("\\", "")
    )  # texts over several lines
    known = re.sub(r"\s+", " ", re.sub(r"[^A-Za-z' -]+", " ", joined))
    messages = re.findall(r"^\| `([^`]+)` \|", written("notebooks/README.md"), re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for piece in re.split(r"[^A-Za-z' -]+|Graphistry_\w+", message):
            words = piece.split()
            for first in range(max(1, len(words) - 2)):
                assert " ".join(words[first : first + 3]) in known, (
                    f"{message!r}: {words[first : first + 3]}"
                )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_amount_is_typed_in(name):
    text = re.sub(r"```.*?```|`[^`]*`", "", written(name), flags=re.DOTALL)
    amounts = set(
        re.findall(r"\b\d[\d.,]*\s?(?:s|ms|x|MiB|GiB|MB|GB|seconds|times|%|nats|tokens/s)\b", text)
    )
    assert amounts <= AMOUNTS, f"{name}: {amounts - AMOUNTS}: put measurements into a measured part"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_measured_parts_are_what_is_stored(maker, name):
    text = (ROOT / name).read_text()
    assert set(MEASURED.findall(text)) <= set(maker.PARTS)
    assert text.count("<!-- measured:") == text.count("<!-- end -->")
    assert maker.fill(text) == text, "run `make documents`"


def test_a_measured_part_follows_the_measurement(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "RESULTS", tmp_path)
    assert maker.targets().count(maker.NOT_MEASURED) == len(maker.targets().splitlines()) - 2
    rows = [{"what": "capture / plain", "value": 1.174}, {"what": "times faster", "value": 12.3}]
    (tmp_path / "capture.json").write_text(
        json.dumps({"hardware": {"cpu": "C", "cores": 2}, "rows": rows})
    )
    assert "| at most 1.25 x | 1.17 x |" in maker.targets() and "| 12.3 x |" in maker.targets()
    assert maker.hardware() == "- `capture.json`: C, 2 cores, "
    rows.append({"what": "transformers (torch, transformers 2.1.0+cpu 5.0.1), s", "value": 20.0})
    (tmp_path / "capture.json").write_text(json.dumps({"hardware": {}, "rows": rows}))
    assert (
        "| 12.3 x (transformers 5.0.1, torch 2.1.0+cpu, which on a CPU dequantizes"
        in maker.targets()
    )
    rows = [
        {"what": "compare_quantizations, all files", "seconds": 4.0},
        {"what": "llama-perplexity, x", "seconds": 8.0},
        {"what": "mean KLD of a", "ours": 0.10, "theirs": 0.11},
    ]
    (tmp_path / "compare.json").write_text(json.dumps({"hardware": {}, "rows": rows}))
    assert (
        "0.50 x its time (4.0 s against 8.0 s)" in maker.targets()
        and "at most 1.0e-02 nats" in maker.targets()
    )


def test_the_rehearsal_on_the_t4_s_kernels_is_told_as_stored(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "RESULTS", tmp_path)
    assert maker.NOT_MEASURED in maker.t4()
    held = {"left_mib": [14913, 14913], "cores": 4}
    rows = [
        {
            "part": "tests",
            "what": "tests/test_gpu.py",
            "seconds": 9,
            "passed": 48,
            "failed": 1,
            **held,
        },
        {
            "part": "notebooks",
            "what": "12-x, SmolLM2",
            "seconds": 40.2,
            "peak_mib": 1700,
            "gpu_mib": [900, 2100],
            **held,
        },
        {
            "part": "notebooks",
            "what": "13-x, SmolLM2",
            "seconds": 50.0,
            "peak_mib": 1500,
            "gpu_mib": [800, 20],
            **held,
        },
        {
            "part": "notebooks",
            "what": "12-x, 8b.gguf",
            "seconds": 3,
            "failed": "1: x",
            "peak_mib": 1,
            "gpu_mib": [1],
            **held,
        },
        {"part": "wheel", "what": "engine build", "seconds": 1080, "cores": 4},
    ]
    (tmp_path / "t4_kernels.json").write_text(
        json.dumps({"hardware": {"cpu": "C", "gpu": "G"}, "rows": rows})
    )
    said = maker.t4()
    assert (
        "held to 14,913 MiB and 4 cores, 48 of 49 tests" in said
        and "takes 18 minutes on 4 cores" in said
    )
    assert (
        "2 of 2 notebooks with SmolLM2 run to their end, in 90 s together, with at most 1,700 MiB of memory"
        in said
    )
    assert (
        "2,100 MiB of a GPU" in said and "0 of 1 notebooks with 8b.gguf run to their end." in said
    )
    assert said.endswith("not a T4's speed.")


def test_the_soak_is_told_as_stored(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "RESULTS", tmp_path)
    assert maker.NOT_MEASURED in maker.reliability()
    rows = [
        {
            "part": "files",
            "what": "all",
            "count": 1000,
            "typed": 800,
            "works": 199,
            "findings": 1,
            "limit_s": 60,
            "limit_mib": 1536,
        },
        {"part": "phases", "what": "all", "count": 9, "phases": 3, "findings": 0},
        {"part": "phases", "what": "kill", "count": 5, "typed": 4, "missed": 1, "slow": 1},
        {"part": "phases", "what": "full", "count": 4, "works": 4},
        {"part": "requests", "what": "all", "count": 8, "captures": 7, "findings": 0},
        {"part": "requests", "what": "1 slots", "count": 4, "same": 4, "largest_tie": 0.0},
        {
            "part": "requests",
            "what": "4 slots",
            "count": 4,
            "same": 3,
            "tie": 1,
            "largest_tie": 0.2,
        },
    ]
    stored = {"hardware": {"cpu": "C", "cores": 2, "date": "today"}, "rows": rows}
    (tmp_path / "soak.json").write_text(json.dumps(stored))
    said = maker.reliability()
    assert (
        "| 1,000 | 800 end in a typed error, 199 work; each within 60 s and 1,536 MiB | 1 |" in said
    )
    assert "3 phases, faults kill, full. a typed error: 4; the right result: 4; over before" in said
    assert "within it when played again: 1 | 0 |" in said
    assert (
        "4 slots: 3 of 4 equal to the answer given alone, 1 by a tie of rounding (at most 0.2"
        in said
    )
    assert said.count(maker.NOT_MEASURED) == 6 and said.endswith("C, 2 cores, today.")


def test_a_stand_in_is_named_wherever_its_figures_are():
    """The embedded model is quantized: what notebook 16 measures from it by default has no original
    to be measured from."""
    captions = json.loads((ROOT / "docs" / "figures" / "captions.json").read_text())
    assert "stand-in" in captions["quantizations"]["printed"]
    assert all("stand-in" in (ROOT / name).read_text() for name in DOCUMENTS)
    rows = [
        line
        for line in (ROOT / "SUMMARY.md").read_text().splitlines()
        if "KL divergence of `compare" in line
    ]
    assert rows and all("stand-in" in row for row in rows)


def test_the_first_lines_say_what_users_of_llama_cpp_ask_for():
    start = (ROOT / "README.md").read_text().partition("<!-- measured")[0]
    asked = re.findall(r"\[([^\]]+)\]\(https://github\.com/ggml-org/llama\.cpp/issues/\d+\)", start)
    assert (
        asked == ["the hidden states after every layer", "the attention of every head"]
        and "without a fork" in start
    )


def test_every_peer_has_its_source_and_what_it_does_better():
    part = (
        written("SUMMARY.md").partition("## Beside the tools of research")[2].partition("\n## ")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| [")]
    named = " ".join(row[0] for row in rows)
    assert all(
        name in named
        for name in (
            "TransformerLens",
            "nnsight",
            "nnterp",
            "circuit-tracer",
            "BertViz",
            "exllamav3",
            "transformers with GGUF",
        )
    )
    assert all(
        len(row) == 4 and all(map(str.strip, row)) and "](https://" in row[0] for row in rows
    )


def test_pictures_are_small_and_have_captions():
    folder = ROOT / "docs" / "figures"
    pictures = sorted(folder.glob("*.png"))
    captions = json.loads((folder / "captions.json").read_text())
    assert {path.stem for path in pictures} == set(captions) and 4 <= len(pictures) <= 6
    assert all(
        path.stat().st_size < 300_000 and path.read_bytes()[:4] == b"\x89PNG" for path in pictures
    )
    text = (ROOT / "README.md").read_text()
    assert all(f"docs/figures/{path.name}" in text for path in pictures)


@pytest.mark.parametrize(
    "before",
    [
        "import llamatelemetry.convert.quantize",
        "from llamatelemetry.convert.quantize import needs_imatrix",
        "from llamatelemetry import quantize",
    ],
)
def test_a_public_name_is_never_a_module(before):
    """A module of the name of a function takes its place in a package once it is imported,
    elsewhere in Python."""
    modules = (
        "import pkgutil, llamatelemetry as p\n"
        "for module in pkgutil.iter_modules(p.__path__): __import__(f'llamatelemetry.{module.name}')"
    )
    code = (
        f"{before}\n{modules}\nfrom llamatelemetry import quantize\n"
        "assert quantize.__name__ == 'quantize', quantize\n"
        "import sys; assert p.quantize is quantize is sys.modules['llamatelemetry.convert.quantize'].quantize\n"
        "assert all(not isinstance(getattr(p, name), type(sys)) for name in p.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
