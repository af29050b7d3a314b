"""Shards behind a local HTTP server that fails, changes and forgets."""

from __future__ import annotations

import http.server
import itertools
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.data import ImageTextDataset, ResumableLoader, Sample, Skipped, filter_source, open_source, remote
from dalle_zoo.data.filters import Filters


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder by ranges, and fails as a test says."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.failures: Iterator[str] = itertools.repeat("")
        """How each request of contents fails: "500", "cut", "403", or "" for not at all."""
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(contents=False)

    def do_GET(self) -> None:
        self.answer(contents=True)

    def answer(self, *, contents: bool) -> None:
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        failure = next(self.server.failures) if asked else ""
        if asked:
            self.server.requests.append((path.name, asked.group()))
        if failure.isdecimal():
            self.send_error(int(failure))
            return
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if contents:
            self.wfile.write(part[: len(part) // 2] if failure == "cut" else part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(make: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    make.shards(5, 4)
    server = Server(make.root / "shards")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def records(location: str, **options: Any) -> list[Sample | Skipped]:
    source = open_source(location)
    return list(source.read(**{"seed": None, "epoch": 0, "start": 0, "stop": source.num_samples} | options))


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("failures", [[""], ["500", ""], ["cut", ""], ["cut", "500", ""]])
def test_remote_samples_are_those_of_the_files(make: Any, server: Server, failures: list[str], ending: str) -> None:
    make.shards(5, 4, ending=ending)
    server.failures = itertools.cycle(failures)
    expected = records(str(make.root / f"shards/*.{ending}"), seed=3)
    assert records(f"{server.url}/{{00000..00001}}.{ending}", seed=3) == expected
    assert len(expected) == 9


def test_a_folder_needs_a_manifest_and_opens_with_one_request(make: Any, server: Server) -> None:
    assert main(["manifest", str(make.root / "shards")]) == 0
    assert open_source(server.url).num_samples == 9
    assert {name for name, _ in server.requests} == {"manifest.json"}
    assert len(records(server.url)) == 9


def test_a_resumed_run_requests_only_what_it_needs(make: Any, server: Server) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(ImageTextDataset(open_source(server.url), transform="prior", size=8), 2, seed=1)

    assert main(["manifest", str(make.root / "shards")]) == 0
    broken = loader()
    alone = [batch["key"] for batch in loader()]
    assert len(list(zip(range(2), broken, strict=False))) == 2
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    assert [batch["key"] for batch in resumed] == alone[2:]
    skipping = records(server.url, skip=8)
    server.requests.clear()
    assert records(server.url, skip=8) == skipping
    assert {name for name, _ in server.requests} == {"manifest.json", "00001.tar"}


def test_a_shard_that_vanishes_or_changes_is_named(make: Any, server: Server) -> None:
    shards = make.root / "shards"
    for change, message in (
        (lambda path: path.unlink(), "the shard has vanished or cannot be reached"),
        (lambda path: path.write_bytes(bytes(10240)), "the shard has changed: it has 10240 bytes, and 2"),
    ):
        make.shards(5, 4)
        for location in (str(shards), f"{server.url}/{{00000..00001}}.tar"):
            make.shards(5, 4)
            source = open_source(location)
            assert source.num_samples == 9
            change(shards / "00000.tar")
            found = list(source.read(seed=None, epoch=0, start=0, stop=9))
            skipped = [record for record in found if isinstance(record, Skipped)]
            assert [record.key.endswith("00000.tar") for record in skipped] == [True] * 6
            assert message in skipped[0].reason
            assert [record.key for record in found[6:]] == ["s0005", "s0006", "s0007", "s0008"]


def test_contents_that_change_while_they_are_read_are_named(make: Any, server: Server) -> None:
    source = open_source(f"{server.url}/00000.tar")
    assert source.num_samples == 5
    stream = source.read(seed=None, epoch=0, start=0, stop=5)
    assert isinstance(next(stream), Sample)
    path = make.root / "shards/00000.tar"
    path.write_bytes(path.read_bytes()[:6000])
    skipped = [record for record in stream if isinstance(record, Skipped)]
    assert "00000.tar has changed while it was read" in skipped[0].reason


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00001}.tar"])
def test_other_file_systems_of_fsspec_are_read_alike(make: Any, pattern: str) -> None:
    make.shards(5, 4)
    system = fsspec.filesystem("memory")
    for path in (make.root / "shards").glob("*.tar"):
        system.pipe(f"/raw/{path.name}", path.read_bytes())
    assert records(f"memory://raw{pattern}", seed=3) == records(str(make.root / "shards"), seed=3)
    with pytest.raises(FileNotFoundError, match=r"memory://raw/nothing.tar does not exist"):
        _ = open_source("memory://raw/nothing.tar").num_samples


def test_what_cannot_be_reached_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for location, message in (
        (f"{server.url}/nothing.tar", "nothing.tar"),
        (f"{server.url}/nothing", "has no shard, and no manifest.json that lists some"),
        ("pipe:cat x.tar", "starts a program, which is not supported"),
        ("nonsense://x/y.tar", "nonsense"),
    ):
        assert main(["manifest", location, "--out", "unwritten.json"]) == 2, location
        assert message in capsys.readouterr().err
    server.failures = itertools.repeat("403")
    assert main(["manifest", f"{server.url}/00000.tar"]) == 2
    error = capsys.readouterr().err
    assert "upload that file next to the shards" in error or "HTTP 403" in error
    assert not Path("unwritten.json").exists()


def test_remote_shards_are_filtered(make: Any, server: Server) -> None:
    options = {"filters": Filters(english=False, min_words=1), "samples_per_shard": 3}
    local = filter_source(open_source(str(make.root / "shards")), make.root / "local", **options)  # type: ignore[arg-type]
    server.failures = itertools.cycle(["500", "cut", ""])
    found = filter_source(open_source(f"{server.url}/{{00000..00001}}.tar"), make.root / "out", **options)  # type: ignore[arg-type]
    assert found == local
    for path in (make.root / "local").iterdir():
        assert (make.root / "out" / path.name).read_bytes() == path.read_bytes()
