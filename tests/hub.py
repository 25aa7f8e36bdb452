"""A hub of the tests' own, on 127.0.0.1: as much of the real one's protocol as reading a data set asks for."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    """Facts about a data set, its tree, and its files, whole or in ranges; 404 for all else."""

    protocol_version = "HTTP/1.1"
    datasets: Mapping[str, Mapping[str, bytes]]  # set by `hub`
    asked: list[str]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        for name, files in self.datasets.items():
            if url.path.startswith(f"/api/datasets/{name}"):
                return self._facts(name, files, url.path.removeprefix(f"/api/datasets/{name}"), parse_qs(url.query))
            if url.path.startswith(f"/datasets/{name}/resolve/"):
                path = url.path.removeprefix(f"/datasets/{name}/resolve/").split("/", 1)[1]
                return self._file(files[path]) if path in files else self._missing("EntryNotFound")
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass

    def _facts(self, name: str, files: Mapping[str, bytes], path: str, query: dict) -> None:
        if path.startswith("/tree/"):
            _, _, _, *folder = path.split("/", 3)
            inside = "".join(f"{part}/" for part in folder)
            found = _tree(files, inside, query.get("recursive", ["false"])[0].lower() == "true")
            return self._json(found) if found else self._missing("EntryNotFound")
        siblings = [{"rfilename": file} for file in files]
        about = dict(id=name, sha=COMMIT, private=False, gated=False, disabled=False, tags=[], siblings=siblings)
        return self._json(about)

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._answer(206, data[start : end + 1], headers)
        return self._answer(200, data, headers)

    def _json(self, value) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Mapping[str, bytes], inside: str, recursive: bool) -> list[dict]:
    """Files below a folder, and, where it is not recursive, the folders that lie directly in it."""
    found = {}
    for path, data in files.items():
        if path.startswith(inside):
            first, *deeper = path.removeprefix(inside).split("/")
            if deeper and not recursive:
                found[inside + first] = {"type": "directory", "path": inside + first, "size": 0, "oid": "1" * 40}
            else:
                found[path] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return list(found.values())


@contextmanager
def hub(datasets: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serves data sets, each a mapping of paths to contents; gives its address, and what it has been asked so far."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"datasets": datasets, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
