# SPDX-License-Identifier: Apache-2.0
"""Asks several servers from one thread: requests are sent without waiting, and the first answers are taken.

Invariant: when `ask` is over, nothing that it sent is under way any more. No request has a thread. Any thread, any number at
once.
"""

import math
import select
import time
from typing import Any

from oarlock.proto.errors import PSError
from oarlock.proto.rpc import BlockingTransport
from oarlock.serving.asking import Asking, Attempt, Question
from oarlock.serving.fleet import Fleet

# A server that lets nobody in for so long is done without, if there is another one.
CONNECT_SECONDS = 0.25


class Hedged:
    """Asks the servers of ``fleet``."""

    def __init__(self, fleet: Fleet, transport: BlockingTransport) -> None:
        self._fleet = fleet
        self._transport = transport

    def ask(self, questions: dict[int, Question], until: float) -> dict[int, Any]:
        """Return the answer of each part, ``until`` then by the monotonic clock; PSError."""
        poll = select.poll()
        under_way: dict[int, tuple[Asking, Attempt]] = {}
        answers: dict[int, Any] = {}
        askings = [Asking(self._fleet, part, question, until) for part, question in questions.items()]

        def send(asking: Asking, attempt: Attempt | None) -> None:
            """Send what an attempt asks, and what follows it while sending fails."""
            while attempt is not None:
                question = asking.question
                try:
                    sent = self._transport.begin(
                        attempt.replica.address,
                        question.method,
                        question.request,
                        timeout_seconds=attempt.until - time.monotonic(),
                        # Others' answers wait meanwhile.
                        connect_seconds=CONNECT_SECONDS if attempt.hedge or attempt.until < until else math.inf,
                    )
                except PSError as error:
                    attempt = asking.failed(attempt, error)
                    continue
                attempt.sent = sent
                under_way[sent.fileno()] = (asking, attempt)
                poll.register(sent.fileno(), select.POLLIN)
                return

        def drop(attempt: Attempt) -> None:
            if attempt.sent is not None:
                poll.unregister(attempt.sent.fileno())
                del under_way[attempt.sent.fileno()]
                attempt.sent.drop()

        try:
            for asking in askings:
                send(asking, asking.begin())
            while len(answers) < len(questions):
                wake = min(asking.wake for asking in askings if asking.part not in answers)
                for number, _ in poll.poll(math.ceil(1000 * max(0.0, wake - time.monotonic()))):
                    if number not in under_way:
                        # Dropped, since another answer came in the same turn.
                        continue
                    asking, attempt = under_way.pop(number)
                    poll.unregister(number)
                    sent, attempt.sent = attempt.sent, None
                    try:
                        answers[asking.part] = sent.take()
                    except PSError as error:
                        send(asking, asking.failed(attempt, error))
                        continue
                    for loser in asking.answered(attempt):
                        drop(loser)
                for asking in askings:
                    if asking.part not in answers:
                        for attempt in asking.late():
                            drop(attempt)
                            send(asking, asking.failed(attempt, asking.no_answer(attempt)))
                        send(asking, asking.hedge())
            return answers
        finally:
            for asking in askings:
                for attempt in asking.give_up():
                    drop(attempt)
