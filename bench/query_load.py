"""An open-loop load of queries, a process of its own: `python -m bench.query_load`, and the side that starts it.

Requests arrive at fixed times, whether or not earlier ones were answered, and a latency counts from the time a request
was to arrive: a gateway that stalls is charged for everything that would have come meanwhile, and so is a client that
is late itself (`late_ms` tells). Requests are bytes made beforehand and answers stay bytes, so that the client takes as
little of the machine as it can.

The process takes one JSON line per span on its standard input and answers with one. It ends with its input.
"""

import asyncio
import json
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from bench.dialogue import Dialogue
from bench.errors import BenchmarkVoid
from bench.workload import TENANT

METADATA = (("atlasco-tenant", TENANT), ("atlasco-service", "bench"))
# Before the first request of a span is due.
_LEAD_S = 0.05
_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Span:
    """What became of one span of load. Milliseconds."""

    # Of the requests that were answered, from when each was due.
    latencies_ms: Sequence[float]
    # How late the client itself sent each request.
    late_ms: Sequence[float]
    # By status code, those that were not answered.
    failed: dict[str, int]
    # From when the first was due to the last answer.
    seconds: float
    # Of the first requests, for whoever wants to look.
    answers: Sequence[bytes]


# -- the process ------------------------------------------------------------------------------------------------------


async def _span(call: Any, requests: Sequence[bytes], rate: float, keep: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    late: list[float] = []
    failed: Counter[str] = Counter()
    answers: dict[int, bytes] = {}
    tasks: list[asyncio.Task[None]] = []
    started = time.perf_counter() + _LEAD_S
    all_sent = asyncio.Event()

    async def ask(place: int, due: float) -> None:
        late.append((time.perf_counter() - due) * 1000)
        try:
            answer = await call(requests[place], metadata=METADATA, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            failed[error.code().name] += 1
            return
        latencies.append((time.perf_counter() - due) * 1000)
        if place < keep:
            answers[place] = answer

    def send(place: int, due: float) -> None:
        tasks.append(loop.create_task(ask(place, due)))
        if place == len(requests) - 1:
            all_sent.set()

    def pace() -> None:
        # A thread, because a loop's own timers are rounded up to a millisecond.
        for place in range(len(requests)):
            due = started + place / rate
            left = due - time.perf_counter()
            if left > 0:
                time.sleep(left)
            loop.call_soon_threadsafe(send, place, due)

    thread = threading.Thread(target=pace, daemon=True)
    thread.start()
    await all_sent.wait()
    await asyncio.gather(*tasks)
    # The last request's own interval is part of the span.
    seconds = max(time.perf_counter() - started, len(requests) / rate)
    thread.join()
    return {
        "latencies_ms": latencies,
        "late_ms": late,
        "failed": failed,
        "seconds": seconds,
        "answers": [b64encode(answers[place]).decode() for place in sorted(answers)],
    }


async def _main() -> None:
    channels: dict[str, grpc.aio.Channel] = {}
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            target = asked["target"]
            if target not in channels:
                channels[target] = grpc.aio.insecure_channel(target)
            call: Any = channels[target].unary_unary(asked["method"])
            requests = [b64decode(request) for request in asked["requests"]]
            print(json.dumps(await _span(call, requests, asked["rate"], asked["keep"])), flush=True)
    finally:
        for channel in channels.values():
            await channel.close()


# -- the side that starts it ------------------------------------------------------------------------------------------


class QueryLoad(Dialogue):
    """A process that asks; ended when the block is left."""

    def __init__(self) -> None:
        super().__init__("bench.query_load")

    def span(self, target: str, method: str, requests: Sequence[bytes], rate: float, *, keep: int = 3) -> Span:
        """Send these requests, `rate` a second, and wait for every answer; the first `keep` answers are kept.

        Raises BenchmarkVoid when the process has ended.
        """
        self.tell(
            {
                "target": target,
                "method": f"/atlasco.telemetry.v1.QueryService/{method}",
                "requests": [b64encode(request).decode() for request in requests],
                "rate": rate,
                "keep": keep,
            }
        )
        told = self.hear()
        if told is None:
            raise BenchmarkVoid("the process that sends queries ended")
        told["answers"] = [b64decode(answer) for answer in told["answers"]]
        return Span(**told)


if __name__ == "__main__":
    asyncio.run(_main())
