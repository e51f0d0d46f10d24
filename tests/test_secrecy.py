"""No secret is printed, whatever characters it has and whatever it is written as."""

import base64
import html
import json
import os
import re
from urllib.parse import quote, quote_plus

import pytest

from llamatelemetry import LlamaTelemetryError, ModelNotFoundError, OptionError, secrecy
from llamatelemetry.errors import GraphistryError, brief
from llamatelemetry.files.models import resolve_model
from llamatelemetry.files.outputs import path_of
from llamatelemetry.graphs import upload
from llamatelemetry.secrecy import MASK, keep, redact
from llamatelemetry.server.settings import sort_options
from llamatelemetry.tools import doctor

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
AWKWARD = [
    "a.*b(c",
    'it\'s "q"\\',
    "p%2Fq%20r",
    "line one\nline two",
    "geheimß🔑",
    "x\\ny",
    "$&\\1",
    " spaced ",
]
WRITTEN = {
    "plain": str,
    "repr": repr,
    "repr of bytes": lambda secret: repr(secret.encode()),
    "json": json.dumps,
    "json as it is": lambda secret: json.dumps(secret, ensure_ascii=False),
    "html": html.escape,
    "url": lambda secret: f"https://x.y/?q={quote(secret, safe='')}&r=1",
    "quoted": quote,
    "url, lower case": lambda secret: re.sub(
        "%..", lambda code: code[0].lower(), quote(secret, safe="")
    ),
    "form": quote_plus,
    "header": lambda secret: base64.b64encode(f"user:{secret}".encode()).decode(),
    "url-safe base 64": lambda secret: base64.urlsafe_b64encode(secret.encode()).decode(),
    "within base 64": lambda secret: base64.b64encode(f"a{secret}z".encode()).decode(),
    "hexadecimal": lambda secret: secret.encode().hex(),
}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(secrecy, "_kept", set())
    for name in list(os.environ):
        if "TOKEN" in name or "SECRET" in name or "KEY" in name:
            monkeypatch.delenv(name)


def leaks(said, secret):
    """Whether a text has the secret in it in one of the forms above."""
    return [name for name, write in WRITTEN.items() if write(secret).strip("\"'") in said]


@pytest.mark.parametrize("secret", AWKWARD)
@pytest.mark.parametrize("name", WRITTEN)
def test_an_awkward_secret_in_every_form(secret, name):
    keep(secret)
    said = str(LlamaTelemetryError(f"before <{WRITTEN[name](secret)}> behind"))
    assert MASK in said and "before" in said and "behind" in said
    assert not leaks(said, secret) and secret.strip() not in said


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=40).filter(
        lambda secret: len(secret.strip()) >= 4 and "*" not in secret
    ),
    st.sampled_from(sorted(WRITTEN)),
)
def test_any_secret_in_any_form(secret, name):
    secrecy._kept.clear()
    keep(secret)
    hypothesis.assume(not leaks("[] []", secret))
    said = redact(f"[{WRITTEN[name](secret)}]")
    assert not leaks(said, secret), said
    assert said[0] == "[" and said[-1] == "]"


def test_a_very_short_one_goes_where_it_stands_alone():
    keep("ab")
    assert redact("ab, 'ab', key=ab; cab about") == f"{MASK}, '{MASK}', key={MASK}; cab about"


def test_what_is_a_secret_by_its_variable_or_its_shape(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mine1")
    monkeypatch.setenv("SOME_API_TOKEN", "long-enough-1")
    monkeypatch.setenv("OTHER_TOKEN", "word")
    monkeypatch.setenv("LANGUAGES", "en-and-de")
    assert redact("mine1 long-enough-1 word en-and-de") == f"{MASK} {MASK} word en-and-de"
    for said, expected in {
        "https://me:pa@ss@host/x.gguf": f"https://{MASK}@host/x.gguf",
        "https:/tok@host/x": f"https:/{MASK}@host/x",
        "get /x?token=abc&n=1": f"get /x?token={MASK}&n=1",
        "Authorization: Basic YTpi": f"Authorization: Basic {MASK}",
        "with hf_abcdefghijklmnopqrst.": f"with {MASK}.",
        "user@example.org wrote to host:/path": "user@example.org wrote to host:/path",
    }.items():
        assert redact(said) == expected


def test_pictures_and_code_keep_what_only_looks_like_one():
    keep("abcde")
    keep("a-secret-of-20-chars")
    code = "x;key=y;abcde"
    assert redact(code, 16) == code and redact("a-secret-of-20-chars", 16) == MASK


def test_half_a_secret_is_not_left_by_a_cut():
    keep("s3cret" * 20)
    assert "s3cret" not in brief("x" * 60 + "s3cret" * 20) and len(brief("x" * 99)) == 80


TOKEN = "pw'd%2F\"ß*("


@pytest.mark.parametrize(
    "ask",
    [
        lambda: resolve_model(f"https://me:{TOKEN}@host/repo/x.gguf"),
        lambda: resolve_model(f"me/repo:{TOKEN}.gguf"),
        lambda: path_of("x/" * 5000 + TOKEN, ModelNotFoundError),
        lambda: sort_options({"hf_token": TOKEN}),
        lambda: sort_options({"rope_freq_base": TOKEN}),
        lambda: sort_options({f"x{TOKEN}": 1}),
    ],
)
def test_names_and_options(ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((LlamaTelemetryError, OptionError)) as error:
        ask()
    assert not leaks(str(error.value), TOKEN)


def test_a_refusal_of_graphistry(monkeypatch):
    """Its client puts the header that it has sent into its error."""

    class Client:
        session = type("Session", (), {"hostname": "h", "protocol": "https"})

        def register(self, personal_key_id, personal_key_secret, **_):
            pair = f"{personal_key_id}:{personal_key_secret}"
            header = base64.b64encode(pair.encode()).decode()
            raise RuntimeError(f"refused {pair!r} (Authorization: Basic {header})" + "x" * 999)

    monkeypatch.setitem(__import__("sys").modules, "graphistry", type("M", (), {"client": Client}))
    monkeypatch.setattr(upload, "_reach", lambda address: None)
    graph = type("G", (), {"nodes": [], "edges": []})
    page = __import__("pathlib").Path("page.html")
    with pytest.raises(GraphistryError) as error:
        upload.upload_graph(graph, ("id-1234", TOKEN), "private", None, None, {"page": page}, 1)
    said = str(error.value)
    assert "logging in" in said and not leaks(said, TOKEN) and "id-1234" not in said
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_the_doctor_s_lines(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(doctor, "findings", lambda: [doctor._ok("path", f"/x/{TOKEN}/y")])
    doctor.report()
    assert not leaks(said := capsys.readouterr().out, TOKEN) and MASK in said


def test_an_executed_notebook(tmp_path, monkeypatch):
    """What cells print, show and raise, the source and the exported page."""
    import nbformat

    from llamatelemetry.errors import NotebookError
    from llamatelemetry.tools.notebooks import run_notebook

    token = 'tok\'en-"of"-100%ß'
    monkeypatch.setenv("HF_TOKEN", token)
    cells = [
        nbformat.v4.new_code_cell("A = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import os\ntoken = os.environ['HF_TOKEN']\nprint('a\\n' + token + '\\nb')\ntoken"
        ),
        nbformat.v4.new_code_cell(
            "from IPython.display import HTML, display\n"
            "display(HTML(f'<b>{token}</b>'), {'a': token})"
        ),
        nbformat.v4.new_code_cell("raise ValueError(token)"),
    ]
    source = tmp_path / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    with pytest.raises(NotebookError) as error:
        run_notebook(source, tmp_path / "out", {"A": token}, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["n.html", "n.ipynb"]
    page = (tmp_path / "out" / "n.html").read_text()
    for said in (str(error.value), (tmp_path / "out" / "n.ipynb").read_text(), page):
        assert MASK in said and not leaks(said, token)
    notebook = nbformat.read(tmp_path / "out" / "n.ipynb", 4)
    nbformat.validate(notebook)
    printed = [
        out.text for cell in notebook.cells for out in cell.get("outputs", ()) if "text" in out
    ]
    assert printed == [f"a\n{MASK}\nb\n"]
