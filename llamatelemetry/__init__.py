"""llamatelemetry: see inside a quantized language model while llama.cpp runs it.

Public names are imported on first use, so that `import llamatelemetry` loads no GPU library and costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_WHERE = {
    "InferenceEngine": "engine",
    "InferResult": "engine",
    "ServerManager": "server",
    "list_models": "models",
    "resolve_model": "models",
    "GGUFFile": "gguf",
    "Capture": "capture.session",
    "ablate_head": "capture.edits",
    "ablate_layer": "capture.edits",
    "scale": "capture.edits",
    "patch": "capture.edits",
    "quantize": "quantize",
    "compare_quantizations": "compare",
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
    "EngineBuildError": "build",
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


class _Package(ModuleType):
    """Importing `llamatelemetry.quantize` sets that module as an attribute here: the function of the name stays."""

    def __setattr__(self, name, value):
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
