"""A Kaggle of a test's own: the real client, of whatever version is installed, asks it in place of
api.kaggle.com.

It answers as Kaggle was seen to (the sentences below are Kaggle's own), on a clock that only
sleeping moves."""

import json
import sys
import tempfile
import types

import requests
from requests.adapters import HTTPAdapter

SESSIONS_FULL = "Maximum batch GPU session count of 2 reached."
QUOTA_RESERVED = (
    "Session cannot start because currently running sessions are projected to exceed maximum weekly GPU "
    "quota of 30. Cancelling running sessions may allow starting new sessions."
)
QUOTA_SPENT = "Maximum weekly GPU quota of 30.00 hours reached."
NOT_FOUND = "Notebook not found"


class Clock:
    """monotonic() and sleep() of a time that passes at once."""

    def __init__(self):
        self.now = 1000.0
        self.events = []  # (time, what happens then)

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.now += seconds
        for at, event in [pair for pair in self.events if pair[0] <= self.now]:
            self.events.remove((at, event))
            event()


class Run(types.SimpleNamespace):
    """A kernel's session: start, end (times), status at the end, failure message, log."""


class StandIn:
    """Datasets and kernels of the account `user`; `calls` has the name of each request with its
    body."""

    def __init__(self, clock, user="someone"):
        self.clock, self.user = clock, user
        self.calls, self.uploads, self.faults = [], [], {}
        self.datasets, self.kernels, self.ghosts = {}, {}, set()
        self.hidden_s = self.processing_s = 20  # of a new version: 403, then not ready
        self.run_s, self.ends = 300, {}  # of a session; id -> (status, failure, log)
        self.refuse = []  # the next answers to SaveKernel
        self.lingers_s = 30  # of a session that ended, in the count
        self.quota = {"timeUsed": "3600s", "timeReserved": "0s", "totalTimeAllowed": "108000s"}

    def fault(self, request, *faults):
        """The next answers to a request: HTTP codes, or exceptions of the connection."""
        self.faults.setdefault(request, []).extend(faults)

    def asked(self, *names):
        return [body for name, body in self.calls if name in names]

    def pushed(self):
        return [body["slug"].partition("/")[2] for body in self.asked("SaveKernel")]

    # What stands in for requests.adapters.HTTPAdapter.send

    def send(self, request, **_):
        if request.method == "PUT":
            return self._upload(request)
        name = request.url.rpartition("/")[2]
        body = json.loads(request.body or "{}")
        self.calls.append((name, body))
        if waiting := self.faults.get(name):
            fault = waiting.pop(0)
            if isinstance(fault, Exception):
                raise fault
            if fault:
                return _answer(
                    fault, {"code": fault, "message": requests.status_codes._codes[fault][0]}
                )
        answer = getattr(self, name)(body)
        return answer if isinstance(answer, requests.Response) else _answer(200, answer)

    def _upload(self, request):
        name = request.url.rpartition("/")[2]
        if request.headers.get("Content-Range", "").startswith("bytes */"):
            return _answer(308, {})  # asked how much is there: nothing
        if waiting := self.faults.get("upload"):
            return _answer(waiting.pop(0), {})
        self.uploads.append((name, len(request.body.read())))
        return _answer(200, {})

    def StartBlobUpload(self, body):
        return {
            "token": f"token of {body['name']}",
            "createUrl": f"https://storage.example/{body['name']}",
        }

    def IntrospectToken(self, body):
        return {"active": body["token"] == "good", "username": self.user}

    # Datasets

    def _dataset(self, body):
        """The dataset of a request and its newest visible version, or a 403."""
        found = self.datasets.get(f"{body['ownerSlug']}/{body['datasetSlug']}")
        if found is None or self.clock.now < found["seen"]:
            return None, _answer(
                403, {"code": 403, "message": "Permission 'datasets.get' was denied"}
            )
        return found, None

    def GetDatasetStatus(self, body):
        found, denied = self._dataset(body)
        if found is None:
            return denied
        # Until the next version is taken up, the status is that of the version before.
        return {
            "status": found.get("fails")
            or (
                "READY"
                if self.clock.now >= found["ready"] or self.clock.now < found["taken"]
                else "BLOBS_RECEIVED"
            )
        }

    def GetDataset(self, body):
        found, denied = self._dataset(body)
        if found is None:
            return denied
        return {"currentVersionNumber": found["version"] - (self.clock.now < found["ready"]) or 1}

    def CreateDataset(self, body):
        name = f"{body['ownerSlug']}/{body['slug']}"
        if name in self.datasets:
            return {
                "status": "error",
                "error": f'The requested slug "{body["slug"]}" is already in use by a dataset.',
            }
        return self._version(name, body, 0, self.hidden_s)

    def CreateDatasetVersion(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        return self._version(name, body["body"], self.datasets[name]["version"], 0)

    def _version(self, name, body, before, hidden_s):
        now = self.clock.now
        self.datasets[name] = {
            "version": before + 1,
            "seen": now + hidden_s,
            "taken": now + 15,
            "ready": now + hidden_s + self.processing_s,
            "files": sorted(file["token"] for file in body.get("files", ())),
        }
        return {"status": "ok", "url": f"https://www.kaggle.com/datasets/{name}", "ref": name}

    # Kernels

    def counted(self):
        return [
            name
            for name, kernel in self.kernels.items()
            if self.clock.now < kernel["run"].end + self.lingers_s
        ]

    def SaveKernel(self, body):
        name = body["slug"]
        if name in self.ghosts:
            return {"error": NOT_FOUND}
        refusal = self.refuse.pop(0) if self.refuse else None
        if refusal is None and len(self.counted()) >= 2:
            refusal = SESSIONS_FULL
        if refusal:
            if name not in self.kernels:
                self.ghosts.add(name)
            return {"error": refusal}
        before = self.kernels.get(name, {"version": 0, "run": None})
        status, failure, log = self.ends.get(name.partition("/")[2], ("COMPLETE", "", "done\n"))
        now = self.clock.now
        self.kernels[name] = {
            "version": before["version"] + 1,
            "body": body,
            "before": before["run"],
            "run": Run(start=now, end=now + self.run_s, status=status, failure=failure, log=log),
        }
        lost = {
            field: [source for source in body.get(f"{kind}DataSources", []) if source not in there]
            for kind, field, there in (
                ("dataset", "invalidDatasetSources", self.datasets),
                ("kernel", "invalidKernelSources", self.kernels),
            )
        }
        return {
            "ref": f"/code/{name}",
            "url": f"https://www.kaggle.com/code/{name}",
            "versionNumber": before["version"] + 1,
            **{field: names for field, names in lost.items() if names},
        }

    def _kernel(self, body):
        found = self.kernels.get(f"{body['userName']}/{body['kernelSlug']}")
        return found, None if found else _answer(
            403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        )

    def GetKernelSessionStatus(self, body):
        found, denied = self._kernel(body)
        if found is None:
            return denied
        run, now = found["run"], self.clock.now
        if now < run.start + 10:  # not taken up: nothing yet, or the run before
            return (
                {"status": found["before"].status} if found["before"] else {}
            )  # the client reads {} as QUEUED
        if now < run.end:
            return {"status": "RUNNING"}
        return {"status": run.status, **({"failureMessage": run.failure} if run.failure else {})}

    def ListKernelSessionOutput(self, body):
        found, denied = self._kernel(body)
        if found is None:
            return denied
        if self.clock.now < found["run"].end + 15:  # the log comes a little after the end
            return {}
        return {
            "log": json.dumps(
                [
                    {"stream_name": "stdout", "time": 1.0, "data": line + "\n"}
                    for line in found["run"].log.splitlines()
                ]
            )
        }

    def GetAcceleratorQuotaStatistics(self, body):
        return {"gpuQuota": self.quota}

    def ListKernels(self, body):
        return {"kernels": [{"ref": name, "enableGpu": True} for name in self.kernels]}


def _answer(code, body):
    response = requests.Response()
    response.status_code, response.url = code, "https://api.kaggle.com/v1/..."
    response.reason = requests.status_codes._codes.get(code, ["?"])[0].replace("_", " ").title()
    response.headers["Content-Type"] = "application/json"
    response.headers["X-Kaggle-APIVersion"] = (
        "99.0.0"  # so that the client warns that it is outdated
    )
    response._content = json.dumps(body).encode()
    return response


def install(monkeypatch, folder, user="someone", key="kaggle.json"):
    """Put a stand-in in Kaggle's place for the client that is imported next; returns it.

    key: the file of the token, None for no token.
    """
    clock = Clock()
    standin = StandIn(clock, user)
    (folder / ".kaggle").mkdir(parents=True, exist_ok=True)
    if key:
        path = folder / ".kaggle" / key
        path.write_text(
            json.dumps({"username": user, "key": "0" * 32}) if key.endswith("json") else "good"
        )
        path.chmod(0o644)  # the client warns of it, by the name of the file
    monkeypatch.setenv("HOME", str(folder))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        HTTPAdapter, "send", lambda self, request, **options: standin.send(request, **options)
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its token's place when it is imported
    monkeypatch.setattr(
        tempfile, "tempdir", str(folder)
    )  # where the client notes what is half uploaded
    monkeypatch.setattr("time.sleep", clock.sleep)  # of the client's own attempts
    from llamatelemetry.kaggle import client, push, sessions

    for module in (client, push, sessions):
        monkeypatch.setattr(module, "time", clock)
    return standin
