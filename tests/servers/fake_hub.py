"""A local hub that takes uploads: the few calls of the Hugging Face hub's API that `push` makes.

The client is the real `huggingface_hub`, which checks our answers.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeHub:
    """Repositories in memory; small files come in the commit, large ones by the LFS protocol.

    With ``xet``, a folder, large files come by xet instead: its client, hf_xet, has a store of its
    own for folders, and only their sha256 is kept here.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.refuses = False
        self.fails: dict[str, int | None] = {}  # status by a part of the path; None hangs up
        self.large = 100_000  # bytes of a file that does not come in the commit
        self.xet: Path | None = None
        self.page = False  # answers what it does not know with a page, as some hubs in companies do
        self.asked_for_xet = 0
        self.objects: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> Any:
        """The JSON answer to a POST."""
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                f"{asked['organization']}/{asked['name']}"
                if asked.get("organization")
                else asked["name"]
            )
            self.repositories.setdefault(name, {})
            self.private.setdefault(name, asked.get("visibility") == "private")
            return {"url": f"{self.url}/{name}", "id": name}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["size"] > self.large else "regular",
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
            }
        if path.endswith("/info/lfs/objects/batch") and self.xet is not None:
            return None
        if path.endswith("/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    {
                        **o,
                        "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}", "header": {}}},
                    }
                    for o in json.loads(body)["objects"]
                ],
            }
        if path.endswith("/commit/main"):
            name = "/".join(path.split("/")[3:5])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.repositories[name][value["path"]] = (
                        self.objects[value["oid"]] if self.xet is None else value["oid"].encode()
                    )
            return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "success": True}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        return None


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if token := self.headers.get("authorization"):
                hub.tokens.add(token)
            if self._fails():
                return
            found = hub.answer(self.path, body)
            status = 403 if hub.refuses else 200 if found is not None else 404
            self._send(status, json.dumps({"error": "no"} if status != 200 else found).encode())

        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5])
            if "/xet-write-token/" in self.path:
                hub.asked_for_xet += 1
                if self._fails():
                    return
                token = {"casUrl": f"local://{hub.xet}", "exp": int(time.time()) + 3600}
                if hub.xet is not None:
                    self._send(200, json.dumps(token | {"accessToken": "t"}).encode())
                else:
                    self._send(200 if hub.page else 404, b"<html>" if hub.page else b"{}")
            elif name in hub.repositories:
                found = {"id": name, "sha": "0", "siblings": [], "private": hub.private[name]}
                self._send(200, json.dumps(found).encode())
            else:
                self._send(404, b"{}")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hub.objects[self.path.rpartition("/")[2]] = body
            self._send(200, b"")

        def _fails(self) -> bool:
            status = next((s for part, s in hub.fails.items() if part in self.path), 0)
            if status is None:
                self.close_connection = True
            elif status:
                self._send(status, b'{"error": "no"}')
            return status != 0

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler
