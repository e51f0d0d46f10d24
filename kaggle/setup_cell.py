REPOSITORY = ""  # where pip finds llamatelemetry if it is neither attached nor installed: "git+https://...", a wheel
import glob, importlib.util, os, subprocess, sys

inputs = os.environ.get("LLAMATELEMETRY_KAGGLE_INPUT", "/kaggle/input")
source = max(glob.glob(f"{inputs}/**/llamatelemetry-*.whl", recursive=True), default=None)
if source is None and importlib.util.find_spec("llamatelemetry") is None:
    assert REPOSITORY, "llamatelemetry is not here: attach its dataset (Add Input) or set REPOSITORY in this cell"
    source = REPOSITORY
if source:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
    importlib.invalidate_caches()

from llamatelemetry import InferenceEngine, kaggle

kaggle.setup()  # engine, packages that are missing, secrets, folders, this process's GPU; says what it did
from llamatelemetry.plots import theme
