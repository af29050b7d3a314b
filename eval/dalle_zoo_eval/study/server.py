"""The server of a study: it serves the page and its images, and stores votes. Nothing that was stored can be read.

The standard library suffices for that, and every answer is a known file or one number. A request has a size limit and
a time limit, and the number of simultaneous requests is limited as well.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, parse_json
from dalle_zoo_eval.study.design import PAGE, Study
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.log import VoteLog
from dalle_zoo_eval.study.page import page_html
from dalle_zoo_eval.study.votes import CodeError

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024
"""Largest size of a request with votes, bytes; the page sends at most 50 votes, about 5 KB."""
MAX_REQUESTS = 256
"""Largest number of simultaneous requests; further connections are closed, and the page tries again."""
TIMEOUT = 15.0
"""Seconds after which a connection that sends nothing is closed."""
LIMIT = 120.0
"""Seconds after which any connection is closed, so that slow ones do not take all places."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class StudyServer(ThreadingHTTPServer):
    """Serves one study.

    Args:
        folder: Folder of the study.
        host: Address to listen at. Defaults to this machine only.
        port: Port; 0 chooses a free one. Defaults to 8000.

    Raises:
        StudyError: The folder, its log of votes or the address cannot be used.
        ClaimedError: Another server serves the study.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
        study = Study.read(folder)
        self.page = page_html(study, collect=True).encode()
        self.images = {name: folder / PAGE / "images" / name for pair in study.pairs for name in pair.images}
        missing = [path for path in self.images.values() if not path.is_file()]
        if missing:
            raise StudyError(f"{missing[0]} is missing: make the study again, or restore its images")
        self._slots = threading.BoundedSemaphore(MAX_REQUESTS)
        self.votes = VoteLog(study, folder)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            self.votes.close()
            reason = getattr(error, "strerror", None) or error
            raise StudyError(f"cannot listen at {host}:{port} ({reason}): choose another --host or --port") from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handles a connection in its own thread, or closes it if there are too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handles one connection, of a single request."""
        end = threading.Timer(LIMIT, partial(_end, request))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs an unexpected error; connections that a client closes are none."""
        log.debug("a request failed: %s", sys.exc_info()[1])

    def server_close(self) -> None:
        """Stops listening and closes the log."""
        super().server_close()
        self.votes.close()


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # it has just ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: StudyServer
    timeout = TIMEOUT
    server_version = "dalle-zoo"
    sys_version = ""

    def do_GET(self) -> None:
        """Sends the page or one of its images."""
        place = self.path.partition("?")[0]
        if place in ("/", "/index.html"):
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8", cache="no-store")
        elif (image := self.server.images.get(place.removeprefix("/images/"))) and place.startswith("/images/"):
            self._send(HTTPStatus.OK, image.read_bytes(), "image/png", cache="max-age=86400")
        else:
            self._problem(HTTPStatus.NOT_FOUND, "there is only the page and its images")

    def do_POST(self) -> None:
        """Stores votes; the answer says how many of them are new."""
        if self.path != "/votes":
            return self._problem(HTTPStatus.NOT_FOUND, "votes are sent to /votes")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._problem(HTTPStatus.LENGTH_REQUIRED, "the length of the request is required")
        if len(length) > 9 or int(length) > MAX_BODY:
            return self._problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {MAX_BODY} bytes")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            return self._problem(HTTPStatus.REQUEST_TIMEOUT, "the request was not complete in time")
        try:
            new = self.server.votes.append(parse_json(body, "the request"))
        except CodeError as error:
            return self._problem(HTTPStatus.FORBIDDEN, str(error))
        except (StudyError, FileError) as error:
            return self._problem(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            log.error("votes cannot be stored: %s", error)
            return self._problem(HTTPStatus.INSUFFICIENT_STORAGE, "votes cannot be stored at the moment")
        return self._send(HTTPStatus.OK, json.dumps({"new": new}).encode(), "application/json", cache="no-store")

    def _problem(self, status: HTTPStatus, text: str) -> None:
        self._send(status, json.dumps({"problem": text}).encode(), "application/json", cache="no-store")

    def _send(self, status: HTTPStatus, data: bytes, kind: str, *, cache: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": cache}
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: requests of raters are nobody's business, and addresses would identify them."""
