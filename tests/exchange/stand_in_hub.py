"""A server on this computer that does what huggingface_hub asks the hub for: repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """The repositories: {name: {file: content}}, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.refuses = False
        self.url = ""

    def commit(self, name: str) -> str:
        content = b"".join(path.encode() + data for path, data in sorted(self.files[name].items()))
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, values: object, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.refuses:
            self._send(401, b"no", X_Error_Message="Invalid username or password.")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.files.setdefault(name, {})
            self.hub.private.setdefault(
                name, bool(asked.get("private")) or asked.get("visibility") == "private"
            )
            self._json({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **regular} for file in json.loads(body)["files"]]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.files[match[1]][entry["value"]["path"]] = content
            commit = self.hub.commit(match[1])
            self._json({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{commit}", "commitOid": commit})
        else:
            self._send(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if (match := re.fullmatch(r"/api/models/(.+?)(/revision/\w+)?", path)) and match[1] in self.hub.files:
            names = [{"rfilename": name} for name in self.hub.files[match[1]]]
            self._json({"id": match[1], "sha": self.hub.commit(match[1]), "siblings": names})
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/\w+", path):
            files = self.hub.files[match[1]]
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        elif (match := re.fullmatch(r"/(.+?)/resolve/\w+/(.+)", path)) and match[2] in self.hub.files.get(
            match[1], {}
        ):
            content = self.hub.files[match[1]][match[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, ETag=etag, X_Repo_Commit=self.hub.commit(match[1]))
        else:
            known = path.split("/resolve/")[0].strip("/") in self.hub.files
            self._send(404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub for the length of a block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
