"""Places that are URLs: of object stores, web servers, whatever fsspec knows (s3://bucket/acts, memory://acts).

A command line may have made a path of one, which takes a slash away (s3:/bucket/acts); it is put back.
"""

from __future__ import annotations

import re
from pathlib import Path

from apportion.trust import expanded, resolved

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
OF_A_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)")
PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
OF_THIS_MACHINE = ("file", "local")


def url_of(path: str | Path) -> str | None:
    """The URL that this is; None for a path."""
    if isinstance(path, str):
        return path.rstrip("/") if URL.match(path) else None
    if (found := OF_A_PATH.fullmatch(str(path))) is None:
        return None
    return f"{found[1]}://{'/' if found[1] in OF_THIS_MACHINE else ''}{found[2]}"


def is_there(path: str | Path) -> bool:
    """Whether something lies at a path; at a URL that shows when it is opened."""
    return url_of(path) is not None or expanded(path).exists()


def in_full(path: str | Path) -> str:
    """Where it lies, as it can be found from everywhere: a URL without a password, a path without ~ and links."""
    url = url_of(path)
    return str(resolved(path)) if url is None else PASSWORD.sub(r"\1@", url)
