"""Kernels of one account that run on Kaggle: two at a time, the others wait; what failed, with its
last lines.

What Kaggle does, and where that was read:
- two batch GPU sessions at a time, "Maximum batch GPU session count of 2 reached."; one that ended
  counts a little longer (Kaggle/kaggle-cli issue 185, unslothai/unsloth pull request 9538);
- a kernel that is refused while it is new leaves an empty notebook behind, and later pushes end
  with "Notebook not found" until it is deleted (several users' logs of 2026): so room is made sure
  of before a push;
- a running session reserves quota up to its limit: "projected to exceed maximum weekly GPU quota"
  (the same logs);
- an account without a verified phone gets sessions without GPU and internet, and no word of it
  (Kaggle's forum, product-feedback/451678; fastai/course-v3 issue 347; frederisk/kaggle-action);
- the log comes a little after the end, as a JSON list of {stream_name, time, data}.
"""

import json
import re
import time
from dataclasses import dataclass

from ..errors import StageError
from .client import RUNNING, Missing, Passing, Refused, patiently
from .rules import KERNEL

SESSIONS = 2  # batch GPU sessions of an account at a time
SESSION_S = 3 * 3600  # after that Kaggle ends a session of ours; its own limit is 12 hours
SETTLE_S = 60  # a session that ended counts a little longer; a status may be that of the run before
SILENCE_S = 30 * 60  # without an answer about a session
ATTEMPTS = 4
LINES = 15  # of a log that are shown
QUOTA = "weekly GPU quota of"
SPENT = "Kaggle (Settings, Quotas) and `kaggle quota` say when it is new; the same command then goes on."
FULL = re.compile(r"session count of \d+ reached|projected to exceed", re.I)
NO_INTERNET = re.compile(
    r"name resolution|Failed to establish a new connection|Network is unreachable|"
    r"No matching distribution found",
    re.I,
)
NO_GPU = re.compile(
    r"session has no(ne: choose)? GPU|no CUDA(-capable)? (GPU|device)|NVIDIA-SMI has failed", re.I
)


class Sessions:
    """Kernels to push: {id: (folder, content)}. Those that ran with this content, as `state` has
    it, are left out."""

    def __init__(self, kaggle, state, jobs):
        self.kaggle, self.state, self.jobs = kaggle, state, jobs
        self.waiting, self.running, self.failed = [], {}, {}
        self.changed = time.monotonic()  # when a session was started or ended
        # Until when one that ended counts
        self.settled = self.changed + state.ended() + SETTLE_S - time.time()
        self.others, self.refusal = 0, ""

    def run(self, wait=True, poll_s=30):
        """Start each and see it end; False where that would mean to wait, and `wait` is not set.

        StageError where sessions failed, with what Kaggle says of each and its last lines.
        """
        from tqdm.auto import tqdm

        self._take_up()
        with tqdm(
            total=len(self.waiting) + len(self.running), unit="session", leave=False
        ) as self.bar:
            while True:
                for name in list(self.running):
                    self._look(name)
                if not self.waiting and not self.running:
                    break
                self.bar.set_description(
                    f"{len(self.running)} running, {len(self.waiting)} waiting"
                )
                if self.waiting and self._has_room() and self._start(self.waiting[0]):
                    continue
                if not wait and time.monotonic() >= self.settled:
                    print(
                        f"Not waited for: {len(self.running)} running, {len(self.waiting)} waiting. The same "
                        "command, later, goes on."
                    )
                    return False
                if time.monotonic() - self.changed > SESSION_S + SILENCE_S:
                    raise StageError(
                        f"No session started or ended for {(SESSION_S + SILENCE_S) / 3600:.1f} hours. "
                        f"{self.refusal} https://www.kaggle.com/code shows what runs; the same command "
                        "goes on."
                    )
                time.sleep(poll_s)
        if self.failed:
            raise StageError(
                "\n".join(f"{self._title(name)}: {text}" for name, text in self.failed.items())
                + "\nThe same command sends what failed again."
            )
        return True

    def _title(self, name):
        return self.jobs[name][0].name

    def _say(self, name, text):
        self.bar.write(f"{self._title(name)}: {text}")

    def _put(self, name, version, step, **more):
        self.state.put(name, self.jobs[name][1], version, step, **more)

    def _take_up(self):
        """Sort the jobs into those that are done, those that a stopped push left running, and the
        rest."""
        for name, (folder, content) in self.jobs.items():
            step, version = self.state.of(name, content)
            if step == "done":
                print(f"{folder.name}: version {version} ran, unchanged (--again runs it anew)")
            elif step == "sent" or (step == "sending" and self._runs(name)):
                self.running[name] = _Run(time.monotonic(), time.monotonic() - SETTLE_S)
            else:
                self.waiting.append(name)

    def _runs(self, name):
        try:
            return patiently(lambda: self.kaggle.session(name)).status in RUNNING
        except Missing:
            return False

    def _has_room(self):
        """Whether a session is free. Asked first: a new kernel that is refused stays behind,
        empty."""
        if len(self.running) >= SESSIONS or time.monotonic() < self.settled:
            return False
        others = _or_none(lambda: self.kaggle.gpu_sessions(self.running)) or []
        if quota := _or_none(self.kaggle.gpu_quota):
            used, reserved, allowed = quota
            if used >= allowed:
                raise StageError(
                    f"The weekly GPU quota of {allowed / 3600:.0f} hours is used up. {SPENT}"
                )
            if used + reserved >= allowed:
                self.refusal = "What runs may still take the rest of the weekly GPU quota."
                return False
        self.bar.set_postfix_str(f"also running: {', '.join(others)}" if others else "")
        if len(others) < self.others:  # one of them ended
            self.settled = time.monotonic() + SETTLE_S
        self.others = len(others)
        return len(self.running) + len(others) < SESSIONS and time.monotonic() >= self.settled

    def _start(self, name):
        """Push a kernel, or note why it cannot be; False where Kaggle has no session for it now."""
        folder, _ = self.jobs[name]
        version = self.state.version(name)
        self._put(name, version, "sending")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                version = self.kaggle.push(folder, SESSION_S)
                break
            except Refused as error:
                self.refusal = str(error)
                if FULL.search(self.refusal):
                    return False
                if QUOTA in self.refusal:  # nothing can be started
                    raise StageError(f"{folder.name}: {self.refusal} {SPENT}") from None
                if attempt == ATTEMPTS or "Notebook not found" not in self.refusal:
                    return self._cannot_start(name, _refusal(name, self.refusal))
            except Passing as error:
                if self._runs(name):  # it got through, only the answer did not
                    version += 1
                    break
                if attempt == ATTEMPTS:
                    raise StageError(
                        f"{folder.name}: {error}\nThe same command, later, goes on."
                    ) from None
            except StageError as error:
                return self._cannot_start(name, str(error))
            time.sleep(SETTLE_S)
        self._put(name, version, "sent")
        self.waiting.remove(name)
        self.changed = time.monotonic()
        self.running[name] = _Run(self.changed, self.changed)
        self._say(name, f"version {version} started, https://www.kaggle.com/code/{name}")
        return True

    def _cannot_start(self, name, why):
        """Note it and go on with the next."""
        self._put(name, self.state.version(name), "failed")
        self.waiting.remove(name)
        self.failed[name] = why
        self._say(name, "could not be started")
        return True

    def _look(self, name):
        """Ask for a session; note its end."""
        run, now = self.running[name], time.monotonic()
        try:
            session = self.kaggle.session(name)
        except (Missing, Passing) as error:
            if now - run.heard > SILENCE_S:
                raise StageError(
                    f"{self._title(name)}: no answer about its session for {SILENCE_S // 60} minutes: "
                    f"{error}\nThe same command, later, goes on; with --again it sends anew."
                ) from None
            return
        run.heard = now
        if session.status in RUNNING or now - run.since < SETTLE_S:
            return
        del self.running[name]
        self.changed, self.settled = now, now + SETTLE_S
        self.bar.update()
        good = session.status == "COMPLETE"
        self._put(name, self.state.version(name), "done" if good else "failed", ended=time.time())
        lines = self._log(name)
        # Also where it ended well: the engine's kernel makes do with the CPU
        hint = _hint(self.jobs[name][0], lines)
        self._say(
            name, session.status.lower().replace("_", " ") + (f"\n{hint}" if good and hint else "")
        )
        if not good:
            said = f" ({session.failure})" if session.failure else ""
            log = (
                ", which ends with:\n" + "\n".join(lines[-LINES:])
                if lines
                else "; it could not be read from here."
            )
            self.failed[name] = (
                f"the session ended with {session.status}{said}.\n{hint}{hint and chr(10)}"
                f"https://www.kaggle.com/code/{name} has its log{log}"
            )

    def _log(self, name):
        for _ in range(3):  # Kaggle has them a little after the end
            if lines := _or_none(lambda: self.kaggle.log(name)):
                return lines
            time.sleep(20)
        return []


@dataclass
class _Run:
    """A session: when it was last heard of, and since when, by monotonic clock, it is our last
    push's."""

    heard: float
    since: float


def _or_none(ask):
    """ask(), or None where it fails: a push will tell."""
    try:
        return ask()
    except StageError:
        return None


def _hint(folder, lines):
    text = "\n".join(lines)
    meta = json.loads((folder / KERNEL).read_text())
    if (
        meta.get("enable_gpu")
        and NO_GPU.search(text)
        or meta.get("enable_internet")
        and NO_INTERNET.search(text)
    ):
        return (
            "It had no GPU or no internet. Kaggle gives both only to accounts with a verified phone number, and "
            "says nothing where there is none: Settings, Phone verification."
        )
    return ""


def _refusal(name, text):
    if "Notebook not found" in text:
        return (
            f"{text}: an empty notebook of that name was left by a push that Kaggle refused. Delete it on "
            f"https://www.kaggle.com/code/{name} (or Your Work, Code), then give the same command."
        )
    return f"Kaggle refuses it: {text}"
