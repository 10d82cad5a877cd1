"""A stand-in for the Hugging Face Hub: a server on this machine that speaks what huggingface_hub needs.

Listings, files and commits are real requests and answers. Simulated is that every file is small: uploads go into the
commit itself (not into large-file storage), and downloads come from the server itself (not from a CDN).
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refused: tuple[int, str] | None = None
    """Status and error code that every request is answered with."""
    private: bool = False
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """`repos` can be changed at any time; `asked` lists requests, without what is after the question mark."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.cut: int | None = None
        """Bytes of a file after which the connection breaks."""
        hub = self

        class Handler(_Handler):
            def __init__(self, *args) -> None:
                self.hub = hub
                super().__init__(*args)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files_fetched(self) -> set[str]:
        gets = [line.split("/resolve/") for line in self.asked if line.startswith("GET") and "/resolve/" in line]
        return {after.split("/", 1)[1] for _, after in gets}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_request()

    def do_GET(self) -> None:
        self._answer_request()

    def do_POST(self) -> None:
        self._answer_request()

    def _answer_request(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+))?", path)
        resolved = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        name = (found or resolved or [None, ""])[1]
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._error(404, "RepoNotFound")
        if repo.refused:
            return self._error(*repo.refused)
        revision = resolved[2] if resolved else (found[3] or "main")
        if revision not in (*repo.revisions, repo.sha):
            return self._error(404, "RevisionNotFound")
        if resolved:
            return self._file(repo, resolved[3])
        what = {None: self._info, "revision": self._info, "tree": self._tree, "preupload": self._preupload}
        return what.get(found[2], self._commit)(name, repo)

    def _info(self, name: str, repo: Repo) -> None:
        siblings = [{"rfilename": file} for file in repo.files]
        self._json({"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def _tree(self, _: str, repo: Repo) -> None:
        files = repo.files.items()
        self._json([{"type": "file", "path": f, "size": len(c), "oid": sha1(c).hexdigest()} for f, c in files])

    def _file(self, repo: Repo, file: str) -> None:
        if file not in repo.files:
            return self._error(404, "EntryNotFound")
        content = repo.files[file]
        self.send_response(200)
        headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": repo.sha, "Content-Length": len(content)}
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: self.hub.cut])
            self.close_connection = self.hub.cut is not None
        return None

    def _create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repo = self.hub.repos.setdefault(name, Repo({}, private=private))
        if repo.refused:
            return self._error(*repo.refused)
        return self._json({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def _preupload(self, _: str, __: Repo) -> None:
        files = json.loads(self.body)["files"]
        self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def _commit(self, name: str, repo: Repo) -> None:
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                repo.commits.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                repo.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = repo.sha
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for header, value in sent.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
