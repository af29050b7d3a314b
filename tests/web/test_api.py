"""The HTTP interface over a real socket, with OpenAI's client."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from benchmarks import serving
from dalle_zoo.image_settings import ImageSettings, read_settings
from dalle_zoo.images import png_bytes
from dalle_zoo.web.api import create_app
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from tests.web.conftest import Slow, running, until

Client = Callable[..., openai.OpenAI]


@pytest.fixture
def port(engine: Engine) -> Iterator[int]:
    with running(create_app(engine, limits=Limits(max_images=4, max_prompt=40, stored_images=3))) as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with connect(port) as client:
        yield client


def connect(port: int, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=120)


def settings_of(data: bytes, folder: Path) -> ImageSettings:
    (folder / "image.png").write_bytes(data)
    return read_settings(folder / "image.png")


def fetch(port: int, path: str, **options: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(options.pop("method", "GET"), path, **options)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


def test_images_have_the_bytes_of_the_pipeline(client: openai.OpenAI, port: int, pipe: Slow, tmp_path: Path) -> None:
    extra = {"seed": 7, "temperature": 0.8, "top_k": 9, "guidance_scale": 2.0, "negative_prompt": "a dog"}
    expected = pipe("a cat", num_images_per_prompt=2, **extra)
    files = [png_bytes(*each) for each in zip(expected.images, expected.settings, strict=True)]
    answer = client.images.generate(prompt="a cat", n=2, size="16x16", response_format="b64_json", extra_body=extra)
    assert [base64.b64decode(image.b64_json or "") for image in answer.data or []] == files
    assert settings_of(files[1], tmp_path) == expected.settings[1]
    assert [image.model_extra["seed"] for image in answer.data or [] if image.model_extra] == expected.seeds.tolist()
    answer = client.images.generate(prompt="a cat", n=2, model="not saved", extra_body=extra)
    urls = [image.url or "" for image in answer.data or []]
    assert [fetch(port, url.partition(str(port))[2])[1] for url in urls] == files


def test_what_a_client_should_know_of_its_prompt_is_in_the_answer(client: openai.OpenAI, pipe: Slow) -> None:
    pipe.tokenizer.words = {"a": 2, "cat": 1, "fig": 1}
    extra = {"negative_prompt": "a dog", "guidance_scale": 2.0}
    answer = client.images.generate(prompt="a cat", extra_body=extra)
    assert answer.model_extra == {
        "model": "not saved", "warnings": ["prompt 'a dog': the model never saw the word 'dog'"],
    }  # fmt: skip
    answer = client.images.generate(prompt="a fig cat")
    assert (answer.model_extra or {})["warnings"] == [
        "prompt 'a fig cat' has 9 tokens: the model uses the first 8 only"
    ]
    assert client.images.generate(prompt="a cat").model_extra == {"model": "not saved", "warnings": []}


def test_only_recent_images_are_stored(client: openai.OpenAI, port: int) -> None:
    first = client.images.generate(prompt="a cat", n=1).data
    client.images.generate(prompt="a cat", n=3)
    assert first
    status, data = fetch(port, str(first[0].url).partition(str(port))[2])
    assert status == 404
    assert json.loads(data)["error"]["message"] == "there is no such image: only recent images are available"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "  "}, "prompt is empty: describe the image"),
        ({"prompt": "a" * 41}, "prompt has 41 characters, at most 40 are allowed"),
        ({"prompt": "a", "n": 5}, r"n must be in 1\.\.4, got 5"),
        ({"prompt": "a", "n": 0}, r"n must be in 1\.\.4, got 0"),
        ({"prompt": "a", "size": "1024x1024"}, "size must be 16x16, the size of this model's images, got '1024x1024'"),
        ({"prompt": "a", "model": "dall-e-3"}, "this server has the model not saved, not 'dall-e-3'"),
        ({"prompt": "a", "extra_body": {"rerank": 1}}, "rerank needs a ranker"),
        ({"prompt": "a", "extra_body": {"temperature": -1}}, "temperature must be"),
        ({"prompt": "a", "extra_body": {"negative_prompt": "b"}}, "set guidance_scale to another value than 1"),
        ({"prompt": "a", "extra_body": {"seed": "x"}}, "seed: Input should be a valid integer"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else None,
)
def test_a_bad_request_is_explained(client: openai.OpenAI, pipe: Slow, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.images.generate(**body)
    assert pipe.batches == []


def test_models_health_and_unknown_paths(client: openai.OpenAI, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["not saved"]
    assert json.loads(fetch(port, "/health")[1]) == {"status": "ok", "waiting": 0}
    for method, path in (("GET", "/v1/nothing"), ("GET", "/v1/images/generations"), ("DELETE", "/v1/models")):
        status, data = fetch(port, path, method=method)
        assert (status, json.loads(data)["error"]["message"]) == (404, f"there is no {method} {path}")


def test_a_body_that_is_no_json_is_explained(port: int) -> None:
    headers = {"Content-Type": "application/json"}
    status, data = fetch(port, "/v1/images/generations", method="POST", body=b"{bad", headers=headers)
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, None)
    assert error["message"].startswith("the body is not valid JSON: Expecting property name")


def test_a_token_is_checked(engine: Engine) -> None:
    with running(create_app(engine, token="sécret")) as port:
        with connect(port, "wrong") as client, pytest.raises(openai.AuthenticationError, match="a token is needed"):
            client.images.generate(prompt="a")
        assert fetch(port, "/v1/models")[0] == 401
        assert fetch(port, "/health")[0] == 200
        allowed = {"Authorization": "Bearer sécret".encode()}
        assert fetch(port, "/v1/models", headers=allowed)[0] == 200
        for scheme, status in (("bearer ", 200), ("BEARER  ", 200), ("", 401), ("Basic ", 401)):
            headers = {"Authorization": f"{scheme}sécret".encode()}
            assert fetch(port, "/v1/models", headers=headers)[0] == status


def test_a_full_queue_says_when_to_come_back_and_a_client_that_leaves_frees_its_place(
    client: openai.OpenAI, port: int, pipe: Slow, engine: Engine, tmp_path: Path
) -> None:
    pipe.released.clear()
    connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(9)]
    for number, connection in enumerate(connections):
        body = json.dumps({"prompt": f"a {number}", "seed": number, "response_format": "b64_json"})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        until(lambda number=number: pipe.batches and engine.waiting == number)
    with pytest.raises(openai.RateLimitError, match="8 requests are waiting") as error:
        client.images.generate(prompt="a")
    assert int(error.value.response.headers["retry-after"]) >= 1
    connections[4].close()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(client.images.generate(prompt="late", extra_body={"seed": 1}))

    until(lambda: sum(not ticket.canceled for ticket in engine._waiting) == 7)
    late = threading.Thread(target=ask)
    late.start()
    until(lambda: [ticket.request.prompt for ticket in engine._waiting][-1:] == ["late"])
    pipe.released.set()
    late.join(120)
    assert len(answers) == 1
    for number in (0, 1, 2, 3, 5, 6, 7, 8):
        data = json.loads(connections[number].getresponse().read())["data"][0]
        assert settings_of(base64.b64decode(data["b64_json"]), tmp_path).prompt == f"a {number}"
        connections[number].close()


def test_a_fault_is_reported_and_the_service_goes_on(
    client: openai.OpenAI, pipe: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(codes: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "decode", fail)
        with pytest.raises(openai.InternalServerError, match="unexpected ZeroDivisionError") as error:
            client.images.generate(prompt="a")
    assert "secret" not in str(error.value)
    assert client.images.generate(prompt="a").data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the connections that are cut
def test_no_image_is_lost_or_mixed_up_while_clients_are_killed(pipe: Slow) -> None:
    engine = Engine(pipe)
    with running(create_app(engine)) as port:
        measured = serving.load(pipe, port, requests=200, connections=20)
        assert json.loads(fetch(port, "/health")[1])["waiting"] == 0
    engine.close()
    assert (measured["killed"], measured["arrived"], measured["wrong"]) == (20, 180, 0)
    assert measured["memory_growth"] <= serving.GROWTH
