"""Pieces that break what draws them: markup, TeX, templates, quotes, parts of characters, right to left, nothing."""

PIECES = [
    '"', "don't", " &", "&amp;", "&quot;", "<b>", "</b>", "<br>", "<s>", "<script>window.bad = 1</script>", "</script>",
    "<!--", "<img src=x onerror='window.bad=1'>", "$x$", " $\\alpha$", "%{y}", "%{text:.2f}",
    "`", "|", "_a_", "*", "\\",
    b"\xf0\x9f", b"\x8d\x95", "🍕", "❤\ufe0f", "سلام", " שלום", "١٢", "\u200b", "\u200d", "\u202e", "\u00ad", "\n", "\t",
    "\r\n", "", " ", "  ", "1", "2", "-5", "2024", "1,000", "x" * 80, "سلام" * 20,
]  # fmt: skip
NAME = "<b>m</b> \"q\" 'a' & $x$ %{y} <script>window.bad=1</script> שלום 4"  # a model's or a file's
