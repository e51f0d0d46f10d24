"""What a notebook remembers of former cells, and a cell that is run again must not keep."""

import sys


def forget(kind: type, keep: object) -> None:
    """Take objects of this kind, except `keep`, out of IPython's Out, _ and __, and the last
    traceback with its frames: an engine that only these hold, the last value of a cell or caught
    in one that failed, is dropped. Variables stay."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    for name in ("last_value", "last_traceback", "last_exc"):  # the last one from Python 3.12 on
        setattr(sys, name, None)
    shell.last_execution_result = None
    spaces = (shell.user_ns, shell.user_ns_hidden, vars(shell.displayhook))
    for place in (shell.user_ns.get("_oh", {}), *spaces):
        for name in list(place):
            written = isinstance(name, str) and name.strip("_0123456789") != ""  # by the user
            if not written and isinstance(place[name], kind) and place[name] is not keep:
                place[name] = ""
