"""Errors on the wire: every reason the .proto files name, with the code they give it, within
transports' bounds.
"""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from gateway import status
from gateway.auth import Unauthenticated
from gateway.status import CODES, DOMAIN, Reason, Refusal, refusal_of, to_status
from storage.errors import QueryCanceled, StorageDefect, StorageUnavailable, TransactionConflict
from tests.refusals import End, end_of

PROTOS = Path(__file__).parents[2] / "protos" / "atlasco" / "telemetry" / "v1"
CODE_NAMES = "|".join(code.name for code in grpc.StatusCode)
WORD = re.compile(r"\b[A-Z][A-Z_]{3,}\b")


def reasons_in_protos() -> list[tuple[str, str]]:
    """(code, reason) of every line or sentence of the error tables in the comments."""
    found: list[tuple[str, str]] = []
    ingest = (PROTOS / "ingest.proto").read_text()
    table = ingest[ingest.index("HOW A STREAM ENDS") : ingest.index("// KEEPALIVE")]
    for line in table.splitlines()[1:]:
        match = re.match(rf"//\s+({CODE_NAMES})\s+([A-Z_]+)\s", line)
        if match:
            found.append((match[1], match[2]))
    unary = ingest[ingest.index("// Errors: ") : ingest.index("rpc WriteBatch")]
    query = (PROTOS / "query.proto").read_text()
    errors = query[query.index("// Errors carry") : query.index("// Pages follow")].split("\n", 1)[1]
    for text in (unary.replace("// Errors:", "//"), errors):
        code = ""
        for word in WORD.findall(text):
            if word in grpc.StatusCode.__members__:
                code = word
            elif code:
                found.append((code, word))
    return found


@pytest.mark.parametrize(("code", "reason"), reasons_in_protos(), ids=str)
def test_a_reason_of_the_protocol_has_its_code(code: str, reason: str) -> None:
    assert CODES[Reason(reason)].name == code


def test_the_tables_of_the_protocol_were_found() -> None:
    names = {reason for _, reason in reasons_in_protos()}
    assert {"HELLO_TIMEOUT", "UNCONFIRMED_REJECTIONS", "REQUEST_ID_REUSED", "QUERY_CONCURRENCY"} <= names
    assert len(names) >= 25


def test_every_reason_has_a_code() -> None:
    assert set(CODES) == set(Reason)


def unpack(refusal: Refusal) -> tuple[error_details_pb2.ErrorInfo, dict[str, object]]:
    trailers = dict(to_status(refusal).trailing_metadata)
    message = status.status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    kinds = {
        each.DESCRIPTOR.full_name: each
        for each in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.RetryInfo,
            error_details_pb2.BadRequest,
        )
    }
    details: dict[str, object] = {}
    for packed in message.details:
        name = packed.type_url.rpartition("/")[2]
        unpacked = kinds[name]()
        packed.Unpack(unpacked)
        details[name.rpartition(".")[2]] = unpacked
    info = details["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return info, details


@pytest.mark.parametrize(
    ("refusal", "code", "metadata", "details"),
    [
        pytest.param(status.sequence_gap(5, 9), "OUT_OF_RANGE", {"expected": "5"}, {"ErrorInfo"}, id="sequence-gap"),
        pytest.param(
            status.protocol_unsupported(2, "1"),
            "FAILED_PRECONDITION",
            {"supported": "1"},
            {"ErrorInfo"},
            id="protocol",
        ),
        pytest.param(
            status.field_invalid("page_size", "is negative"),
            "INVALID_ARGUMENT",
            {"field": "page_size"},
            {"ErrorInfo", "BadRequest"},
            id="field",
        ),
        pytest.param(
            status.overloaded("full", 0.25), "RESOURCE_EXHAUSTED", {}, {"ErrorInfo", "RetryInfo"}, id="overload"
        ),
        pytest.param(
            Refusal(Reason.QUERY_CONCURRENCY, "full", metadata={"limit": "8"}, retry_after_s=1),
            "RESOURCE_EXHAUSTED",
            {"limit": "8"},
            {"ErrorInfo", "RetryInfo"},
            id="concurrency",
        ),
        pytest.param(status.entity_not_found("pump"), "NOT_FOUND", {"entity": "pump"}, {"ErrorInfo"}, id="entity"),
        pytest.param(status.attribute_not_found("t"), "NOT_FOUND", {"attribute": "t"}, {"ErrorInfo"}, id="attribute"),
        pytest.param(
            status.latest_not_kept("t"), "FAILED_PRECONDITION", {"attribute": "t"}, {"ErrorInfo"}, id="latest"
        ),
        pytest.param(status.stream_superseded(), "ABORTED", {}, {"ErrorInfo"}, id="superseded"),
        pytest.param(status.device_mismatch("x"), "PERMISSION_DENIED", {}, {"ErrorInfo"}, id="mismatch"),
    ],
)
def test_a_refusal_carries_what_programs_need(
    refusal: Refusal, code: str, metadata: dict[str, str], details: set[str]
) -> None:
    info, found = unpack(refusal)
    assert to_status(refusal).code.name == code == refusal.code.name
    assert (info.reason, info.domain, dict(info.metadata)) == (refusal.reason, DOMAIN, metadata)
    assert set(found) == details


@pytest.mark.parametrize(
    ("error", "reason", "retry"),
    [
        pytest.param(StorageUnavailable("host db-7 refused"), Reason.STORAGE_UNAVAILABLE, True, id="storage"),
        pytest.param(TransactionConflict("deadlock"), Reason.STORAGE_UNAVAILABLE, True, id="conflict"),
        pytest.param(QueryCanceled("timeout"), Reason.QUERY_DEADLINE, False, id="canceled"),
        pytest.param(StorageDefect("secret sql"), Reason.INTERNAL, False, id="defect"),
        pytest.param(ZeroDivisionError("secret"), Reason.INTERNAL, False, id="bug"),
        pytest.param(Unauthenticated(Reason.IDENTITY_MISSING, "who"), Reason.IDENTITY_MISSING, False, id="who"),
    ],
)
def test_an_error_becomes_a_refusal_without_its_text(error: Exception, reason: Reason, retry: bool) -> None:
    refusal = refusal_of(error)
    assert refusal.reason is reason
    assert (refusal.retry_after_s is not None) is retry
    for word in ("secret", "db-7"):
        assert word not in refusal.text


@given(st.text(st.characters(), max_size=3000), st.text(st.characters(), max_size=3000))
def test_any_text_fits_in_the_trailers(text: str, value: str) -> None:
    made = to_status(Refusal(Reason.FIELD_INVALID, text, metadata={"entity": value}, field=value))
    assert len(made.details.encode()) <= status.MAX_TEXT
    assert sum(len(each) for _, each in made.trailing_metadata) < 4096


def test_metadata_cannot_be_changed() -> None:
    given_metadata = {"expected": "1"}
    refusal = Refusal(Reason.SEQUENCE_GAP, "gap", metadata=given_metadata)
    given_metadata["expected"] = "2"
    assert refusal.metadata == {"expected": "1"}
    with pytest.raises(TypeError):
        refusal.metadata["expected"] = "3"  # type: ignore[index]


class Failing(grpc.GenericRpcHandler):
    """Serves /test/Fail, which aborts with whatever it was given."""

    failure: Exception = Refusal(Reason.INTERNAL, "unset")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def fail(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            await status.abort(context, self.failure)

        return grpc.unary_unary_rpc_method_handler(fail)


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    handler = Failing()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield handler, channel
    await server.stop(None)


async def test_a_client_reads_the_rich_status(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    handler, channel = failing
    handler.failure = status.overloaded("the queue of Größe 7 is full", 1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test/Fail")(b"")
    assert caught.value.details() == "the queue of Größe 7 is full"
    assert end_of(caught.value) == End("RESOURCE_EXHAUSTED", "OVERLOADED", retry_after_s=1.5)


async def test_a_bug_is_logged_and_not_told(
    failing: tuple[Failing, grpc.aio.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    handler, channel = failing
    handler.failure = ValueError("row of another tenant")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test/Fail")(b"")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "tenant" not in (caught.value.details() or "")
    assert "row of another tenant" in caplog.text
