"""Pieces that break what draws them: markup, TeX, templates, quotes, parts of characters, right to
left, nothing."""

PIECES = [
    '"',
    "don't",
    " &",
    "&amp;",
    "&quot;",
    "<b>",
    "</b>",
    "<br>",
    "<s>",
    "<script>window.bad = 1</script>",
    "</script>",
    "<!--",
    "<img src=x onerror='window.bad=1'>",
    "$x$",
    " $\\alpha$",
    "%{y}",
    "%{text:.2f}",
    "`",
    "|",
    "_a_",
    "*",
    "\\",
    b"\xf0\x9f",
    b"\x8d\x95",
    "🍕",
    "❤\ufe0f",
    "سلام",
    " שלום",
    "١٢",
    "\u200b",
    "\u200d",
    "\u202e",
    "\u00ad",
    "\n",
    "\t",
    "\r\n",
    "",
    " ",
    "  ",
    "1",
    "2",
    "-5",
    "2024",
    "1,000",
    "x" * 80,
    "سلام" * 20,
]
NAME = "<b>m</b> \"q\" 'a' & $x$ %{y} <script>window.bad=1</script> שלום 4"  # a model's or a file's
FILE = "<i>f<b> 'a' & $y$ %{x} |`_ <img src=x onerror=window.bad=1>"  # what a file may be called

# Parts of these names as they must never come in an output of each kind.
_TAGS = ("<b>m", "<b> 'a'", "<script>window.bad", "<i>f", "<img src=x on")
MARKUP = {
    "application/vnd.plotly.v1+json": (*_TAGS, "& $", "%{y} ", "%{x} |"),
    "text/html": _TAGS,
    "text/markdown": (*_TAGS, " |`_ "),
}
