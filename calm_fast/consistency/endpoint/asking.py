"""Questions asked at an endpoint, several at a time, each until it has its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, cast

from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.consistency.endpoint.client import Drawn, Endpoint
from calm_fast.consistency.voting.consensus import Question

Draw = Callable[[Question, range], list[Drawn]]


def asked(
    endpoint: Endpoint,
    items: list[Question],
    draw: Draw,
    *,
    n: int,
    round_size: int,
    pattern: str | None,
    going: Callable[[list[Question], list[int]], list[int]],
) -> Iterator[list[Question]]:
    """Yield lists of questions, as they have their samples.

    draw: returns samples of a question by their numbers; it runs on threads. going: of questions and indices into them,
    which need more samples. If a request fails, the questions that are being asked are still finished and yielded, no
    other is begun, and then the error is raised.
    """
    for item in items:
        item.rationales, item.answers, item.scores = [], [], []
    left, failed = iter(items), cast("BaseException | None", None)
    running: dict[Future[list[Drawn]], Question] = {}
    with ThreadPoolExecutor(endpoint.parallel) as pool:

        def begin(item: Question) -> None:
            have = len(item.rationales)
            running[pool.submit(draw, item, range(have, min(have + round_size, n)))] = item

        while True:
            while failed is None and len(running) < endpoint.parallel and (more := next(left, None)) is not None:
                begin(more)
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            finished = []
            for future in done:
                asked = running.pop(future)
                if (problem := future.exception()) is not None:
                    failed = failed or problem
                    continue
                _add(asked, future.result(), pattern)
                if going([asked], [0]):
                    begin(asked)
                else:
                    finished.append(asked)
            if finished:
                yield finished
    if failed is not None:
        raise failed


def _add(item: Question, samples: list[Drawn], pattern: str | None) -> None:
    for sample in samples:
        item.rationales.append(sample.text)
        item.answers.append(extract_answer(sample.text, pattern))
        score = None if sample.logprob is None else math.exp(sample.logprob)
        cast(list[Any], item.scores).append(score)
