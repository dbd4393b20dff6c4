"""A hub on loopback that takes models, for huggingface_hub's own client: what came, what shall be refused."""

import base64
import json
import re
from typing import Any
from urllib.parse import urlsplit

from tests.support.loopback import COMMIT, Handler, LoopbackServer


class ModelHub(LoopbackServer):
    """Repositories by id, each a mapping of path to bytes."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.requests: list[str] = []
        """Method and path."""
        self.tokens: set[str | None] = set()
        self.validated: list[str] = []
        """Cards that were checked."""
        self.refuses: dict[str, tuple[int, str]] = {}
        """Part of a path -> status and message of the answer."""


class _Handler(Handler):
    hub: ModelHub

    def handle_request(self) -> None:
        """Refuse what shall be refused; else answer as the hub does."""
        body = self._body()
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        for part, (status, message) in self.hub.refuses.items():
            if part in path:
                self._send(status, {"error": message}, message)
                return
        self._route(path, body)

    def _body(self) -> bytes:
        """All of it; a commit comes in chunks, whose number the client does not know before."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/validate-yaml":
            hub.validated.append(json.loads(body)["content"])
            self._send(200, {"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self._send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return
            hub.repositories[name] = {}
            hub.visibility[name] = asked.get("visibility", "public")
            self._send(200, {"url": f"{hub.url}/{name}", "name": name, "id": "1"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self._send(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    value = operation["value"]
                    hub.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.url}/{found[1]}/commit/{COMMIT}"
            self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main|/tree/main)?", path):
            if found[1] not in hub.repositories:
                self._send(404, {"error": "Repository not found"})
                return
            facts = {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": [], "private": True, "tags": []}
            self._send(200, [] if found[2] == "/tree/main" else facts)
        else:
            self._send(404, {"error": f"nothing at {path}"})

    def _send(self, status: int, content: Any, message: str | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        if message is not None:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)
