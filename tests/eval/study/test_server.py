"""The server of a study: what it accepts, what it stores, kills, and many raters at once."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.log import VoteLog
from dalle_zoo_eval.study.server import MAX_BODY, StudyServer
from dalle_zoo_eval.study.votes import read_votes

from dalle_zoo.claims import ClaimedError
from tests.eval.study.conftest import exported, vote_for


@pytest.fixture
def served(made: Any, tmp_path: Path) -> Iterator[tuple[Study, StudyServer]]:
    study = made(controls=0)
    with StudyServer(tmp_path / "study", port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield study, server
        server.shutdown()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def post(port: int, values: Any) -> tuple[int, bytes]:
    return ask(port, "POST", "/votes", json.dumps(values).encode())


def all_votes(study: Study, rater: int, system: int = 0) -> list[dict[str, object]]:
    return [vote_for(study, rater, pair, q.id, system) for pair in study.raters[rater].order for q in study.questions]


def test_server_serves_only_the_page(served: tuple[Study, StudyServer]) -> None:
    study, server = served
    assert post(server.server_port, exported(study, 0, all_votes(study, 0))) == (200, b'{"new": 6}')
    status, page = ask(server.server_port, "GET", "/?x=1")
    assert (status, page) == (200, server.page)
    assert ask(server.server_port, "GET", f"/images/{study.pairs[0].images[0]}")[1].startswith(b"\x89PNG")
    secret = study.raters[0].code.encode()
    for path in ("/study.json", "/raters.txt", "/votes", "/votes/server.jsonl", "/images/../../study.json",
                 "/images/%2e%2e/%2e%2e/study.json", "//etc/passwd", "/images/", "/page/index.html"):  # fmt: skip
        status, reply = ask(server.server_port, "GET", path)
        assert status == 404, path
        assert secret not in reply
    assert secret not in page


def test_address_in_use_raises_with_its_name(made: Any, tmp_path: Path) -> None:
    made(controls=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StudyError, match=f"cannot listen at 127.0.0.1:{port}"):
            StudyServer(tmp_path / "study", port=port)
    StudyServer(tmp_path / "study", port=0).server_close()  # its log was released


def test_wrong_requests_fail_and_store_nothing(served: tuple[Study, StudyServer]) -> None:
    study, server = served
    port, right = server.server_port, all_votes(study, 0)
    wrong_code = {**exported(study, 0, right), "rater": "1-aaaaaaaaaa"}
    assert post(port, wrong_code)[0] == 403
    assert post(port, {**wrong_code, "rater": "1-\ud800"})[0] == 403
    for change in ({"answer": 0}, {"answer": 3}, {"answer": True}, {"pair": 99}, {"pair": "0"}, {"question": "x"},
                   {"seconds": -1}, {"seconds": None}, {"more": 1}):  # fmt: skip
        status, reply = post(port, exported(study, 0, [right[1], {**right[0], **change}]))
        assert status == 400, change
        assert b"problem" in reply
    assert post(port, {**exported(study, 0, right), "study": "x"})[0] == 400
    assert post(port, [])[0] == 400
    assert ask(port, "POST", "/votes", b"{")[0] == 400
    assert ask(port, "POST", "/votes", b"[" * 1000)[0] == 400
    assert ask(port, "POST", "/votes", None, **{"Content-Length": str(MAX_BODY + 1)})[0] == 413
    assert ask(port, "POST", "/votes", None, **{"Content-Length": "9" * 30})[0] == 413
    assert ask(port, "POST", "/votes", None, **{"Content-Length": "-1"})[0] == 411
    assert ask(port, "POST", "/other", b"{}")[0] == 404
    assert ask(port, "DELETE", "/votes")[0] == 501
    assert server.votes.count == 0
    assert server.votes.path.read_bytes() == b""


def test_one_vote_per_rater_pair_and_question_is_stored(served: tuple[Study, StudyServer], tmp_path: Path) -> None:
    study, server = served
    first, changed = all_votes(study, 0, system=0), all_votes(study, 0, system=1)
    assert post(server.server_port, exported(study, 0, [first[0], changed[0]])) == (200, b'{"new": 1}')
    assert post(server.server_port, exported(study, 0, [changed[0], first[1]])) == (200, b'{"new": 1}')
    assert post(server.server_port, exported(study, 0, first[:2])) == (200, b'{"new": 0}')
    votes = read_votes(study, [tmp_path / "study"]).votes
    assert [vote.answer for vote in votes] == [first[0]["answer"], first[1]["answer"]]


def test_slow_connections_end(served: tuple[Study, StudyServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then does not keep its place."""
    _, server = served
    monkeypatch.setattr("dalle_zoo_eval.study.server.LIMIT", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as slow:
        slow.sendall(b"POST /votes HTTP/1.0\r\nContent-Length: 1000\r\n\r\n{")
        with suppress(ConnectionError):
            assert slow.recv(100)[:13] in (b"", b"HTTP/1.0 400 ")  # what came is no request
    assert server.votes.count == 0


def test_rater_votes_only_on_own_pairs(made: Any, tmp_path: Path) -> None:
    study = made(controls=0, per_rater=1)
    others = vote_for(study, 1, study.raters[1].order[0], "realism", 0)
    with VoteLog(study, tmp_path / "study") as log, pytest.raises(StudyError, match="one that the rater was asked"):
        log.append(exported(study, 0, [others]))


def test_fifty_concurrent_raters_lose_no_votes(made: Any, tmp_path: Path) -> None:
    study = made(controls=0, votes=50)
    with StudyServer(tmp_path / "study", port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

        def vote(rater: int) -> list[int]:
            return [
                post(server.server_port, exported(study, rater, [each]))[0] for each in all_votes(study, rater)[:2]
            ]

        with ThreadPoolExecutor(50) as pool:
            replies = list(pool.map(vote, range(50)))
        server.shutdown()
    assert replies == [[200] * 2] * 50
    assert len(read_votes(study, [tmp_path / "study"]).votes) == 50 * 2


def test_unfinished_line_is_removed_and_damaged_line_raises(made: Any, tmp_path: Path) -> None:
    study = made(controls=0)
    with VoteLog(study, tmp_path / "study") as log:
        log.append(exported(study, 0, all_votes(study, 0)[:2]))
        with pytest.raises(ClaimedError, match="wait until it ends"):
            VoteLog(study, tmp_path / "study")
    complete = log.path.read_bytes()
    log.path.write_bytes(complete + complete[:-5])
    assert len(read_votes(study, [log.path]).votes) == 2  # while the server runs
    with VoteLog(study, tmp_path / "study") as again:
        assert again.count == 2
        assert log.path.read_bytes() == complete
        again.append(exported(study, 1, all_votes(study, 1)))
    log.path.write_bytes(b"{}\n" + log.path.read_bytes())
    with pytest.raises(StudyError, match=r"server\.jsonl, line 1: expected an object with study"):
        VoteLog(study, tmp_path / "study")
    assert not (log.path.parent / ".claim").exists()


def test_full_disk_stores_no_partial_vote(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = made(controls=0)
    with VoteLog(study, tmp_path / "study") as log:
        log.append(exported(study, 0, all_votes(study, 0)[:1]))
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(OSError, match="No space left"):
            log.append(exported(study, 0, all_votes(study, 0)))
        monkeypatch.undo()
        assert log.count == 1
        assert log.append(exported(study, 0, all_votes(study, 0))) == 5
    assert len(read_votes(study, [log.path]).votes) == 6


@pytest.mark.slow
def test_kills_lose_no_stored_vote(made: Any, tmp_path: Path) -> None:
    captions = tuple(f"caption {number}" for number in range(60))
    study = made(captions=captions, controls=0, votes=4)
    stored: set[tuple[int, object, object]] = set()
    waiting = [(rater, vote) for rater in range(4) for vote in all_votes(study, rater)]
    for _ in range(8):
        code = "import sys; from dalle_zoo_eval.study.command import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "serve", str(tmp_path / "study"), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("/#")[0].rpartition(":")[2])

            def send(port: int = port) -> None:
                while waiting:
                    rater, vote = waiting.pop()
                    try:
                        status, _ = post(port, exported(study, rater, [vote]))
                    except (OSError, http.client.HTTPException):
                        waiting.append((rater, vote))
                        return
                    assert status == 200
                    stored.add((rater, vote["pair"], vote["question"]))

            senders = [threading.Thread(target=send) for _ in range(6)]
            for sender in senders:
                sender.start()
            time.sleep(0.15)
            server.send_signal(signal.SIGKILL)
            for sender in senders:
                sender.join()
        found = {vote.key for vote in read_votes(study, [tmp_path / "study"]).votes}
        assert stored <= found
        assert all(line for line in (tmp_path / "study/votes/server.jsonl").read_bytes().split(b"\n")[:-1])
    assert len(stored) > 50
