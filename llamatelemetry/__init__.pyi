# What `llamatelemetry` offers, and where it is: __init__.py, editors and type checkers read this.
from .capture.data import Capture as Capture
from .capture.edits import ablate_head as ablate_head
from .capture.edits import ablate_layer as ablate_layer
from .capture.edits import add as add
from .capture.edits import knock_out as knock_out
from .capture.edits import patch as patch
from .capture.edits import scale as scale
from .compare.choices import compare_tasks as compare_tasks
from .compare.comparison import compare_quantizations as compare_quantizations
from .compare.texts import load_text as load_text
from .convert.expand import expand as expand
from .convert.expand import make_reference as make_reference
from .convert.importance import imatrix as imatrix
from .convert.quantize import quantize as quantize
from .engine import InferenceEngine as InferenceEngine
from .errors import CaptureError as CaptureError
from .errors import EngineBuildError as EngineBuildError
from .errors import FeatureError as FeatureError
from .errors import GpuError as GpuError
from .errors import GraphistryError as GraphistryError
from .errors import LlamaTelemetryError as LlamaTelemetryError
from .errors import ModelLoadError as ModelLoadError
from .errors import ModelNotFoundError as ModelNotFoundError
from .errors import NotebookError as NotebookError
from .errors import OptionError as OptionError
from .errors import OutputError as OutputError
from .errors import ParameterError as ParameterError
from .errors import ServerError as ServerError
from .errors import WorkerCrashedError as WorkerCrashedError
from .features.encoder import Features as Features
from .files.gguf import GGUFFile as GGUFFile
from .files.models import list_models as list_models
from .files.models import resolve_model as resolve_model
from .server.completion import InferResult as InferResult
from .server.manager import ServerManager as ServerManager

__version__: str
