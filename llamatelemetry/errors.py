"""Errors for the user: each says what happened and what to do next."""

import os

from .secrecy import redact


class LlamaTelemetryError(RuntimeError):
    """Base class of every error that this package raises on purpose. Its message can be printed
    whatever it names, and has no secret in it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(shown(arg)) if isinstance(arg, str) else arg for arg in args))


class ModelNotFoundError(LlamaTelemetryError, FileNotFoundError):
    """No GGUF file for that name, path or "repo:file"."""


class ModelLoadError(LlamaTelemetryError):
    """A file is there, but it is not a model that llama.cpp can load."""


class OptionError(LlamaTelemetryError, TypeError):
    """An option that load_model or embed() does not take, or a value that the option does not."""


class ServerError(LlamaTelemetryError):
    """llama-server is missing, did not start, or did not answer."""


class TemplateError(ServerError):
    """llama-server cannot parse a chat template, the file's or the one that was given."""


class CaptureError(LlamaTelemetryError, ValueError):
    """A capture or an edit that cannot be done as asked."""


class NotFiniteError(CaptureError):
    """NaN or infinity among the values that a measure needs; the message names file, stage and
    layer."""


class NotebookError(LlamaTelemetryError):
    """A notebook could not be run to its end; the message names the notebook and the cell, or the
    parameter."""


class ParameterError(NotebookError, ValueError):
    """A notebook's parameter that it has not got, or a value that it cannot take; the message names
    it."""


class WorkerCrashedError(LlamaTelemetryError):
    """The capture worker ended; the message carries the tail of its log."""


class GpuError(LlamaTelemetryError):
    """A GPU or a GPU library that was asked for is not to be had."""


class GraphistryError(LlamaTelemetryError):
    """Graphistry refused or could not be reached; tables and offline page are still there."""


class OutputError(LlamaTelemetryError, OSError):
    """A file that cannot be written there: the disk refuses it, or it would destroy what it is made
    from."""


def shown(text: str | bytes | os.PathLike) -> str:
    """A name that can be printed and drawn anywhere: bytes that are not UTF-8 are \\xff. text: str,
    bytes or a path."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:  # half a character, which no name of a file has
        name = str(text).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def brief(value: object, most: int = 80) -> str:
    """What was given, as Python writes it, without secrets and then cut: half a secret would be
    none that is known."""
    said = redact(repr(value))
    return said if len(said) <= most else f"{said[: most - 4]} ..."


class EngineBuildError(LlamaTelemetryError):
    """The engine could not be built; the message carries the tail of the log."""


class CompareError(LlamaTelemetryError, ValueError):
    """Files or a text that cannot be compared as asked."""


class CollectError(LlamaTelemetryError, ValueError):
    """Texts whose states cannot be collected as asked, or a store that holds something else."""


class ProbeError(LlamaTelemetryError, ValueError):
    """Labels, groups or states that a probe cannot use."""


class EmbeddingError(LlamaTelemetryError, ValueError):
    """Rows, words or groups that an embedding analysis cannot use."""


class FeatureError(LlamaTelemetryError, ValueError):
    """Published features that cannot be read, or that are not of this model or capture."""


class QuantizeError(LlamaTelemetryError):
    """A file could not be quantized, expanded or measured for an importance matrix; nothing
    half-written is left."""


class StageError(LlamaTelemetryError):
    """Something cannot be staged or pushed as it is; the message names the file and the rule."""
