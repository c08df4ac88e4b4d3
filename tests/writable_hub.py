"""The loopback hub, written to: repositories are made, and folders come as commits."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import unquote, urlsplit

from hub import Handler

WRITERS = {"hf_acme": "acme"}
"""Tokens, and the organisation that each may write to."""


class WritableHandler(Handler):
    """Takes regular files alone, whatever their size: the hub would ask for weights by Git LFS or Xet."""

    def _answer(self, body: bytes) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["api", "validate-yaml"]:
            self.hub.log.append(f"{self.command} {self.path}")
            return self._validate(json.loads(body)["content"])
        writes = parts == ["api", "repos", "create"] or (len(parts) > 4 and parts[4] in ("preupload", "commit"))
        if self.command != "POST" or not writes:
            return super()._answer(body)
        self.hub.log.append(f"{self.command} {self.path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in WRITERS:
            return self._error(401, "", "Invalid username or password.")
        if parts[2] == "create":
            return self._create(json.loads(body), WRITERS[token])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        return self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any], organisation: str) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != organisation:
            return self._error(403, "", f"You don't have the rights to create a model under {asked['organization']}")
        if ("models", name) in self.hub.repositories:
            return self._error(409, "", "You already created this model repo")
        access = "private" if asked.get("visibility") == "private" or asked.get("private") else "open"
        self.hub.commit(name, {".gitattributes": b""}, access=access)
        return self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[("models", name)]
        files = dict(repository.commits[repository.branches["main"]])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = self.hub.commit(name, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _validate(self, content: str) -> None:
        front = content.split("---\n")[1] if content.startswith("---\n") else ""
        errors = [] if "tags:" in front else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []})
