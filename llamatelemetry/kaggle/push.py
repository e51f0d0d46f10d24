"""`kaggle push`: staged folders to Kaggle, in the order in which they need one another.

What Kaggle does, and where that was read:
- a dataset answers 403 or 404 until its first version is processed, up to half an hour
  (Kaggle/kagglehub pull request 182, Kaggle/kaggle-cli issue 54), and "ready" may be that of the
  version before: the version's number counts, as in the client's
  `dataset_status(format="json(status,current_version_number)")`;
- a kernel whose dataset is not ready runs without it: "not valid dataset sources" (the client's
  `kernels_push_cli`).

What was sent is written to push.json beside the folders, before and after each step: a push that
was stopped goes on."""

import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import StageError
from ..files.outputs import written
from ..tools.build import reckoned
from .client import Kaggle, Missing, Passing, patiently
from .rules import DATASET, check
from .sessions import Sessions

STATE = "push.json"
DATASET_S = 45 * 60  # until a dataset is ready
ATTEMPTS = 4  # of what fails in passing
# Decide what an engine wheel holds
BUILDERS = tuple(
    f"llamatelemetry/tools/{name}.py"
    for name in ("build", "recipes", "cuda_toolkit", "slim", "needs")
)


def push(
    folder: str | os.PathLike = "staged",
    names: Sequence[str] = (),
    wait: bool = True,
    again: bool = False,
    poll_s: float = 30,
) -> None:
    """Send staged folders with the official `kaggle` client: datasets, the engine kernel, then the
    notebooks.

    The engine is waited for, because a notebook that is pushed before cannot attach it; then two
    notebooks run at a time. What is there unchanged is not sent again. names: only these folders.
    wait=False: send what can be sent now, wait for no session; the same call later goes on. again:
    send and run everything anew. poll_s: seconds between two looks at a session. StageError if the
    client is missing or refuses, or a session fails; then with its last lines."""
    chosen = _chosen(Path(folder), names)
    metas = {path: check(path) for path in chosen}  # everything, before anything is sent
    kaggle = patiently(Kaggle, 60)
    for path, meta in metas.items():
        owner = meta["id"].partition("/")[0]
        if kaggle.user and owner != kaggle.user.lower():
            raise StageError(
                f"{path.name} is staged for {owner}, and the token is {kaggle.user}'s: stage it with "
                f"--user {kaggle.user.lower()}."
            )
    state = State(Path(folder) / STATE, again)
    kernels = [path for path in chosen if not (path / DATASET).is_file()]
    try:
        for path in chosen:
            if path not in kernels:
                _push_dataset(kaggle, state, path, metas[path]["id"])
        for some in (
            [path for path in kernels if path.name == "engine"],
            [path for path in kernels if path.name != "engine"],
        ):
            jobs = {metas[path]["id"]: (path, _content(path, metas[path], state)) for path in some}
            _say_what_it_takes(jobs, metas, state)
            if not Sessions(kaggle, state, jobs).run(wait, poll_s):
                return
    except KeyboardInterrupt:
        print(
            "Stopped. The same command goes on from here; sessions that started run on.",
            file=sys.stderr,
        )
        raise


def _say_what_it_takes(jobs, metas, state):
    for name, (path, content) in jobs.items():
        if path.name == "engine" and state.of(name, content)[0] != "done":
            quota = (
                ", which count against the week's GPU quota"
                if metas[path].get("enable_gpu")
                else ""
            )
            print(f"engine: its build takes {reckoned('75')}{quota}.")


def _chosen(folder, names):
    folders = (
        {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
        if folder.is_dir()
        else {}
    )
    if lost := [name for name in names if name not in folders] or (not folders and [str(folder)]):
        raise StageError(
            f"Not staged: {', '.join(lost)}. Run `llamatelemetry kaggle stage --user NAME` first."
        )
    return [folders[name] for name in dict.fromkeys(names or folders)]


class State:
    """What was sent: {id: {content, version, step, ended}}, step one of sending, sent, done,
    failed; a JSON file."""

    def __init__(self, path, again=False):
        self.path, self.again = path, again
        try:
            self.records = json.loads(path.read_text())
        except FileNotFoundError:
            self.records = {}
        except ValueError:
            raise StageError(
                f"{path} is no JSON: delete it, and everything is sent anew."
            ) from None

    def version(self, name):
        return self.records.get(name, {}).get("version", 0)

    def step(self, name):
        return self.records.get(name, {}).get("step", "")

    def of(self, name, content):
        """(step, version) of this content; ("", 0) if it was never sent, or is to be sent again."""
        record = self.records.get(name, {})
        if self.again or record.get("content") != content:
            return "", 0
        return record["step"], record["version"]

    def ended(self):
        """When the last session ended, by the clock; 0 if none did."""
        return max([record.get("ended", 0) for record in self.records.values()], default=0)

    def put(self, name, content, version, step, **more):
        self.records[name] = {"content": content, "version": version, "step": step, **more}
        with written(self.path, error=StageError) as temporary:
            temporary.write_text(json.dumps(self.records, indent=1))


def content_of(folder: Path, *more: object) -> str:
    """A hash of a folder's files, and of what else its result depends on.

    Of a wheel the files in it count: one that is built again has other dates.
    """
    digest = hashlib.sha256(repr(more).encode())
    for file in sorted(folder.iterdir()):
        digest.update(f"\n{file.name}\n".encode())
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                digest.update(
                    repr(
                        sorted((entry.filename, entry.CRC) for entry in archive.infolist())
                    ).encode()
                )
        else:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _content(path, meta, state):
    """What decides whether a kernel runs again: its files, and what it attaches or, the engine's,
    builds with."""
    if path.name == "engine":
        wheels = sorted((path.parent / "wheels").glob("llamatelemetry-*.whl"))
        return content_of(
            path,
            *(
                entry.CRC
                for wheel in wheels
                for entry in zipfile.ZipFile(wheel).infolist()
                if entry.filename in BUILDERS
            ),
        )
    return content_of(
        path,
        *(
            state.version(name)
            for field in ("dataset_sources", "kernel_sources")
            for name in meta.get(field, ())
        ),
    )


# Datasets


def _push_dataset(kaggle, state, path, name):
    content = content_of(path)
    step, version = state.of(name, content)
    if step == "done":
        print(f"{path.name}: version {version} is there, unchanged")
        return
    # Also where other content follows: a new dataset has no version to build on yet
    if state.step(name) == "sent":
        _wait_for_dataset(kaggle, path, name, state.version(name))
    there = _version(kaggle, name)
    if not step or there < version:
        version = _send_dataset(kaggle, state, path, name, content, there)
        state.put(name, content, version, "sent")
        _wait_for_dataset(kaggle, path, name, version)
    state.put(name, content, version, "done")
    print(f"{path.name}: version {version} is ready, https://www.kaggle.com/datasets/{name}")


def _version(kaggle, name):
    """Number of the version that is there, 0 if there is none."""
    try:
        return patiently(lambda: kaggle.dataset(name))[1]
    except Missing:
        return 0


def _send_dataset(kaggle, state, path, name, content, there):
    """Send a folder as the version after `there`; returns its number."""
    for attempt in range(1, ATTEMPTS + 1):
        state.put(name, content, there + 1, "sending")
        try:
            kaggle.send_dataset(path, new=not there)
            return there + 1
        except Passing as error:
            if _version(kaggle, name) > there:
                return there + 1  # it got through, only the answer did not
            if attempt == ATTEMPTS:
                raise StageError(
                    f"{path.name}: {error}\nThe same command goes on; files that are up are not sent "
                    "again."
                ) from None
            time.sleep(30)
        except StageError as error:
            if there or "already in use" not in str(error):
                raise StageError(f"{path.name}: Kaggle refuses the dataset: {error}") from None
            # It is there; its account is told 403 until it is processed
            _wait_for_dataset(kaggle, path, name, 1)
            there = _version(kaggle, name)
    raise StageError(f"{path.name}: Kaggle neither makes the dataset nor a version of it.")


def _wait_for_dataset(kaggle, path, name, version):
    from tqdm.auto import tqdm

    started, answer = time.monotonic(), "no answer"
    with tqdm(
        total=DATASET_S, unit="s", desc=f"waiting until Kaggle has {path.name}", leave=False
    ) as bar:
        while (passed := time.monotonic() - started) < DATASET_S:
            bar.update(int(passed) - bar.n)
            try:
                status, there = kaggle.dataset(name)
            except (Missing, Passing) as error:
                answer = str(error)
            else:
                answer = f"{status}, version {there}"
                if status == "ready" and there >= version:
                    return
                if status in ("failed", "deleted") and (there >= version or passed > 120):
                    raise StageError(
                        f"{path.name}: Kaggle could not process the dataset ({answer}): "
                        f"https://www.kaggle.com/datasets/{name}"
                    )
            time.sleep(10)
    raise StageError(
        f"{path.name}: version {version} is not ready after {DATASET_S // 60} minutes, Kaggle says: "
        f"{answer}. The same command, later, goes on."
    )
