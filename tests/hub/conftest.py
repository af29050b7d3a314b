"""A local server with the HTTP interface of the Hub and model repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

from dalle_zoo import DallePipeline
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.tokenizers import ByteTokenizer

TOKEN = "hf_owner"
NEW_SPACE = (
    b"---\ntitle: Page\nsdk: gradio\napp_file: app.py\n---\n\n"
    b"Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference\n"
)
"""Card that the Hub writes for a new Space."""
ERRORS = {401: "RepoNotFound", 404: "EntryNotFound", 409: "", 412: "", 400: ""}


class Repository:
    """Commits by name, and the branches that point to them."""

    def __init__(self, private: bool) -> None:
        self.private, self.gated = private, False
        self.commits: dict[str, dict[str, str]] = {}  # path to the sha256 of a blob
        self.branches: dict[str, str] = {}

    def commit(self, files: dict[str, str], branch: str) -> str:
        sha = hashlib.sha1(json.dumps([files, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class LocalHub(ThreadingHTTPServer):
    """The server. Tests can inspect and damage its contents."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []  # large files that arrived, by digest
        self.stall_after: int | None = None  # after this number of large files, the next waits
        self.stalled, self.released = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def add(self, name: str, files: dict[str, bytes]) -> None:
        """A public repository with one commit."""
        repository = self.repositories[name] = Repository(private=False)
        repository.commit({path: self.store(content) for path, content in files.items()}, "main")

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        listed = repository.commits[repository.branches.get(revision, revision)]
        return {path: self.blobs[digest] for path, digest in listed.items()}


def card_errors(content: str) -> Iterator[dict[str, str]]:
    """Returns the known errors of the Hub for a card's metadata."""
    metadata = yaml.safe_load(content.split("---")[1])
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", metadata["license"]):
        yield {"message": f"license {metadata['license']!r} is none of the list"}
    if metadata["license"] == "other" and not metadata.get("license_name"):
        yield {"message": "license_name is missing"}


class Handler(BaseHTTPRequestHandler):
    """One request; a reply is JSON unless it is a file."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str = "") -> None:
        self.reply(status, {"error": code or ERRORS[status]}, X_Error_Code=code or ERRORS[status])

    def read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, body = self.server, self.read()
        hub.requests.append((self.command, path))
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": list(card_errors(json.loads(body)["content"])), "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body)) if owner else self.fail(401)
        if match := re.fullmatch(r"/storage/(\w+)", path):
            return self.upload(match[1], body)
        match = re.match(r"/(?:api/models/|api/(?=spaces/))?((?:spaces/)?[\w.-]+/[\w.-]+?)(?:\.git)?(?=/|$)", path)
        if not match or match[1] not in hub.repositories:
            return self.fail(404, "RepoNotFound")
        name, rest = match[1], path[match.end() :]
        repository = hub.repositories[name]
        if not owner and repository.gated:
            return self.fail(403, "GatedRepo")
        if not owner and (repository.private or self.command == "POST"):
            return self.fail(401)
        if self.command == "POST":
            return self.write(name, repository, rest, body)
        return self.look(name, repository, rest)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if asked.get("type") == "space":
            assert asked["sdk"] == "gradio"
            name = f"spaces/{name}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return self.reply(409, url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = repository = Repository(bool(private))
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if name.startswith("spaces/"):
            files["README.md"] = NEW_SPACE
        repository.commit({path: self.server.store(content) for path, content in files.items()}, "main")
        return self.reply(200, url)

    def upload(self, digest: str, body: bytes) -> None:
        hub = self.server
        if self.command == "PUT":
            if hub.stall_after is not None and len(hub.uploads) >= hub.stall_after:
                hub.stalled.set()
                hub.released.wait()
                return self.fail(400)
            assert hub.store(body) == digest
            hub.uploads.append(digest)
        return self.reply(200)

    def write(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        hub = self.server
        if rest == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for entry in objects:
                if entry["oid"] not in hub.blobs:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/storage/{entry['oid']}", "header": {}}}
            return self.reply(200, {"objects": objects, "transfer": "basic"})
        action, branch = rest.strip("/").split("/", 1)
        if action == "branch":
            repository.branches.setdefault(branch, repository.branches["main"])
            return self.reply(200)
        if branch not in repository.branches:
            return self.fail(404, "RevisionNotFound")
        head = repository.commits[repository.branches[branch]]
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": self.oid(file["path"], head),
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        assert action == "commit"
        files = dict(head)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if (
                line["key"] == "header"
                and value.get("parentCommit", repository.branches[branch]) != repository.branches[branch]
            ):
                return self.fail(412)
            if line["key"] == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self.fail(400)
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, branch)
        return self.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def oid(self, path: str, files: dict[str, str]) -> str | None:
        """Returns the git id of a file: its digest if it is large, else that of its blob."""
        if path not in files or path.endswith(".safetensors"):
            return files.get(path)
        content = self.server.blobs[files[path]]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def look(self, name: str, repository: Repository, rest: str) -> None:
        action, _, rest = rest.strip("/").partition("/")
        revision, _, path = rest.partition("/")
        revision = revision or "main"
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self.fail(404, "RevisionNotFound")
        files = repository.commits[sha]
        if action in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}
            return self.reply(200, info)
        if action == "tree":
            return self.reply(200, [self.entry(file, digest, files) for file, digest in files.items()])
        if path not in files:
            return self.fail(404)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{self.oid(path, files)}"'}
        return self.reply(200, self.server.blobs[files[path]], **headers)

    def entry(self, path: str, digest: str, files: dict[str, str]) -> dict[str, Any]:
        size = len(self.server.blobs[digest])
        large = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if path.endswith(".safetensors") else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid(path, files), **large}


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A running server to which the client of this process connects, with an empty cache and no stored token."""
    from huggingface_hub import constants

    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model_folder(random_prior: Callable[..., Prior], tmp_path: Path) -> Path:
    """A small complete model with a record, its prior in shards."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=12, width=4, num_groups=3, decoder_stem=4, codebook_size=7))
    pipe = DallePipeline(dvae, random_prior(text_vocab=256, text_length=6), ByteTokenizer())
    record = {"description": "A toy.", "license": "Apache-2.0", "data": "Six images."}
    return pipe.save_pretrained(tmp_path / "toy", record=record, shard_bytes=8192)


@pytest.fixture
def on_the_hub(local_hub: LocalHub, model_folder: Path) -> str:
    """Name of a repository that holds the toy model."""
    files = {p.relative_to(model_folder).as_posix(): p.read_bytes() for p in model_folder.rglob("*") if p.is_file()}
    local_hub.add("org/toy", files)
    return "org/toy"
