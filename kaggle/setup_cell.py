import glob, importlib.util, os, subprocess, sys
from packaging.utils import parse_wheel_filename

# llamatelemetry's newest wheel: attached, or carried by a staged notebook (the cell above).
wheels = glob.glob("/kaggle/input/**/llamatelemetry-*.whl", recursive=True)
wheels += glob.glob("llamatelemetry-*.whl")
if wheels:
    newest = max(wheels, key=lambda path: parse_wheel_filename(os.path.basename(path))[1:3])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, newest], check=True)
    importlib.invalidate_caches()
assert importlib.util.find_spec("llamatelemetry"), \
    "llamatelemetry is not here: attach its dataset, or upload a staged notebook instead"

from llamatelemetry import InferenceEngine, kaggle

kaggle.setup()  # engine, missing packages, secrets, folders, this process's GPU
from llamatelemetry.views import theme
