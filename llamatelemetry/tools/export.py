"""What is kept of an executed notebook: the notebook, and one self-contained page of it."""

import json
import re
from pathlib import Path

from ..files.outputs import written
from ..secrecy import redact
from ..views import text

# The lab template without what it would load from the network: require.js, MathJax, Mermaid, the
# widget renderer. Without a font that holds the radical sign Chromium leaves square roots out: the
# fonts of Windows, macOS, Linux. The policy makes "no request" a property of the page instead of a
# hope about what its outputs hold.
_TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js_requirejs -%}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline' 'unsafe-eval' blob:; img-src data: blob:; font-src data:; media-src data:; worker-src blob:;
 frame-src data: blob:">
{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<style>.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere; }
math { font-family: "Cambria Math", "STIX Two Math", "Latin Modern Math", "DejaVu Math TeX Gyre", "DejaVu Sans" }
</style>
{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
_REMOTE_SCRIPT = re.compile(r"<script[^>]*\ssrc=[\"']https?://[^>]*>\s*</script>", re.IGNORECASE)
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])", re.DOTALL)
_PLACE = "formula-7c1f-{}-here"


def keep(growing, executed):
    """Give the executed notebook at `growing` its name, whole or not at all, without secrets."""
    notebook = json.loads(growing.read_text(encoding="utf-8"))
    notebook["metadata"].get("papermill", {})["output_path"] = str(executed)
    with written(executed) as temporary:
        words = json.dumps(_redacted(notebook), indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(words, encoding="utf-8", errors="backslashreplace")


_PROSE = ("text/plain", "text/markdown", "text", "source", "traceback", "evalue", "parameters")
_DRAWN = 16  # characters: shorter runs come in figures and pictures by chance


def _redacted(part, shortest=_DRAWN):
    """A part of a notebook without secrets."""
    if isinstance(part, dict):
        return {
            name: _redacted(value, 1 if name in _PROSE else shortest)
            for name, value in part.items()
        }
    if isinstance(part, list):
        if len(part) > 1 and all(str(line).endswith("\n") for line in part[:-1]):
            # A text, which a secret may go through from line to line
            return redact("".join(part), shortest).splitlines(keepends=True)
        return [_redacted(value, shortest) for value in part]
    return redact(part, shortest) if isinstance(part, str) else part


def export_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file that makes no network request; formulas become
    MathML."""
    import nbformat
    from nbconvert import HTMLExporter

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = take_formulas(cell.source, formulas)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = _REMOTE_SCRIPT.sub("", data["text/html"])
    exporter = HTMLExporter(template_name="lab", raw_template=_TEMPLATE, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
    for number, formula in enumerate(formulas):
        page = page.replace(_PLACE.format(number), formula)
    target = path.with_suffix(".html")
    with written(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def take_formulas(markdown: str, formulas: list[str]) -> str:
    """Replace $...$ and $$...$$ outside code by placeholders and append each as MathML, which
    browsers draw, to `formulas`. (nbconvert parses inline HTML tag by tag and would close every
    MathML element at once.)"""
    from latex2mathml.converter import convert

    def one(match):
        display = match[1] is not None
        try:
            formulas.append(
                convert(match[1] if display else match[2], display="block" if display else "inline")
            )
        except Exception:  # LaTeX that the converter does not know is shown as it was written
            formulas.append(f"<code>{text.html(match[0])}</code>")
        return _PLACE.format(len(formulas) - 1)

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("`") else _FORMULA.sub(one, part) for part in parts)
