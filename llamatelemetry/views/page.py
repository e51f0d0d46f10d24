"""Self-contained HTML pages: one file with its data in it, no request to any network, light and
dark.

A page's script reads its data with `DATA` (the JSON object) and `unpack(DATA.name)` for arrays
packed by `pack`."""

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from string import Template

from ..errors import OutputError
from ..files.outputs import path_of, written
from . import theme
from .text import html

_STYLE = """
* { box-sizing:border-box; }
body { margin:0; padding:12px; background:var(--bg); color:var(--fg);
  font:14px/1.45 system-ui,'DejaVu Sans',sans-serif; }
h1 { font-size:16px; margin:0 0 8px; } h2 { font-size:14px; margin:12px 0 6px; }
button,select,input { font:inherit; color:var(--fg); background:var(--panel); border:1px solid var(--line);
  border-radius:4px; padding:2px 6px; }
.controls { display:flex; flex-wrap:wrap; gap:8px 14px; align-items:center; margin:6px 0; }
.note { color:var(--muted); } .mono { font-family:'DejaVu Sans Mono',ui-monospace,monospace; }
table { border-collapse:collapse; } th,td { border:1px solid var(--line); padding:2px 7px; text-align:right; }
"""

_SCRIPT = """
const DATA = JSON.parse(document.getElementById('data').textContent);
const TYPES = {float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, int8: Int8Array};
function unpack(p) {
  const text = atob(p.b64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const array = new TYPES[p.dtype](bytes.buffer); array.shape = p.shape; return array;
}
const cssColor = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
"""


class Page:
    """A self-contained HTML page: shows itself in a notebook (also a saved one) and saves itself to
    a file."""

    def __init__(
        self, title: str, body: str, script: str, data: dict, *, style: str = "", height: int = 640
    ) -> None:
        """body: HTML; script: JavaScript run after it, with DATA, unpack and cssColor at hand;
        data: JSON-able."""
        # "</" and "<!--" inside a script element would end or comment it: token text may hold
        # either.
        payload = json.dumps(
            data, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        ).replace("<", "\\u003c")
        self.height = height
        self.html = (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html(title)}</title>"
            "<meta name='viewport' content='width=device-width'>"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:\">"
            f"<style>{theme.css_variables()}{_STYLE}{style}</style></head><body>{body}"
            f"<script type='application/json' id='data'>{payload}</script>"
            f"<script>'use strict';{_SCRIPT}{script}</script></body></html>"
        )

    def _repr_html_(self) -> str:
        return (
            # The line and the corner to drag say that the page may go on below.
            f'<iframe srcdoc="{html(self.html)}" style=\'width:100%;max-width:900px;height:{self.height}px;'
            "box-sizing:border-box;border:1px solid #8884;border-radius:4px;resize:vertical;overflow:auto' "
            "sandbox='allow-scripts allow-downloads'></iframe>"
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page; returns the path. Raises OutputError where it cannot be written, or a
        model is there."""
        path = path_of(path, OutputError)
        with written(path) as temporary:
            temporary.write_text(
                self.html, encoding="utf-8", errors="backslashreplace"
            )  # as a script writes it
        return path

    @classmethod
    def of(
        cls,
        package: str,
        name: str,
        data: dict,
        *,
        title: str,
        about: str,
        scripts: Iterable[str] | None = None,
        height: int = 640,
    ) -> "Page":
        """A page from the files of a package: `name`.html with $title and $about filled in,
        `name`.css, and scripts.

        package: a subject's __package__; scripts: names of its files without ".js", None for `name`
        alone. They run after views/maps.js, which has what pages of tokens and heads share:
        elements, numbers, colours."""
        files = resources.files(package)
        text = {key: html(value) for key, value in {"title": title, "about": about}.items()}
        body = Template(files.joinpath(f"{name}.html").read_text(encoding="utf-8")).substitute(text)
        sources = [resources.files(__package__).joinpath("maps.js")]
        sources += [files.joinpath(f"{script}.js") for script in scripts or (name,)]
        script = "\n".join(source.read_text(encoding="utf-8") for source in sources)
        style = files.joinpath(f"{name}.css").read_text(encoding="utf-8")
        return cls(title, body, script, data, style=style, height=height)
