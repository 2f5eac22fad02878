"""A hub of one program on this machine, as far as an upload needs one; it keeps what arrives."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_the_right_token"
#: Writing into its repositories is not allowed.
FORBIDDEN = "others"
#: Bytes of one part of a large file.
PART_BYTES = 3000


class FakeHub(ThreadingHTTPServer):
    """``commits`` are (repository, revision, query, header, file → bytes) in their order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.branches: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.commits: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, bytes]]] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        path = urlsplit(self.path)
        name = unquote(path.path)
        for pattern, answer in (
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/complete/(\w+)", self._complete),
            (r"/verify", lambda _: {}),
        ):
            match = re.fullmatch(pattern, name)
            if match:
                self._send(200, answer(body, *match.groups()))
                return
        self._send(404, {"error": f"no {name}"})

    def do_PUT(self) -> None:
        body = self._body()
        path = urlsplit(self.path)
        oid, part = path.path.rpartition("/")[2], parse_qs(path.query).get("part")
        if part is None:
            self.server.objects[oid] = body
        else:
            self.server.parts[oid, int(part[0])] = body
        self._send(200, {}, etag=f'"{oid}-{part}"')

    def do_GET(self) -> None:
        if not self._refused():
            self._send(404, {"error": "not found"})

    def _refused(self) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.broken:
            self._send(500, {"error": "broken"})
            return True
        if self.headers.get("authorization") != f"Bearer {TOKEN}" and self.path[:4] == "/api":
            self._send(401, {"error": "Invalid credentials"})
            return True
        return False

    def _validate(self, body: bytes) -> dict[str, Any]:
        """The front matter of a card, which the hub refuses where its keys are not as it wants."""
        content = json.loads(body)["content"]
        fields = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [
            f'"{name}" must be a list of texts'
            for name in ("tags", "base_model")
            if not all(isinstance(each, str) for each in fields.get(name, []))
        ]
        answer = {"errors": [{"message": each} for each in errors], "warnings": []}
        return {**answer, "status": 400} if errors else answer

    def _create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        if asked["organization"] == FORBIDDEN:
            return {"status": 403}
        self.server.created.append(asked)
        return {"url": f"{self.server.url}/{asked['organization']}/{asked['name']}"}

    def _branch(self, body: bytes, repo: str, branch: str) -> dict[str, Any]:
        self.server.branches.append((repo, branch))
        return {}

    def _preupload(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        files = json.loads(body)["files"]
        return {
            "files": [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
        }

    def _batch(self, body: bytes, repo: str) -> dict[str, Any]:
        objects = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            upload: dict[str, Any] = {"href": f"{self.server.url}/put/{oid}"}
            if size > PART_BYTES:
                count = -(-size // PART_BYTES)
                parts = {
                    f"{n:05d}": f"{self.server.url}/put/{oid}?part={n}" for n in range(1, count + 1)
                }
                upload = {
                    "href": f"{self.server.url}/complete/{oid}",
                    "header": {"chunk_size": str(PART_BYTES), **parts},
                }
            verify = {"href": f"{self.server.url}/verify"}
            actions = {"upload": upload, "verify": verify}
            objects.append({"oid": oid, "size": size, "actions": actions})
        return {"objects": objects}

    def _complete(self, body: bytes, oid: str) -> dict[str, Any]:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.server.objects[oid] = b"".join(self.server.parts[oid, n] for n in sorted(numbers))
        return {}

    def _commit(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        header: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        query = parse_qs(urlsplit(self.path).query)
        self.server.commits.append((repo, revision, query, header, files))
        number = len(self.server.commits)
        found = {"commitUrl": f"{self.server.url}/{repo}/commit/{number}", "commitOid": str(number)}
        if "create_pr" in query:
            found["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
        return found

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, status: int, content: dict[str, Any], **headers: str) -> None:
        status = content.pop("status", status)
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
