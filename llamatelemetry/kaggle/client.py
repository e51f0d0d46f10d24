"""Kaggle's official client, imported only to push: its calls with typed answers, and three kinds of
failure.

The client (1.8.4 to 2.2.5 were read) ends the process where it finds no token, 1.8 already at its
import; gives no request a time limit; prints warnings among its answers; and where an upload fails,
1.8 prints that and leaves the file out. None of this reaches the caller."""

import inspect
import io
import json
import re
import sys
import time
from contextlib import contextmanager, redirect_stdout
from typing import NamedTuple

import requests

from ..errors import StageError
from ..network import limited
from ..secrecy import keep, redact

PATIENCE_S = 5 * 60  # with failures that may pass
# Of kagglesdk's KernelWorkerStatus
RUNNING = ("QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED")
TOKEN = (
    "Kaggle: Settings, API, Generate New Token, kept in ~/.kaggle/access_token or KAGGLE_API_TOKEN; "
    "~/.kaggle/kaggle.json and `kaggle auth login` work, too."
)


# How Kaggle failed, for push and sessions alone, which know what to do about each; what reaches a
# user is StageError, so these stay here and not in errors.


class Passing(StageError):
    """Kaggle or the network failed in a way that may pass: 5xx, 429, no connection, a page that is
    no answer."""


class Missing(StageError):
    """403 or 404: what was asked for is not there, not there yet, or not this account's."""


class Refused(StageError):
    """Kaggle took the request and refused what it asks for, in its own words."""


def patiently(ask, limit_s=PATIENCE_S):
    """ask(), again and again while it fails in passing, for limit_s at most."""
    started, pause = time.monotonic(), 5
    while True:
        try:
            return ask()
        except Passing as error:
            if time.monotonic() - started + pause > limit_s:
                raise StageError(
                    f"Kaggle does not answer: {error}\nThe same command, later, goes on."
                ) from None
            if pause == 5:
                print(
                    f"Kaggle does not answer ({error}): asked again for {limit_s // 60} minutes.",
                    file=sys.stderr,
                )
            time.sleep(pause)
            pause = min(2 * pause, 60)


class Session(NamedTuple):
    """The last run of a kernel: a name of KernelWorkerStatus, and what Kaggle says of its
    failure."""

    status: str
    failure: str


class Kaggle:
    """An account of Kaggle's. Every method may raise Passing, and StageError where the token is
    refused."""

    def __init__(self):
        with _one_call():
            self.api = _authenticated()
            for name in ("key", "token"):
                keep(self.api.config_values.get(name))
            self.user = self.api.get_config_value(self.api.CONFIG_NAME_USER) or ""

    def dataset(self, name):
        """(status, number of the current version) of a dataset; Missing for half an hour after it
        was created."""
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

        owner, slug = name.split("/")
        request = ApiGetDatasetRequest()
        request.owner_slug, request.dataset_slug = owner, slug
        with _one_call():
            status = self.api.dataset_status(name)
            with self.api.build_kaggle_client() as client:
                return status, client.datasets.dataset_api_client.get_dataset(
                    request
                ).current_version_number

    def send_dataset(self, folder, new):
        """Upload a folder as a dataset, private, or as its next version; the client shows each
        file's progress."""
        with _one_call(shown=True):
            answer = (
                self.api.dataset_create_new(str(folder))
                if new
                else self.api.dataset_create_version(str(folder), "llamatelemetry kaggle push")
            )
        if answer is None or answer.error or (answer.status or "").lower() != "ok":
            raise Refused(getattr(answer, "error", "") or "the client's answer is empty")

    def push(self, folder, seconds):
        """Send a kernel and start it, for at most `seconds`, on the machine that its metadata name.

        Returns the number of its version. Refused, with Kaggle's reason; StageError where it runs
        without an input."""
        with _one_call():
            answer = self.api.kernels_push(str(folder), str(seconds))
        if answer is None or answer.error or not answer.version_number:
            raise Refused(getattr(answer, "error", "") or "the client's answer is empty")
        left_out = [
            source
            for kind in ("dataset", "kernel", "competition", "model")
            for source in getattr(answer, f"invalid_{kind}_sources", None) or ()
        ]
        if left_out:  # it runs, without them
            raise StageError(
                f"Kaggle started version {answer.version_number} without {', '.join(left_out)}: not a "
                f"valid source. Is it there, and {self.user}'s?"
            )
        return answer.version_number

    def session(self, name):
        """The last run of a kernel. Missing, also for a while after it was pushed."""
        with _one_call():
            answer = self.api.kernels_status(name)
        return Session(answer.status.name, answer.failure_message or "")

    def gpu_sessions(self, but):
        """Of the account's ten kernels that ran last: those on a GPU that run now, without those of
        `but`."""
        with _one_call():
            latest = self.api.kernels_list(mine=True, page_size=10, sort_by="dateRun") or []
        others = [
            kernel.ref
            for kernel in latest
            if kernel and kernel.enable_gpu and kernel.ref not in but
        ]
        return [name for name in others if self.session(name).status in RUNNING]

    def gpu_quota(self):
        """The week's GPU quota: (used, reserved by what runs, allowed) in seconds; None where the
        client tells none."""
        if not hasattr(self.api, "quota_view"):  # before 2.0
            return None
        with _one_call():
            quota = self.api.quota_view().gpu_quota
        times = (
            []
            if quota is None
            else [quota.time_used, quota.time_reserved, quota.total_time_allowed]
        )
        return (
            tuple(time.total_seconds() for time in times)
            if times and all(t is not None for t in times)
            else None
        )

    def log(self, name):
        """The lines that a kernel's last run printed; [] where Kaggle has none (yet)."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        request = ApiListKernelSessionOutputRequest()
        request.user_name, request.kernel_slug = name.split("/")
        with _one_call(), self.api.build_kaggle_client() as client:
            text = client.kernels.kernels_api_client.list_kernel_session_output(request).log or ""
        try:  # [{"stream_name", "time", "data"}, ...]
            text = "".join(entry["data"] for entry in json.loads(text))
        except (ValueError, TypeError, KeyError):
            pass
        return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def _authenticated():
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi()
        api.authenticate()
    except ImportError as error:
        raise StageError(
            f"Kaggle's client cannot be used ({error}): pip install 'kaggle>=1.8.4' six"
        ) from None
    except requests.RequestException:  # a ValueError, too, where an answer is no JSON
        raise
    except ValueError as error:  # a kaggle.json without its name or key
        raise StageError(f"{error} {TOKEN}") from None
    except SystemExit:
        raise StageError(f"Kaggle's client found no token that is valid. {TOKEN}") from None
    if "acc" not in inspect.signature(api.kernels_push).parameters:
        raise StageError("This client cannot choose an accelerator: pip install 'kaggle>=1.8.4'")
    upload = api._upload_file

    def upload_or_raise(name, *rest, **options):
        # 1.8 goes on, and the dataset lacks it
        if (file := upload(name, *rest, **options)) is None:
            raise ValueError(f"Upload unsuccessful: {name}")
        return file

    api._upload_file = upload_or_raise
    return api


@contextmanager
def _one_call(shown=False):
    """Run calls of the client: with a time limit, without what it prints unless `shown`, failures
    sorted."""
    try:
        with limited(), redirect_stdout(sys.stdout if shown else io.StringIO()):
            yield
    except StageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _sorted_failure(error) from None  # its own words may hold the token


def _sorted_failure(error):
    response = getattr(error, "response", None)
    code = None if response is None else response.status_code
    says = (
        str(error).strip()
        if isinstance(error, (OSError, ValueError))
        else f"{type(error).__name__}: {error}"
    )
    if code == 401:
        return StageError(f"Kaggle refuses the token ({says}). {TOKEN}")
    if code in (403, 404) or "was denied" in says:  # 2.x makes a ValueError of the former
        return Missing(says)
    # No answer at all, or one that the client cannot read: an error page, a state that it has no
    # name for.
    unread = code is None and isinstance(
        error,
        (
            requests.RequestException,
            ConnectionError,
            TimeoutError,
            json.JSONDecodeError,
            LookupError,
        ),
    )
    if isinstance(error, requests.ConnectionError) and "resolve" in says:
        says = "there is no connection to Kaggle"
    if unread or code in (408, 429) or (code or 0) >= 500 or says.startswith("Upload unsuccessful"):
        return Passing(says)
    reason = redact(response.text or "").strip()[:300] if response is not None else ""
    return StageError(" ".join(filter(None, (says, reason if reason not in says else ""))))
