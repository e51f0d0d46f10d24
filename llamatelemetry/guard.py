"""Run a command that dies with its parent, whatever ends the parent.

A child that is told of its parent's death by the kernel (PR_SET_PDEATHSIG) is told of the death of
the *thread* that made it, and a notebook's threads come and go. So this file runs as a process of
its own between the two: it has one thread, holds the read end of a pipe whose other end only the
parent has, and kills the command, with what that has started, when that pipe closes or the command
ends. If this process itself is killed, the kernel kills the command, because here the thread rule
does no harm.

It is started as a plain script (`python -I -S guard.py PARENT GRACE COMMAND...`), so it
imports nothing of the package. PARENT is the id of the process that it dies with, which may be gone
when this one is up. stdin is the parent's pipe (a byte asks for a polite stop, end of file means
that the parent is gone), stdout takes one line with the command's process id, stderr is the
command's log."""

import os
import subprocess
import sys


def popen(command, log, *, env=None, grace=3.0):
    """Start `command` under a guard; returns (guard's Popen, process id of the command).

    log: an open file for its stdout and stderr. Raises OSError if the command cannot be
    executed, or if the guard stalls before it has said so (liveness.Watch)."""
    from .imports import uninterrupted
    from .liveness import Watch

    given, guard, stalled = map(str, (os.getpid(), grace, *command)), None, []
    try:
        with uninterrupted():
            # A Ctrl-C meant for the notebook's cell is not meant for it
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                start_new_session=True,
            )
            with Watch(guard.pid, lambda why: (stalled.append(f": its guard {why}"), guard.kill())):
                said, _, number = guard.stdout.readline().partition(b" ")
        if said != b"pid":
            raise OSError(int(number or 0), f"cannot execute {command[0]}{''.join(stalled)}")
    except BaseException:
        if guard:  # nobody has it: the kernel then kills the command
            guard.kill()
            guard.wait()
        raise
    guard.stdout.close()
    return guard, int(number)


def stop(guard, timeout=10.0):
    """Ask for a polite stop (SIGTERM, then SIGKILL after the guard's grace) and wait for it."""
    if guard.poll() is None:
        try:
            guard.stdin.write(b"s")
            guard.stdin.flush()
        except OSError:
            pass  # it has just ended
        try:
            guard.wait(timeout)
        except subprocess.TimeoutExpired:
            guard.kill()  # the kernel then kills the command
            guard.wait()
    try:
        guard.stdin.close()
    except OSError:
        pass


def end(guard, folder):
    """Stop a command, and remove its folder (scratch.Folder); of a fork it is none."""
    if folder.owner == os.getpid():
        stop(guard)
        folder.remove()


def _main(parent, grace, command):
    import ctypes
    import select
    import signal
    import time

    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    failed, fail = os.pipe2(os.O_CLOEXEC)  # carries errno when exec fails, closes when it succeeds
    me = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            os.setpgid(0, 0)  # a command may be a script, whose own command ends with it
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            if os.getppid() == me:
                os.execv(command[0], command)
        except OSError as error:
            os.write(fail, str(error.errno).encode())
        os._exit(127)
    os.close(fail)
    error = os.read(failed, 16)
    if error:
        os.write(1, b"errno " + error + b"\n")
        return 127
    # Before the parent hears of the command: a log that is a pipe then ends when the command does,
    # also where a signal stops this process at its next step
    said, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        os.write(said, b"pid %d\n" % child)
    except BrokenPipeError:
        pass  # the parent is gone: below
    os.close(said)

    asked = None  # when a polite stop was asked for
    while True:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.killpg(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return code if code >= 0 else 128 - code
        readable, _, _ = select.select([woken] if asked else [0, woken], [], [], 0.5)
        if woken in readable:
            os.read(woken, 64)
        # The pipe may be held open by a fork of the parent; this cannot
        gone = os.getppid() != parent
        if 0 in readable:
            gone = gone or not os.read(0, 1)
            if not gone:
                asked = time.monotonic()
                os.killpg(child, signal.SIGTERM)
        if gone:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 0
        if asked and time.monotonic() - asked > grace:
            os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
