"""The SHA-256 of files as large as models, with a bar that says how far it is."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 22  # bytes read at a time


def sha256(
    parts: Sequence[Path], what: str, progress: bool = True, copy: BinaryIO | None = None
) -> str:
    """The digest, in hexadecimal, of files as if they were one; copy: gets their bytes, too."""
    from tqdm.auto import tqdm

    digest, total = hashlib.sha256(), sum(part.stat().st_size for part in parts)
    units = {"unit": "B", "unit_scale": True, "leave": False}
    with tqdm(total=total, desc=what, disable=not progress, **units) as bar:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    if copy:
                        copy.write(block)
                    bar.update(len(block))
    return digest.hexdigest()
