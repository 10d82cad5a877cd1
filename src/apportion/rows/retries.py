"""What goes wrong with a store that is reached over a network: what passes by itself is tried again, the rest is said.

    Retries("s3://bucket/acts").call(lambda: fs.cat_file(path))

Throttling (429, SlowDown, 503), other errors of the server (5xx), time-outs and connections that are lost are tried
again, each time after about twice the wait, drawn at random so that many processes do not come back at one moment. What
a store refuses (401, 403, no credentials) is one ValueError, at once. That there is nothing (404) is FileNotFoundError,
of which the caller knows what it means.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

TRIES = 9
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
SAY_EVERY_S = 30.0
LOOK_EVERY_S = 0.1
"""How often one that waits looks whether it is still wanted."""
PASSING = {408, 425, 429}
"""Answers below 500 that say that it may go well the next time."""
FOR_GOOD = {501, 505}
"""Answers from 500 on that say that it never will."""
OF_THIS_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
}
"""Errors of the operating system that no network has."""
NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError",
    "RefreshError", "ClientAuthenticationError", "ProfileNotFound", "UnauthorizedSSOTokenError",
}  # fmt: skip
OF_NETWORKS = {
    "aiohttp", "aiobotocore", "botocore", "boto3", "urllib3", "requests", "http", "httpx", "httpcore", "ssl", "gcsfs",
    "google", "azure", "fsspec", "s3fs",
}  # fmt: skip
"""Packages whose errors that are no OSError are of the network all the same."""


class Refused(ValueError):
    """The store does not let one in."""


class Unreachable(OSError):
    """The store did not answer, however often it was asked."""


_wanted = threading.local()
"""Of a thread, the events that end its wish for what it asks for."""


def wanted_until(ending: threading.Event, do: Callable[..., T]) -> Callable[..., T]:
    """`do`, for which nobody waits any more, and of which nothing more is fetched, once `ending` is set; or, where that
    is asked for within another one, once that one's is."""
    events = (*getattr(_wanted, "events", ()), ending)

    def doing(*args: Any) -> T:
        before = getattr(_wanted, "events", ())
        _wanted.events = events
        try:
            return do(*args)
        finally:
            _wanted.events = before

    return doing


def is_wanted() -> bool:
    return not any(event.is_set() for event in getattr(_wanted, "events", ()))


def check_wanted() -> None:
    if not is_wanted():
        raise Unreachable("nobody waits for it any more")


class Retries:
    """Asks the store at `url` again until it answers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._said_s = float("-inf")

    def call(self, do: Callable[[], T], name: str = "") -> T:
        """What `do` returns. FileNotFoundError, Refused, Unreachable; `name` of the object is for messages."""
        where, started = f"{self.url}/{name}" if name else self.url, monotonic()
        for trial in range(TRIES):
            try:
                return do()
            except FileNotFoundError:
                raise
            except Exception as error:  # every store has its own kinds
                if status_of(error) == 404:
                    raise FileNotFoundError(errno.ENOENT, "no such object", where) from error
                if (refused := _refused(error, where)) is not None:
                    raise refused from error
                if not _passes(error):
                    raise
                if trial == TRIES - 1 or not is_wanted():
                    raise Unreachable(
                        f"{where} could not be reached, tried {trial + 1} times in {monotonic() - started:.0f} s "
                        f"({_said(error)}). Check the connection and run this again: it goes on with what is there."
                    ) from error
                self._say(where, error)
            until = monotonic() + random.uniform(0.5, 1) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**trial)
            while is_wanted() and (left_s := until - monotonic()) > 0:
                sleep(min(left_s, LOOK_EVERY_S))
        raise AssertionError("the last trial returns or raises")

    def _say(self, where: str, error: Exception) -> None:
        if monotonic() - self._said_s >= SAY_EVERY_S:
            self._said_s = monotonic()
            log.warning("%s does not answer as it should (%s); it is asked again", where, _said(error))


def status_of(error: BaseException | None) -> int | None:
    """The answer's HTTP status, wherever a library puts it; None if there is none."""
    if error is None:
        return None
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # of botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for one in (error, response):
        for name in ("status", "status_code", "code"):
            if isinstance(found := getattr(one, name, None), int):
                return found
    return status_of(error.__cause__) if isinstance(error, OSError) else None


def _refused(error: Exception, where: str) -> Refused | None:
    status = status_of(error)
    kinds = {kind.__name__ for one in (error, error.__cause__) if one is not None for kind in type(one).__mro__}
    if isinstance(error, PermissionError) or status in (401, 403) or kinds & NO_CREDENTIALS:
        return Refused(
            f"{where} may not be read or written with the credentials here ({_said(error)}). Give those of an account "
            "that may (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or ask its owner."
        )
    if status is not None and (status < 500 or status in FOR_GOOD) and status not in PASSING:
        return Refused(f"{where} is refused ({status}, {_said(error)}). Check the URL, its region and its settings.")
    return None


def _passes(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in OF_THIS_DISK
    if isinstance(error, TimeoutError | EOFError) or status_of(error) is not None:
        return True
    return type(error).__module__.partition(".")[0] in OF_NETWORKS and not isinstance(error, ValueError)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
