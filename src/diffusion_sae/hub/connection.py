"""Errors of the connection to the Hub, as the OSError that callers expect of a file that cannot be had."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2


@contextmanager
def clear_connection_errors(what: str) -> Iterator[None]:
    """huggingface_hub lets those of its HTTP library through where it gives up; its own are OSErrors and stay.

    Args:
        what: was being done, for the message.

    Raises:
        ConnectionError: if the connection breaks off, cannot be made or takes too long.
    """
    try:
        yield
    except httpx2.HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise ConnectionError(
            f"The connection to the Hub failed while {what} ({type(error).__name__}: {error}). What was not whole is "
            "not used. Try again."
        ) from error
