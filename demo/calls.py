"""What the demo asks of its own gateway, over the public API, and what the gateway says when it refuses."""

import time
from typing import Any

import grpc
from atlasco.telemetry.v1 import admin_pb2_grpc, ingest_pb2_grpc, query_pb2_grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from device.connection import DevelopmentIdentity

_TIMEOUT_S = 5.0


class Refused(Exception):
    """The gateway did not answer, or not with what was asked; `reason` is its typed reason, or the gRPC status."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason


class Calls:
    """Calls as a service of one tenant, each with a deadline of its own. The method follows from the request's type."""

    def __init__(self, channel: grpc.aio.Channel, tenant: str) -> None:
        self._metadata = DevelopmentIdentity(tenant, service="demo").metadata()
        self._stubs = (
            query_pb2_grpc.QueryServiceStub(channel),
            admin_pb2_grpc.AdminServiceStub(channel),
            ingest_pb2_grpc.IngestServiceStub(channel),
        )

    async def __call__(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            Refused: there is none.
        """
        name = type(request).__name__.removesuffix("Request")
        method = next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))
        try:
            return await method(request, metadata=self._metadata, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Refused(_reason(error), error.details() or "") from error


def _reason(error: grpc.aio.AioRpcError) -> str:
    # It takes what the synchronous API raises; what it needs of it, this has too.
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return error.code().name


def now_us() -> int:
    """This machine's clock in microseconds."""
    return time.time_ns() // 1_000
