"""A Hub on the loopback interface: enough of the protocol to create, upload to and download from model repos.

Point a fresh process at it with HF_ENDPOINT; every file travels in the commit itself (no LFS, no Xet).
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FakeHub"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            name = "tester/" + json.loads(body)["name"]
            known = {"url": f"{self.server.url}/{name}", "name": name}
            exists = name in self.server.repos
            self.server.repos.setdefault(name, {})
            self.reply(known | ({"error": "exists"} if exists else {}), 409 if exists else 200)
        elif parts[1] == "validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self.reply({"files": modes})
        else:  # commit
            repo = "/".join(parts[2:4])
            header, *lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                assert line["key"] == "file", line
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.commits.append((repo, header["value"]["summary"]))
            self.reply({"success": True, "commitOid": sha1(body), "commitUrl": f"{self.server.url}/{repo}/commit/0"})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[1] == "whoami-v2":
            return self.reply({"type": "user", "name": "tester", "orgs": [], "auth": {}})
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self.reply({"error": "no such repo"}, 404, X_Error_Code="RepoNotFound")
        sha = sha1(repr(sorted(files.items())).encode())
        if parts[0] != "api":  # <user>/<name>/resolve/<revision>/<path>
            data = files.get("/".join(parts[4:]))
            if data is None:
                return self.reply({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return self.reply(data, ETag=f'"{sha1(data)}"', X_Repo_Commit=sha)
        if "tree" in parts:
            return self.reply([{"type": "file", "path": p, "size": len(d), "oid": sha1(d)} for p, d in files.items()])
        names = [{"rfilename": path} for path in files]
        self.reply({"_id": "0", "id": repo, "sha": sha, "private": False, "tags": [], "siblings": names})

    do_HEAD = do_GET


class FakeHub(ThreadingHTTPServer):
    """`with FakeHub() as hub`: serves hub.url from a thread; hub.repos[id][path] are bytes, hub.commits a log."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.shutdown()
        self.server_close()
