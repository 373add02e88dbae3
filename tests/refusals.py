"""How a call ended, as a client reads it: decoded in one place for the tests of every service."""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from gateway.status import DOMAIN


@dataclass(frozen=True)
class End:
    """The end of a call; without a `reason` it was not the gateway that refused it."""

    code: str
    reason: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


def end_of(error: grpc.aio.AioRpcError) -> End:
    call: Any = error
    status = rpc_status.from_call(call)
    info, retry, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    for detail in status.details if status is not None else ():
        if detail.Unpack(retry):
            delay = retry.retry_delay.ToTimedelta().total_seconds()
        detail.Unpack(info)
    assert info.domain == (DOMAIN if info.reason else "")
    return End(error.code().name, info.reason, dict(info.metadata), delay)


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, str, dict[str, str]]:
    """(code, reason, metadata) of an error, which must be a refusal of the gateway."""
    end = end_of(error)
    assert end.reason, error
    return end.code, end.reason, end.metadata


async def refused(call: Awaitable[Any]) -> tuple[str, str, dict[str, str]]:
    """The same of a call, which must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)
