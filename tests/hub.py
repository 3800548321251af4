"""The little of the Hugging Face hub that a push and a load need, on a free port of this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """`files`: content by path. `private`: as the repository was made, None before. `tokens`: those that were sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Do what the lines of a commit say."""
        for line in lines:
            path = line["value"].get("path", "")
            if line["key"] == "file":
                self.files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.files[path]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/repos/create"):
            asked = json.loads(body)
            self.server.private = asked.get("private", asked.get("visibility") == "private")
            self._json({"url": f"{self.server.url}/{asked.get('organization', '')}/{asked['name']}"})
        elif self.path.startswith("/api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            found = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False} for file in found]})
        else:
            self.server.commit([json.loads(line) for line in body.splitlines() if line.strip()])
            self._json(
                {"commitUrl": f"{self.server.url}/me/mine/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            self._file(path.split("/resolve/", 1)[1].partition("/")[2])
        elif "/tree/" in path:
            entries = self.server.files.items()
            self._json([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in entries])
        else:
            self._json(
                {"id": "me/mine", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}
            )

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        content = self.server.files.get(name)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub with one empty repository."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
