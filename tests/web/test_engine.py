"""Requests of many clients become batches, and nobody gets other images than alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from dalle_zoo.sampling import SAMPLE, Progress, SamplingOptions
from dalle_zoo.web.engine import CancelledError, Engine, QueueFullError, Request
from tests.web.conftest import Slow, until


def hold(engine: Engine, pipe: Slow) -> Any:
    """Starts a request that keeps the engine busy until `pipe.released` is set."""
    pipe.released.clear()
    ticket = engine.submit(Request(prompt="first", seeds=(99,)))
    until(lambda: pipe.batches)
    return ticket


def test_a_batch_gives_the_images_of_single_calls(engine: Engine, pipe: Slow) -> None:
    first = hold(engine, pipe)
    given = torch.full((4, 4), SAMPLE)
    given[1:3] = 5
    requests = [
        Request(prompt="a cat", seeds=(1, 2)),
        Request(prompt="a dog", seeds=(3,)),
        Request(prompt="a fig", seeds=(4,), given=given),
        Request(prompt="hot", seeds=(5,), options=SamplingOptions(temperature=0.5)),
    ]
    tickets = [engine.submit(request) for request in requests]
    pipe.released.set()
    answers = [ticket.future.result(120) for ticket in tickets]
    assert first.future.result(120).seeds == (99,)
    assert len(pipe.batches) == 3, "the first, three with equal options together, and the hot one"
    for request, answer in zip(requests, answers, strict=True):
        alone = pipe(
            request.prompt, num_images_per_prompt=len(request.seeds), seed=list(request.seeds), given=request.given,
            temperature=request.options.temperature, output_type="latent",
        )  # fmt: skip
        assert torch.equal(answer.codes, alone.images)
        assert torch.equal(answer.images, pipe.decode(answer.codes))
        assert answer.seeds == request.seeds
    assert torch.equal(answers[2].codes[0, 1:3], given[1:3])


def test_ranked_images_are_those_of_the_pipeline(engine: Engine, pipe: Slow) -> None:
    given = torch.full((4, 4), SAMPLE)
    given[2:] = 5
    answer = engine.submit(Request(prompt="a fig", seeds=(1, 2, 3, 4), rerank=2, given=given)).future.result(120)
    alone = pipe("a fig", num_images_per_prompt=4, seed=[1, 2, 3, 4], rerank=2, given=given, output_type="pt")
    assert torch.equal(answer.images, alone.images)
    assert answer.seeds == tuple(alone.seeds.tolist())
    assert answer.scores == tuple(alone.scores.tolist())


def test_a_full_queue_says_when_to_come_back(engine: Engine, pipe: Slow) -> None:
    hold(engine, pipe)
    tickets = [engine.submit(Request(prompt="a", seeds=(n,))) for n in range(8)]
    with pytest.raises(QueueFullError, match="8 requests are waiting") as error:
        engine.submit(Request(prompt="a", seeds=(9,)))
    assert error.value.retry_after >= 1
    tickets[3].cancel()
    engine.submit(Request(prompt="a", seeds=(9,)))
    with pytest.raises(CancelledError):
        tickets[3].future.result(1)


def test_a_batch_stops_when_nobody_waits(engine: Engine, pipe: Slow) -> None:
    passes: list[int] = []
    half = threading.Event()

    def watch(progress: Progress) -> None:
        passes.append(progress.done)
        if progress.done == 5:
            half.set()
            assert gone.wait(120)

    gone = threading.Event()
    ticket = engine.submit(Request(prompt="a", seeds=(1,), on_progress=watch))
    assert half.wait(120)
    ticket.cancel()
    gone.set()
    assert engine.submit(Request(prompt="b", seeds=(1,))).future.result(120).seeds == (1,)
    assert passes == [1, 2, 3, 4, 5]


def test_clients_watch_their_own_images(engine: Engine, pipe: Slow) -> None:
    hold(engine, pipe)
    seen: list[torch.Tensor] = []
    other = engine.submit(Request(prompt="a dog", seeds=(3, 4)))
    ticket = engine.submit(Request(prompt="a cat", seeds=(1, 2), on_progress=lambda it: seen.append(it.codes)))
    pipe.released.set()
    codes = ticket.future.result(120).codes
    other.future.result(120)
    assert len(seen) == 16
    for done, state in enumerate(seen, 1):
        assert state.shape == (1, 2, 4, 4)
        assert torch.equal(state.flatten(2)[0, :, :done], codes.flatten(1)[:, :done])
        assert (state.flatten(2)[..., done:] == SAMPLE).all()


def test_a_failed_batch_does_not_end_the_service(engine: Engine, pipe: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "decode", lambda codes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(Request(prompt="a", seeds=(1,))).future.result(120)
    assert engine.submit(Request(prompt="a", seeds=(1,))).future.result(120).images.shape == (1, 3, 16, 16)


def test_a_closed_engine_takes_nothing(pipe: Slow) -> None:
    engine = Engine(pipe)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(Request(prompt="a", seeds=(1,)))
    with pytest.raises(ValueError, match="max_waiting and max_images must be at least 1"):
        Engine(pipe, max_waiting=0)


@pytest.mark.parametrize("seeds", [(), tuple(range(9))])
def test_a_request_fits_a_batch(engine: Engine, seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a request must be for 1\.\.8 images"):
        engine.submit(Request(prompt="a", seeds=seeds))


def test_a_request_that_fails_does_not_fail_others(engine: Engine, pipe: Slow) -> None:
    hold(engine, pipe)
    bad = engine.submit(Request(prompt="a", seeds=(1,), given=torch.zeros(2, 2, dtype=torch.long)))
    good = engine.submit(Request(prompt="b", seeds=(2,)))
    pipe.released.set()
    assert torch.equal(good.future.result(30).codes, pipe("b", seed=[2], output_type="latent").images)
    with pytest.raises(ValueError, match="given must be int64 of shape"):
        bad.future.result(30)
