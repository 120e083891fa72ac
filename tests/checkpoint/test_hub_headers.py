"""`inspect HUB/ID` fetches config and headers, not weights: against a server that counts what it gives."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from damage import edit_json

from qectomy.checkpoint.headers import SINGLE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as is asked of it: the list of a repository's files, and their bytes, in ranges too."""

    protocol_version = "HTTP/1.1"
    folder: Path
    given: dict[str, int]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        names = sorted(file.name for file in self.folder.iterdir() if file.is_file())
        if path.startswith("api/models/me/model/tree/"):
            return self._send(200, json.dumps([self._entry(name) for name in names]).encode())
        if path.startswith("api/models/me/model"):
            siblings = [{"rfilename": name} for name in names]
            return self._send(200, json.dumps({"id": "me/model", "sha": COMMIT, "siblings": siblings}).encode())
        _, _, name = path.partition("me/model/resolve/main/")
        if name not in names:
            _, _, name = path.partition(f"me/model/resolve/{COMMIT}/")
        if name not in names:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = (self.folder / name).read_bytes()
        wanted = self.headers.get("range")
        if wanted is None:
            return self._send(200, data, name=name)
        start, _, stop = wanted.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(stop) + 1 if stop else None]
        place = {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"}
        return self._send(206, part, place, name=name)

    def _entry(self, name):
        return {"type": "file", "path": name, "oid": "0" * 40, "size": (self.folder / name).stat().st_size}

    def _send(self, status, data, headers=None, name=""):
        self.send_response(status)
        for field, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{name or "api"}"', **(headers or {})}.items():
            self.send_header(field, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.given[name] = self.given.get(name, 0) + len(data)
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def inspect(tmp_path):
    """Return a function (folder) -> what `inspect me/model` ends with, and how many bytes of each file were given."""

    def run(folder):
        given: dict[str, int] = {}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": folder, "given": given}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            there = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
            there |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
            command = [sys.executable, "-m", "qectomy", "inspect", "me/model", "--json"]
            where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **there}
            done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        finally:
            server.shutdown()
            server.server_close()
        return done, given

    return run


def locally(folder):
    command = [sys.executable, "-m", "qectomy", "inspect", str(folder), "--json", "--no-probe"]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return json.loads(subprocess.run(command, env=where, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", ["llama", "gpt2-sharded"])
def test_headers_alone_give_the_table(name, tiny_copy, inspect):
    folder = tiny_copy(name)
    done, given = inspect(folder)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), locally(folder)
    for field in ("family", "dtype", "files", "dimensions", "parameters", "bytes", "query_maps", "layers"):
        assert found[field] == expected[field], field
    assert "config and headers were fetched, no weights" in done.stderr
    assert not [file for file in given if file.startswith(("tokenizer", "generation"))]


def test_no_more_than_a_header_is_fetched(tiny_copy, inspect):
    folder = tiny_copy("llama", vocab_size=20_000)
    done, given = inspect(folder)
    assert done.returncode == 0, done.stderr
    assert (folder / SINGLE).stat().st_size > 5_000_000
    assert given[SINGLE] <= 100_001


def test_a_model_that_is_not_supported_is_refused_by_its_config(tiny_copy, inspect):
    folder = tiny_copy()
    edit_json(folder / "config.json", lambda config: config.update(model_type="other"))
    done, given = inspect(folder)
    assert done.returncode == 1
    assert "model_type 'other' is not supported" in done.stderr
    assert SINGLE not in given
