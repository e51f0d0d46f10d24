"""Addresses of servers on this machine."""

import socket

from .errors import ServerError


def reached(host):
    """The host in an address: brackets around IPv6, this machine for all of its addresses."""
    host = f"[{host}]" if ":" in host else host
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)


def refuse_in_use(host, port):
    # llama-server listens with SO_REUSEPORT, so a second one of the same user would silently share
    # the port.
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # Closed connections do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError) as error:
        raise ServerError(
            f"Port {port} on {host} is in use or not to be had ({error}). Leave port=None for a free "
            "one."
        ) from error
