"""A hub on the loopback: the HTTP that `huggingface_hub` and `datasets` speak, with commits, gates and breaking lines.

`HF_ENDPOINT` points a process at it. It answers as the public hub does, error codes and headers included.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SOURCES = Path(__file__).parents[1] / "src"
FOREVER = 10**9


@dataclass
class Repository:
    """Files of every commit, and the names of some.

    Attributes:
        access: `open`, `gated` (its page is public, its files are not) or `private` (as if it were not there).
        conversion: number of the pull request in which a bot put safetensors weights.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    access: str = "open"
    conversion: int | None = None

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


class Hub:
    """Repositories, what was asked for, and which files break in the middle.

    Attributes:
        log: method and path of each request.
        breaks: how many more times a file of this name is cut off after half of its bytes; `GET /mend` ends it.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.log: list[str] = []
        self.breaks: dict[str, int] = {}
        self.url = ""

    def commit(
        self,
        name: str,
        files: Path | Mapping[str, bytes],
        *,
        kind: str = "models",
        branch: str = "main",
        tag: str | None = None,
        **options: Any,
    ) -> str:
        """Put these files, and no others, into a new commit; its 40 digits."""
        if isinstance(files, Path):
            files = {f.relative_to(files).as_posix(): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository())
        digest = hashlib.sha1(f"{kind} {name} {len(repository.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        repository.commits[sha := digest.hexdigest()] = dict(files)
        repository.branches[branch] = sha
        if tag is not None:
            repository.tags[tag] = sha
        for option, value in options.items():
            setattr(repository, option, value)
        return sha

    def asked(self, *words: str) -> list[str]:
        """The requests that hold all of these words."""
        return [line for line in self.log if all(word in line for word in words)]


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler] | None = None) -> Iterator[Hub]:
    """A running hub, in threads of this process; one that is read only, unless another handler answers."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler or Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(home: Path, **changes: str) -> dict[str, str]:
    """Of a fresh machine: an empty cache, a network, and nobody logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
    path = os.pathsep.join([str(SOURCES), str(Path(__file__).parent)])
    return {**kept, "HF_HOME": str(home), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def python(script: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own: the libraries read their environment as they are imported."""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        self.hub.log.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts == ["mend"]:
            self.hub.breaks.clear()
            return self._json({})
        is_api = parts[0] == "api"
        parts = parts[is_api:]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get((kind, name))
        allowed = "Bearer" in self.headers.get("Authorization", "")
        if len(parts) < 2:
            self._error(404, "EntryNotFound", "no such page")
        elif repository is None or (repository.access == "private" and not allowed):
            # who is not logged in is not told whether it exists
            self._error(404 if allowed else 401, "RepoNotFound", "Repository not found")
        elif is_api:
            self._api(kind, name, repository, rest, parse_qs(url.query), body)
        elif repository.access == "gated":
            self._error(403 if allowed else 401, "GatedRepo", f"Access to {name} is restricted.")
        elif rest[:1] == ["resolve"]:
            self._file(repository, rest[1], "/".join(rest[2:]))
        else:
            self._error(404, "EntryNotFound", "no such page")
        return None

    def _api(self, kind: str, name: str, repository: Repository, rest: list[str], query: Any, body: bytes) -> None:
        what, *rest = rest or ["revision", "main"]
        if what == "refs":
            branches, tags = (
                [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha} for name, sha in refs.items()]
                for where, refs in (("heads", repository.branches), ("tags", repository.tags))
            )
            return self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})
        if what == "discussions":
            return self._json(_discussions(name, repository.conversion))
        # a revision with slashes comes quoted, and so is one part
        sha = repository.resolve(rest[0] if rest else "main")
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        files, path = repository.commits[sha], "/".join(rest[1:])
        entries = [_entry(one, files[one]) for one in sorted(files)]
        if what == "revision":
            siblings = [{**e, "rfilename": e["path"], "blobId": e["oid"]} for e in entries]
            gated = "manual" if repository.access == "gated" else False
            about = {"id": name, "sha": sha, "gated": gated, "private": repository.access == "private"}
            return self._json({**about, "disabled": False, "tags": [], "siblings": siblings})
        if what == "tree":
            inside = [e for e in entries if not path or e["path"].startswith(f"{path}/")]
            if path and not inside:
                return self._error(404, "EntryNotFound", f"{path} does not exist")
            if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                depth = path.count("/") + 1 if path else 0
                cut = {"/".join(e["path"].split("/")[: depth + 1]): e for e in inside}
                inside = [
                    e if e["path"] == at else {"type": "directory", "path": at, "oid": "0", "size": 0}
                    for at, e in cut.items()
                ]
            return self._json(inside)
        if what == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            return self._json([e for e in entries if e["path"] in wanted])
        return self._error(404, "EntryNotFound", "no such page")

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        sha = repository.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[sha].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        head = {"X-Repo-Commit": sha, "ETag": f'"{_entry(path, content)["oid"]}"', "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors"):
            head |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        start, end, asked = 0, len(content) - 1, self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start, end = int(first), int(last or end)
            head["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        part = content[start : end + 1]
        if self.command == "GET" and self.hub.breaks.get(path, 0) > 0:
            self.hub.breaks[path] -= 1
            self._head(206 if asked else 200, {**head, "Content-Length": str(len(part))})
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self._send(206 if asked else 200, part, head)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, head: Mapping[str, str] | None = None) -> None:
        head = {**(head or {}), "X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(status, json.dumps({"error": message}).encode(), head)

    def _send(self, status: int, body: bytes, head: Mapping[str, str]) -> None:
        self._head(status, {**head, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, head: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """What the tree says of a file; weights are kept by the sha256 of their content, as in Git LFS."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
    return found


def _discussions(name: str, conversion: int | None) -> dict[str, Any]:
    if conversion is None:
        return {"discussions": [], "count": 0, "start": 0}
    one = {
        "num": conversion,
        "title": "Adding `safetensors` variant of this model",
        "author": {"name": "SFconvertbot"},
        "repo": {"name": name, "type": "model"},
        "status": "open",
        "isPullRequest": True,
        "createdAt": "2024-01-01T00:00:00.000Z",
    }
    return {"discussions": [one], "count": 1, "start": 0}


# Runs commands one after the other and notes how each ended; `noted` is printed as the last line.
PRELUDE = """
import contextlib, glob, io, json, logging, os, traceback, urllib.request
from lit_dpo import AdapterReference, CachedReference, ModelReference, LoRAPolicy
from lit_dpo.cli import main
from lit_dpo.data.sources import load_rows
from lit_dpo.errors import LitDPOError

noted, FIT = {}, "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.num_sanity_val_steps 0"
FIT += " --trainer.callbacks+=training.Unestimated"

def check(name, policy, reference=None):
    \"\"\"What `fit` does before it loads weights.\"\"\"
    try:
        policy.check()
        if reference is not None:
            reference.check(policy)
        noted[name] = None
    except LitDPOError as error:
        noted[name] = str(error)

def pairs(source):
    try:
        noted[source] = load_rows(source, ["prompt", "chosen", "rejected"])[0].rows[0]["chosen"]
    except LitDPOError as error:
        noted[source] = str(error)

def command(name, line, more=FIT):
    output = io.StringIO()
    for logger in None, "lightning.pytorch", "lightning.fabric":
        for handler in logging.getLogger(logger).handlers:
            handler.setStream(output)
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            main([*line.split(), *more.split()])
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception:
            code = "traceback"
            traceback.print_exc()
    text = output.getvalue()
    errors = [one for one in text.splitlines() if one.startswith("lit-dpo: error: ")]
    noted[name] = {"code": code, "error": text[text.find(errors[0]) :].strip() if errors else "", "text": text}
"""


def walk(script: str, cwd: Path, env: dict[str, str]) -> dict:
    done = python(f"{PRELUDE}{script}\nprint()\nprint(json.dumps(noted))", cwd, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
