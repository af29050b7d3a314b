"""Runs the requests of many clients with one model, several in one batch.

```
submit(request) ─► queue (bounded) ─► worker thread: requests with equal options become one batch ─► Ticket
                                          pipe.sample ─► previews ─► pipe.decode ─► ranker ─► result
```
One thread uses the model, so that requests share its weights and the processor. Images depend only on their own
prompt, seed and options, so a batch gives every client the same images as a separate call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import SAMPLE, Progress, SamplingOptions

# n images of a request, h w code grid

log = logging.getLogger(__name__)

Preview = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for images.

    Example:
        >>> request = Request(prompt="a red apple", seeds=(4, 9), options=SamplingOptions(temperature=0.7))
        >>> len(request.seeds), request.rerank  # two images, unranked
        (2, None)
    """

    prompt: str
    """The prompt."""
    seeds: tuple[int, ...]
    """One seed per image to generate."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    """Temperature, filters and guidance. Defaults to plain sampling."""
    rerank: int | None = None
    """Number of images to keep, ranked, best first. Defaults to all of them, unranked."""
    negative_prompt: str | None = None
    """Text that guidance leads away from. Defaults to the empty caption."""
    given: Tensor | None = field(default=None, compare=False)
    """Codes to keep, int64 (h, w), with `SAMPLE` where to sample. Defaults to none."""
    on_progress: Preview | None = field(default=None, compare=False)
    """Called in the worker thread after every pass with the request's own `Progress`. Defaults to none."""


@dataclass(frozen=True)
class Answer:
    """Images of a request, best first if ranked.

    Example:
        >>> images, codes = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 1, dtype=torch.long)
        >>> answer = Answer(images, codes, seeds=(9, 4), scores=(0.8, 0.3), seconds=1.5)
        >>> answer.seeds[0]  # that of the best image
        9
    """

    images: Tensor
    """Pixels in [0, 1], (n, 3, H, W)."""
    codes: Tensor
    """Codes, int64 (n, h, w)."""
    seeds: tuple[int, ...]
    """Seed of every image."""
    scores: tuple[float, ...] | None
    """The ranker's score of every image; None without reranking."""
    seconds: float
    """Time in the worker thread, shared with the other requests of the batch."""


class QueueFullError(Exception):
    """There are too many waiting requests; `retry_after` is the estimated number of seconds until there is room.

    Example:
        >>> str(QueueFullError(waiting=64, retry_after=12))
        '64 requests are waiting, which is the limit: try again in 12 s'
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is the limit: try again in {retry_after} s")
        self.retry_after = retry_after


class Ticket:
    """A submitted request.

    Example:
        >>> ticket = Ticket(Request(prompt="a red apple", seeds=(0,)))
        >>> ticket.cancel()
        >>> ticket.canceled, ticket.future.cancelled()
        (True, True)
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.future: Future[Answer] = Future()
        self._canceled = threading.Event()

    @property
    def canceled(self) -> bool:
        """Whether the client no longer wants the images."""
        return self._canceled.is_set()

    def cancel(self) -> None:
        """Cancels the request: removes it from the queue, or stops its batch if no other client waits for it."""
        self._canceled.set()
        self.future.cancel()


class Stopped(Exception):
    """Stops a batch for which no client waits, or whose engine is closed."""


class Engine:
    """Generates images for many clients with one pipeline.

    Args:
        pipe: The pipeline; afterwards, only the engine's thread samples with it.
        max_waiting: Largest number of waiting requests. Defaults to 64.
        max_images: Largest number of images in a batch. Defaults to 64.

    Example:
        >>> engine = Engine(DallePipeline.from_pretrained("composition"))
        >>> tickets = [engine.submit(Request(prompt="a red apple", seeds=(seed, 9))) for seed in (0, 1)]
        >>> first, second = (ticket.future.result() for ticket in tickets)
        >>> engine.close()
        >>> torch.equal(first.codes[1], second.codes[1])  # equal seeds
        True
    """

    def __init__(self, pipe: DallePipeline, *, max_waiting: int = 64, max_images: int = 64) -> None:
        if max_waiting < 1 or max_images < 1:
            raise ValueError(f"max_waiting and max_images must be at least 1, got {max_waiting} and {max_images}")
        self.pipe, self.max_waiting, self.max_images = pipe, max_waiting, max_images
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_request = 1.0
        self._worker = threading.Thread(target=self._work, name="dalle-zoo engine", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        with self._changed:
            return len(self._waiting)

    def submit(self, request: Request) -> Ticket:
        """Queues a request.

        Raises:
            QueueFullError: Too many requests are waiting.
            RuntimeError: The engine is closed.
            ValueError: The request has no images, or more than a batch holds.
        """
        if not 1 <= len(request.seeds) <= self.max_images:
            raise ValueError(f"a request must be for 1..{self.max_images} images, got {len(request.seeds)}")
        ticket = Ticket(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._drop_canceled()
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(len(self._waiting), max(1, round(self._seconds_per_request * self.max_waiting)))
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Ends the worker thread after its current token; all requests are canceled."""
        with self._changed:
            self._closed = True
            for ticket in self._waiting:
                ticket.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._worker.join()

    def _drop_canceled(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.canceled)

    def _work(self) -> None:
        while batch := self._next_batch():
            start = time.perf_counter()
            self._run(batch)
            took = (time.perf_counter() - start) / len(batch)
            self._seconds_per_request += 0.2 * (took - self._seconds_per_request)

    def _run(self, batch: Sequence[Ticket]) -> None:
        """Generates a batch; if that fails, its requests one by one, so that a bad one does not fail the others."""
        try:
            self._generate(batch)
        except Stopped:
            for ticket in batch:  # those of a closed engine still wait
                ticket.cancel()
        except Exception as error:  # a fault of one batch must not end the service
            if len(batch) == 1:
                log.exception("a request failed")
                _settle(batch[0], error)
                return
            log.warning("a batch of %d requests failed (%s); each is tried alone", len(batch), type(error).__name__)
            for ticket in batch:
                if not ticket.future.done():
                    self._run([ticket])

    def _next_batch(self) -> list[Ticket]:
        """Waits for requests and takes those that fit one batch with the oldest; nothing when the engine is closed."""
        with self._changed:
            while True:
                self._drop_canceled()
                if self._closed or self._waiting:
                    break
                self._changed.wait()
            if self._closed:
                return []
            batch: list[Ticket] = []
            others: deque[Ticket] = deque()
            images = 0
            for ticket in self._waiting:
                request = ticket.request
                fits = not batch or (
                    request.options == batch[0].request.options and images + len(request.seeds) <= self.max_images
                )
                if fits:
                    batch.append(ticket)
                    images += len(request.seeds)
                else:
                    others.append(ticket)
            self._waiting = others
            return batch

    def _generate(self, batch: Sequence[Ticket]) -> None:
        start = time.perf_counter()
        requests = [ticket.request for ticket in batch]
        text = self.pipe.encode_text([request.prompt for request in requests])
        counts = [len(request.seeds) for request in requests]
        given, negative = self._given(requests), self._negative(requests)
        equal = len(set(counts)) == 1
        if not equal:  # one row per image, since rows of a batch have equally many candidates
            repeats = torch.tensor(counts, device=text.device)
            text = text.repeat_interleave(repeats, 0)
            given = given.repeat_interleave(repeats.cpu(), 0) if given is not None else None
            negative = negative.repeat_interleave(repeats, 0) if negative is not None else None
        seeds = torch.tensor([seed for request in requests for seed in request.seeds])
        codes = self.pipe.sample(
            text,
            seeds.view(len(requests), -1) if equal else seeds[:, None],
            requests[0].options,
            given=given,
            negative=negative,
            batch_size=self.max_images,
            callback=lambda progress: self._report(batch, counts, progress),
        )
        for ticket, part in zip(batch, torch.split(codes.flatten(0, 1), counts), strict=True):
            if not ticket.canceled:
                _settle(ticket, self._answer(ticket.request, part, start))

    def _given(self, requests: Sequence[Request]) -> Tensor | None:
        """Codes that the requests keep, int64 (P, h, w); None if no request keeps any."""
        if all(request.given is None for request in requests):
            return None
        config = self.pipe.prior.config
        free = torch.full((config.image_height, config.image_width), SAMPLE)
        return torch.stack([free if request.given is None else request.given for request in requests])

    def _negative(self, requests: Sequence[Request]) -> Tensor | None:
        """Text ids of the negative prompts, int64 (P, T); None if no request has one."""
        if all(request.negative_prompt is None for request in requests):
            return None
        null = self.pipe.prior.null_text().cpu()
        rows = [
            null if text is None else self.pipe.encode_text([text])[0].cpu()
            for text in (request.negative_prompt for request in requests)
        ]
        return torch.stack(rows)

    def _report(self, batch: Sequence[Ticket], counts: Sequence[int], progress: Progress) -> None:
        """Reports progress to clients; stops the batch if no client waits or the engine is closed."""
        if self._closed or all(ticket.canceled for ticket in batch):
            raise Stopped
        start = 0
        for ticket, count in zip(batch, counts, strict=True):
            here = slice(start, start := start + count)
            if ticket.request.on_progress is not None and not ticket.canceled:

                def read(here: slice = here) -> Tensor:
                    return progress.codes.flatten(0, 1)[None, here]

                ticket.request.on_progress(Progress(progress.done, progress.total, read))

    def _answer(self, request: Request, codes: Tensor, start: float) -> Answer:
        seeds, scores, images = request.seeds, None, None
        if request.rerank is not None:
            text = self.pipe.encode_text([request.prompt])
            chosen = self.pipe.select([request.prompt], text, codes[None], request.rerank, request.given)
            codes, scores = codes[chosen.best[0]], tuple(chosen.scores[0].tolist())
            seeds = tuple(seeds[index] for index in chosen.best[0].tolist())
            images = None if chosen.images is None else chosen.images[0]
        images = self.pipe.decode(codes) if images is None else images
        return Answer(images, codes, seeds, scores, time.perf_counter() - start)


def _settle(ticket: Ticket, outcome: Answer | Exception) -> None:
    """Sets the result of a ticket, unless the client has disconnected."""
    if ticket.future.cancelled() or not ticket.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        ticket.future.set_exception(outcome)
    else:
        ticket.future.set_result(outcome)


__all__ = ["Answer", "CancelledError", "Engine", "QueueFullError", "Request", "Ticket"]
