"""Clients of services that wait for ever where a server says nothing: a limit for each request."""

from collections.abc import Iterator
from contextlib import contextmanager

SILENCE_S = 300  # of a connection, before a request counts as failed


@contextmanager
def limited(seconds: float = SILENCE_S) -> Iterator[None]:
    """Give every request of `requests` that states no limit of its own one: so many seconds without
    a byte."""
    from requests.adapters import HTTPAdapter

    plain = HTTPAdapter.send

    def send(self, request, stream=False, timeout=None, **rest):
        return plain(self, request, stream=stream, timeout=timeout or seconds, **rest)

    HTTPAdapter.send = send  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = plain  # type: ignore[method-assign]
