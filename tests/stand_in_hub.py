"""A stand-in for the Hugging Face hub: as much of its HTTP API as pushing a folder
and reading it back take, in memory.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_nobody"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Its repositories: by name whether they are private, and their files."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.address = ""


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """A `Hub` that listens on this machine alone."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing is said."""

    def answer(self, value: Any, code: int = 200, **headers: str) -> None:
        """Send JSON, or bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        """To make a repository, to ask how files go there, and to put them there."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401, X_Error_Message="who are you?")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.hub.files.setdefault(repo, {})
            return self.answer({"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "deletedFile":
                del self.hub.files[repo][operation["value"]["path"]]
            if operation["key"] == "file":
                value = operation["value"]
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
        return self.answer({"commitUrl": f"{self.hub.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        """The files of a repository."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.hub.files.get(repo)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if parts[0] != "api":
            content = files["/".join(parts[4:])]
            return self.answer(content, ETag=f'"{abs(hash(content))}"')
        if "tree" in parts:
            return self.answer([{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files.items()])
        return self.answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_GET
