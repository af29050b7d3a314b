"""Load on the server: batches against a loop, and clients that are killed. Writes results/serving.json.

python benchmarks/serving.py [--requests 200] [--connections 20] [--threads 1]
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn

from dalle_zoo import DallePipeline
from dalle_zoo.files import write_json
from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import png_bytes
from dalle_zoo.version import __version__
from dalle_zoo.web.api import create_app
from dalle_zoo.web.engine import Engine

RESULT = Path(__file__).parent / "results" / "serving.json"
TARGET = 2.0
"""Least throughput at 16 clients, in throughputs of the pipeline called in a loop."""
KILLED = 10
"""One request in ten is abandoned by its client."""
PROMPTS = (
    "a 3d emoji of a red apple",
    "a flat emoji of a red heart",
    "a blob emoji of a cat",
    "a cartoon emoji of a dog",
)


def connect(port: int, number: int) -> http.client.HTTPConnection:
    """Sends a request for one image, whose prompt and seed depend on its number."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "response_format": "b64_json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(port: int, number: int) -> bytes:
    """Returns the image of a request; waits as long as a full queue asks for."""
    while True:
        connection = connect(port, number)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if response.status == 200:
            return base64.b64decode(json.loads(data)["data"][0]["b64_json"])
        assert response.status == 429, data
        time.sleep(min(int(response.headers["Retry-After"]), 2))


def abandon(port: int, number: int) -> None:
    """Disconnects soon after the request."""
    connection = connect(port, number)
    time.sleep(0.05)
    connection.close()


def resident() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def throughput(pipe: DallePipeline, port: int, clients: int, count: int) -> dict[str, float]:
    """Images per second of the pipeline in a loop, and of the server with several clients."""
    start = time.perf_counter()
    for number in range(count):
        output = pipe(PROMPTS[number % len(PROMPTS)], seed=number)
        png_bytes(output.images[0], output.settings[0])
    loop = count / (time.perf_counter() - start)
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        list(pool.map(lambda number: ask(port, number), range(count)))
        served = count / (time.perf_counter() - start)
    return {"loop": loop, "server": served, "ratio": served / loop}


def load(pipe: DallePipeline, port: int, requests: int, connections: int) -> dict[str, Any]:
    """Runs requests with killed clients in between, and checks every image that arrives."""
    memory = []

    def one(number: int) -> bytes | None:
        if number % 50 == 0:
            memory.append(round(resident(), 1))
        return abandon(port, number) if number % KILLED == 0 else ask(port, number)

    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        images = list(pool.map(one, range(requests)))
    seconds = time.perf_counter() - start
    memory.append(round(resident(), 1))
    wrong = 0
    expected = pipe([PROMPTS[n % len(PROMPTS)] for n in range(requests)], seed=list(range(requests)))
    for number, data in enumerate(images):
        if data is not None:
            wrong += data != png_bytes(expected.images[number], expected.settings[number])
            assert read_settings(io.BytesIO(data)).seed == number
    arrived = sum(data is not None for data in images)
    return {"requests": requests, "connections": connections, "killed": requests - arrived, "arrived": arrived,
            "wrong": wrong, "seconds": seconds, "memory_mb": memory}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200, help="requests of the load test (200)")
    parser.add_argument("--connections", type=int, default=20, help="connections at the same time (20)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = DallePipeline.from_pretrained("emoji64")
    engine = Engine(pipe)
    server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        pipe(PROMPTS[0], seed=0)
        ask(port, 0)
        result = {
            "command": f"python benchmarks/serving.py --requests {options.requests} "
            f"--connections {options.connections} --threads {options.threads}",
            "model": "emoji64",
            "code_version": __version__,
            "torch": torch.__version__,
            "target_ratio": TARGET,
            "images_per_second": {f"{n} clients": throughput(pipe, port, n, 32) for n in (16,)},
            "load": load(pipe, port, options.requests, options.connections),
        }
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
    write_json(RESULT, result)
    print(json.dumps(result, indent=2))
    assert result["load"]["wrong"] == 0, "an image was lost or mixed up"


if __name__ == "__main__":
    main()
