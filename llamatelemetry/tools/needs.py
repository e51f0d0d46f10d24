"""What compiled files need of the machine that runs them: libraries, and how new those must be.

Read from the ELF files themselves, as auditwheel does: the versions that a builder had say only
what it had, not what its files ask for. Nothing is loaded for it."""

import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

_FOLDERS = (
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
)
_DYNAMIC, _VERDEF, _VERNEED = 6, 0x6FFFFFFD, 0x6FFFFFFE  # types of ELF sections
_NEEDED, _RPATH, _RUNPATH = 1, 15, 29  # tags in the dynamic section
_WEAK = 2  # a version that may be missing


def read(data):
    """{"needed": names of libraries, "versions": (name, such as GLIBC_2.34) that it asks for,
    "defines": those that it has itself, "folders": where it looks for libraries} of the bytes of a
    64-bit ELF file; None for anything else."""
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return None
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    found = {"needed": [], "versions": [], "defines": [], "folders": []}
    for _, kind, _, _, offset, length, link, info, _, _ in sections:
        if kind not in (_DYNAMIC, _VERDEF, _VERNEED):
            continue
        texts = sections[link][4]
        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + length // 16 * 16]):
                if tag == _NEEDED:
                    found["needed"].append(_text(data, texts + value))
                elif tag in (_RPATH, _RUNPATH):
                    found["folders"] += _text(data, texts + value).split(":")
        elif kind == _VERNEED:
            found["versions"] += [_text(data, texts + name) for name in _asked(data, offset, info)]
        else:
            for _ in range(info):
                first, following = struct.unpack_from("<II", data, offset + 12)
                (name,) = struct.unpack_from("<I", data, offset + first)
                found["defines"].append(_text(data, texts + name))
                offset += following
    return found


def _text(data, at):
    return data[at : data.index(b"\0", at)].decode()


def _asked(data, offset, count):
    """Places of the names of versions that must be there, in a section of `count` libraries."""
    for _ in range(count):
        _, several, _, first, following = struct.unpack_from("<HHIII", data, offset)
        at = offset + first
        for _ in range(several):
            _, flags, _, name, step = struct.unpack_from("<IHHII", data, at)
            if not flags & _WEAK:
                yield name
            at += step
        offset += following


def of(files):
    """What files need together: {"libraries": names, without those among the files; "versions":
    {"GLIBC": "2.34", "GLIBCXX": "3.4.30"}, the newest of each; "folders": absolute ones in which
    they look}; {} where none is an ELF file. files: {name: bytes}."""
    every = [found for data in files.values() if (found := read(data))]
    if not every:
        return {}
    newest = {}
    for version in {version for found in every for version in found["versions"]}:
        # That is how glibc says that it can do RELR
        version = version.replace("GLIBC_ABI_DT_RELR", "GLIBC_2.36")
        if match := re.fullmatch(r"(GLIBC|GLIBCXX)_([\d.]+)", version):
            newest[match[1]] = max(newest.get(match[1], "0"), match[2], key=_number)
    folders = (folder for found in every for folder in found["folders"] if folder.startswith("/"))
    libraries = {name for found in every for name in found["needed"]} - {
        Path(name).name for name in files
    }
    return {
        "libraries": sorted(libraries),
        "versions": dict(sorted(newest.items())),
        "folders": sorted(set(folders)),
    }


def lacking(needs):
    """What this machine has not got of what `of` found: the end of a sentence ("needs ..."), or
    None."""
    versions, here = needs.get("versions", {}), platform.libc_ver()
    if (
        (wanted := versions.get("GLIBC"))
        and here[0] == "glibc"
        and _number(wanted) > _number(here[1])
    ):
        return f"needs glibc {wanted} or newer, and here is {here[1]}"
    known = _cache()
    places = {
        name: find(name, needs.get("folders", []), known) for name in needs.get("libraries", [])
    }
    for name, place in places.items():
        if place is None:
            stem = name.partition(".so")[0]
            others = sorted(other for other in known if other.startswith(f"{stem}.so."))
            return f"needs {name}, and here is {', '.join(others) or 'none'}"
    runtime = places.get("libstdc++.so.6")
    if (wanted := versions.get("GLIBCXX")) and runtime:
        has = [
            name.removeprefix("GLIBCXX_") for name in read(Path(runtime).read_bytes())["defines"]
        ]
        if wanted not in has:
            newest = max(
                (name for name in has if re.fullmatch(r"[\d.]+", name)), key=_number, default="none"
            )
            return f"needs libstdc++ with GLIBCXX {wanted}, and the one here has {newest}"
    return None


def _number(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _cache():
    """{name: path} of the libraries that the dynamic linker knows."""
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        said = subprocess.run([program, "-p"], capture_output=True, text=True).stdout
    except OSError:
        return {}
    kind = "x86-64" if platform.machine() == "x86_64" else ""  # beside those for 32 bits
    return dict(re.findall(rf"^\s*(\S+) \(.*{kind}.*\) => (.+)$", said, re.MULTILINE))


def find(name, folders=(), known=None):
    """Path of a library as the dynamic linker would find it, or None. folders: where the file that
    needs it looks; known: the linker's cache, if it was read already."""
    known = _cache() if known is None else known
    first = [*folders, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    near = (f"{folder}/{name}" for folder in first if Path(folder, name).is_file())
    return (
        next(near, None)
        or known.get(name)
        or next((f"{folder}/{name}" for folder in _FOLDERS if Path(folder, name).is_file()), None)
    )
