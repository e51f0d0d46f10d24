"""llamatelemetry: see inside a quantized language model while llama.cpp runs it.

Public names are imported on first use, so that `import llamatelemetry` loads no GPU library and
costs nothing."""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "InferenceEngine": "engine",
    "InferResult": "server.completion",
    "ServerManager": "server.manager",
    "list_models": "files.models",
    "resolve_model": "files.models",
    "GGUFFile": "files.gguf",
    "Capture": "capture.session",
    "ablate_head": "capture.edits",
    "ablate_layer": "capture.edits",
    "scale": "capture.edits",
    "patch": "capture.edits",
    "quantize": "convert.quantize",
    "compare_quantizations": "compare.comparison",
    "load_text": "compare.texts",
    "LlamaTelemetryError": "errors",
    "ModelNotFoundError": "errors",
    "ModelLoadError": "errors",
    "OptionError": "errors",
    "ServerError": "errors",
    "CaptureError": "errors",
    "WorkerCrashedError": "errors",
    "GpuError": "errors",
    "GraphistryError": "errors",
    "OutputError": "errors",
    "EngineBuildError": "errors",
    "NotebookError": "errors",
    "ParameterError": "errors",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'llamatelemetry' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value


def __dir__():
    return sorted(__all__)
