"""Files: what they are called, how one is written, and that none is written over one that it is
made from."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import LlamaTelemetryError, OutputError, brief, shown
from .scratch import borrowed

_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def path_of(given: str | bytes | os.PathLike, error: type[Exception] = LlamaTelemetryError) -> Path:
    """A user's path (str, bytes, PathLike) as an absolute one, which stays what it is when the
    working folder changes.

    "~" is the user's home; links stay. Raises `error` for what names no file, or lies where nobody
    may look."""
    try:
        # pathlib's own expanduser raises for the "~x" of no user.
        path = Path(os.fsdecode(os.path.expanduser(given))).absolute()
        path.lstat()
    except (TypeError, ValueError) as why:  # a number; a zero byte, half a character
        raise error(f"{brief(given)} is no name of a file: {why}.") from None
    except OSError as why:
        if why.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise error(
                f"{brief(shown(given))} is no name of a file here: {why.strerror}."
            ) from None
    return path


def split_parts(path: str | os.PathLike) -> list[Path]:
    """All parts of the split GGUF that `path` belongs to, in order; [path] if its name is not that
    of a part."""
    path = Path(path)
    found = _SPLIT.match(path.name)
    if not found:
        return [path]
    prefix, _, count = found.groups()
    return [
        path.with_name(f"{prefix}-{part:05d}-of-{count}.gguf") for part in range(1, int(count) + 1)
    ]


def is_first(path):
    """Whether a file is no part of a split GGUF, or its first one."""
    found = _SPLIT.match(path.name)
    return not found or int(found[2]) == 1


def some(names):
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def labels(paths: Iterable[str | os.PathLike]) -> list[str]:
    """A name to show for each of the paths: its stem, with as many of its folders before it as tell
    it from the others.

    Links keep their own names. A path that comes twice has one name. Returns a list, in the order
    of `paths`."""
    named = [Path(path) for path in paths]
    depth = dict.fromkeys(named, 1)

    def name(path):
        alone = all(
            path == other or path.with_suffix("") != other.with_suffix("") for other in depth
        )
        return "/".join([*path.parts[-depth[path] : -1], path.stem if alone else path.name])

    while True:
        names = [name(path) for path in depth]
        alike = [
            path for path in depth if names.count(name(path)) > 1 and depth[path] < len(path.parts)
        ]
        if not alike:
            return [shown(name(path)) for path in named]
        for path in alike:
            depth[path] += 1


def once(named):
    """{name: path} without files that an earlier name stands for already, by whatever path."""
    first = {}
    for name, path in named.items():
        first.setdefault(os.path.realpath(path), (name, path))
    return dict(first.values())


def refuse_overwriting(dst, inputs, error=OutputError):
    """Raise `error` where `dst` is one of the inputs, under whatever name (links, folders, upper
    and lower case).

    inputs: paths; of a split model all parts count. None among them is left out.
    """
    dst = path_of(dst, error)
    for given in inputs:
        for path in split_parts(path_of(given, error)) if given is not None else ():
            if _same(dst, path):
                raise error(
                    f"{shown(dst)} is the file that it would be made from ({shown(path)}): writing it would "
                    "destroy that. Give another name for the output."
                )


def _same(one, other):
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def check_output(dst, inputs=(), model=False, error=OutputError):
    """The Path of an output, or `error` where `written` would refuse it: to be asked before the
    work, too."""
    dst = path_of(dst, error)
    refuse_overwriting(dst, inputs, error)
    if dst.is_dir():
        raise error(f"{shown(dst)} is a folder: give the name of a file in it.")
    if dst.exists() and not dst.is_file():
        raise error(f"{shown(dst)} is a device or a pipe: give the name of a file.")
    if not model and _is_model(dst):
        raise error(
            f"{shown(dst)} is a model or another file of tensors: give another name for the output."
        )
    return dst


def folder_of(given: str | os.PathLike, error: type[Exception] = OutputError) -> Path:
    """A folder to write to, made where it is not there; `error` where it cannot be."""
    folder = path_of(given, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as trouble:
        raise error(
            f"No folder {shown(folder)} could be made: {trouble.strerror}. Give another one."
        ) from None
    return folder


@contextmanager
def written(dst, *, inputs=(), need=0, model=False, error=OutputError):
    """A temporary path beside `dst` that becomes `dst` when the block ends well, and is removed
    when it does not.

    inputs: what the file is made from, see refuse_overwriting. need: bytes that will be written.
    model: a GGUF file is what is written; nothing else takes the place of one. Raises `error` for
    what the file system refuses, too."""
    dst = check_output(dst, inputs, model, error)
    # Another one each time, and shorter than any limit
    temporary, stack = dst.with_name(f".{secrets.token_hex(8)}.partial"), ExitStack()
    stack.callback(temporary.unlink, missing_ok=True)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.parent).free
        if free < need:
            raise error(
                f"{shown(dst)} needs {need / 1e9:.2f} GB and {shown(dst.parent)} has {free / 1e9:.2f} GB free: "
                "make room there, or choose another folder."
            )
        # One that takes time: if this process is killed, the half is found by this. What lies in
        # scratch goes with its folder.
        if need and not dst.parent.samefile(folder := stack.enter_context(borrowed())):
            (link := folder / temporary.name).symlink_to(temporary)
            stack.callback(link.unlink)
        yield temporary
        os.replace(temporary, dst)
    except OSError as trouble:
        if isinstance(trouble, LlamaTelemetryError):
            raise
        raise error(
            f"Could not write {shown(dst)}: {trouble}. Nothing was left behind."
        ) from trouble
    finally:
        with suppress(OSError):
            stack.close()


def _is_model(path):
    """Whether a file is GGUF, or safetensors of somebody else: a capture's header has our name in
    it."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            # Safetensors: the bytes of the JSON that follows
            size = int.from_bytes(head[:8], "little")
            foreign = (
                head[8:] == b"{" and size < 10**8 and b'"llamatelemetry"' not in file.read(size)
            )
            return head[:4] == b"GGUF" or foreign
    except OSError:
        return False
