"""A hub on loopback that serves datasets from memory and fails on demand, for the real client libraries.

It answers what huggingface_hub and datasets ask of the hub: a dataset's facts, its tree, facts of paths, files by
ranges. Every request is written down. Faults are planned for paths that match, and used up one by one.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback import COMMIT, Handler, LoopbackServer


@dataclass
class Request:
    """One request that came."""

    method: str
    path: str
    begin: int | None = None
    """Range asked for, in bytes; None without one."""
    end: int | None = None
    sent_bytes: int = 0


@dataclass
class Fault:
    """What happens to the next requests of a path: 4xx or 5xx, "reset", "silent", "cut" (half of the body
    that was announced) or "short" (half of a range, announced as such).
    """

    path: str
    kind: int | str
    count: int = 1
    again: bool = False
    """Whether it comes back as often after each request that it let pass."""
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = 0


class HubStandIn(LoopbackServer):
    """Datasets by id, each a mapping of path to bytes; what was asked; what shall fail."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []

    def fault_for(self, path: str) -> Fault | None:
        """The next fault planned for a path, used up."""
        for fault in self.faults:
            if re.search(fault.path, path):
                fault.seen += 1
                if fault.again:
                    fault.seen %= fault.count + 1
                if 0 < fault.seen <= fault.count:
                    return fault
        return None

    def data_requests(self, file: str) -> list[Request]:
        """The ranged requests for a file whose path ends so."""
        return [request for request in self.requests if request.path.endswith(file) and request.begin is not None]


class _Handler(Handler):
    hub: HubStandIn

    def handle_request(self) -> None:
        """Write the request down; answer it, or fail as planned."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.request_.begin, self.request_.end = int(asked[1]), int(asked[2]) + 1 if asked[2] else None
        self.hub.requests.append(self.request_)
        self.fault = self.hub.fault_for(path)
        if self.fault and self.fault.kind == "silent":
            self.hub.closing.wait()
            self.close_connection = True
        elif self.fault and self.fault.kind == "reset":
            self.close_connection = True
        elif self.fault and isinstance(self.fault.kind, int):
            self._send(self.fault.kind, b'{"error": "planned"}', self.fault.headers)
        else:
            self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(.*))?", path):
            name, what, revision, rest = found.groups()
            if self._may_see(name, revision):
                self._answer_facts(name, what, rest.strip("/") if rest else "", body)
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            if self._may_see(name, revision, gate=True):
                self._answer_file(self.hub.datasets[name].get(file))
        else:
            self._send(404, b"")

    def _may_see(self, name: str, revision: str | None, gate: bool = False) -> bool:
        if name not in self.hub.datasets:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif gate and name in self.hub.gated:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted"})
        elif revision not in (None, "main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _answer_facts(self, name: str, what: str | None, rest: str, body: bytes) -> None:
        files = self.hub.datasets[name]
        if what in (None, "revision"):
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif what == "tree":
            inside = {path: content for path, content in files.items() if not rest or path.startswith(rest + "/")}
            folders = {path.rpartition("/")[0] for path in inside} - {"", rest}
            found = [{"type": "directory", "path": path, "oid": _oid(path.encode())} for path in sorted(folders)]
            self._send_json(found + [_entry(path, content) for path, content in inside.items()])
        else:
            paths = parse_qs(body.decode())["paths"]
            self._send_json([_entry(path, files[path]) for path in paths if path in files])

    def _answer_file(self, content: bytes | None) -> None:
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin, end = self.request_.begin, self.request_.end
        if begin is None:
            self._send(200, content, headers)
            return
        part = content[begin:end]
        if self.fault and self.fault.kind == "short":
            part = part[: len(part) // 2]
        headers["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        self._send(206, part, headers)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.kind == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.request_.sent_bytes = len(content)
        self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
