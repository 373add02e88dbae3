"""`atlasco query` against a query service that answers from a script."""

import argparse
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from atlasco.telemetry.v1 import common_pb2, query_pb2, query_pb2_grpc

from cli import query
from embedded.ports import free_port
from gateway.status import Refusal, attribute_not_found, storage_unavailable, to_status

NOW_US = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z


class Status(grpc.Status):  # type: ignore[misc]
    """A status without a typed reason."""


@dataclass
class Script(query_pb2_grpc.QueryServiceServicer):
    """Answers in order, whatever is asked; a Refusal refuses. Keeps what it was asked."""

    answers: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    # Seconds that the caller gave the last question; of one without a deadline, hundreds of years.
    given_s: float = 0.0
    target: str = ""

    def _answer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.given_s = context.time_remaining() or 0.0
        answer = self.answers.pop(0)
        if isinstance(answer, Refusal):
            context.abort_with_status(to_status(answer))
        if isinstance(answer, grpc.Status):
            context.abort_with_status(answer)
        return answer

    BatchGetLatest = ReadSeries = ListEntities = ListAttributes = Aggregate = _answer

    def ExportSeries(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        yield self._answer(request, context)


@pytest.fixture
def script() -> Iterator[Script]:
    service = Script()
    server = grpc.server(ThreadPoolExecutor(2))
    query_pb2_grpc.add_QueryServiceServicer_to_server(service, server)
    service.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    query.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["query", *arguments])
    return int(parsed.run(parsed))


def at(script: Script) -> list[str]:
    return ["--target", script.target, "--tenant", "käse", "--timeout", "20"]


def test_latest_as_json(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    values = [
        ("a", common_pb2.Value(double_value=math.nan), "NaN"),
        ("b", common_pb2.Value(double_value=-math.inf), "-Infinity"),
        ("c", common_pb2.Value(int64_value=2**63 - 1), 2**63 - 1),
        ("d", common_pb2.Value(bool_value=False), False),
        ("e", common_pb2.Value(string_value="zu \n heiß"), "zu \n heiß"),
    ]
    latest = [query_pb2.LatestValue(attribute=a, value=v, time_us=NOW_US + 1, age_us=2_500_000) for a, v, _ in values]
    script.answers = [query_pb2.BatchGetLatestResponse(latest=[query_pb2.EntityLatest(entity="p", values=latest)])]
    assert run("latest", "p", "p", "--json", *at(script)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"device": "p", "attribute": a, "time": "2026-01-01T00:00:00.000001Z", "age_s": 2.5, "value": value}
        for a, _, value in values
    ]
    assert list(script.asked[0].entities) == ["p"]
    assert script.metadata["atlasco-tenant"] == "k%C3%A4se"
    assert script.metadata["atlasco-service"] == "atlasco-cli"


def test_missing_devices_are_named_after_the_others(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    value = query_pb2.LatestValue(attribute="on", value=common_pb2.Value(bool_value=True))
    script.answers = [
        query_pb2.BatchGetLatestResponse(
            latest=[query_pb2.EntityLatest(entity="here", values=[value])], not_found=["ghost"]
        )
    ]
    assert run("latest", "here", "ghost", *at(script)) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["here", "on", "1970-01-01T00:00:00.000000Z", "0.0", "true"]
    assert err.startswith("atlasco query: ENTITY_NOT_FOUND: the tenant has no device named ghost (")


def pages(*counts: int) -> list[query_pb2.ReadSeriesResponse]:
    made = []
    first = 0
    for place, count in enumerate(counts):
        times = range(first, first + count)
        first += count
        series = query_pb2.Series(entity="p", attribute="a", times_us=times, int64_values=times)
        token = "more" if place + 1 < len(counts) else ""
        made.append(query_pb2.ReadSeriesResponse(series=[series], next_page_token=token))
    return made


def test_a_series_is_paged_through(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.answers = list(pages(3, 4))
    arguments = ["series", "p", "--attribute", "a", "--start", "-1h", "--end", "now", "--json"]
    assert run(*arguments, *at(script)) == 0
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == list(range(7))
    first, second = script.asked
    assert first.end_time_us - first.start_time_us == 3_600_000_000
    assert second.page_token == "more"
    assert second.start_time_us == first.start_time_us


def test_a_limit_ends_the_paging_and_says_so(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.answers = list(pages(3, 4, 5))
    arguments = ["series", "p", "--attribute", "a", "--start", "2026-01-01", "--limit", "4"]
    assert run(*arguments, *at(script)) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "the first 4 rows" in err
    assert len(script.asked) == 2


def test_devices_and_attributes(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.answers = [
        query_pb2.ListEntitiesResponse(
            entities=[query_pb2.Entity(name="p[red]", entity_type="pump", labels={"b": "2", "a": "1"})]
        )
    ]
    assert run("devices", "--type", "pump", "--label", "a=1", "--label", "b=x=y", *at(script)) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["p[red]", "pump", "a=1", "b=2"]
    assert dict(script.asked[0].labels) == {"a": "1", "b": "x=y"}
    script.answers = [
        query_pb2.ListAttributesResponse(
            attributes=[query_pb2.Attribute(name="t", type=common_pb2.ATTRIBUTE_TYPE_DOUBLE, unit="K")]
        )
    ]
    assert run("attributes", "--json", *at(script)) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "double"


def test_nothing_found(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.answers = [query_pb2.ListAttributesResponse()]
    assert run("attributes", *at(script)) == 0
    assert capsys.readouterr() == ("", "nothing found\n")


@pytest.mark.parametrize(
    ("refusal", "code", "text"),
    [
        (attribute_not_found("x"), 1, "ATTRIBUTE_NOT_FOUND: the tenant has no attribute named 'x' ("),
        (storage_unavailable(), 3, "STORAGE_UNAVAILABLE: "),
    ],
    ids=["typed", "database down"],
)
def test_refusals_are_one_line(
    script: Script, capsys: pytest.CaptureFixture[str], refusal: Refusal, code: int, text: str
) -> None:
    script.answers = [refusal]
    assert run("attributes", *at(script)) == code
    err = capsys.readouterr().err
    assert err.startswith(f"atlasco query: {text}")
    assert err.count("\n") == 1


def test_an_export_has_all_the_time_that_its_reader_takes(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    end = query_pb2.ExportSeriesResponse(summary=query_pb2.ExportSummary())
    export = ["export", "p", "--attribute", "a", "--start", "-90d", "--target", script.target, "--tenant", "t"]
    script.answers = [end, end]
    assert run(*export) == 0
    assert script.given_s > 1e9
    assert run(*export, "--timeout", "90") == 0
    assert script.given_s < 300
    capsys.readouterr()


def test_the_clients_own_deadline_is_told_with_a_hint(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    status = Status()
    status.code, status.details, status.trailing_metadata = grpc.StatusCode.DEADLINE_EXCEEDED, "over", ()
    script.answers = [status]
    assert run("attributes", *at(script)) == 1
    assert "--timeout" in capsys.readouterr().err


def test_an_aggregate_goes_by_labels(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.answers = [query_pb2.AggregateResponse()]
    assert run("aggregate", "a", "--start", "-1h", "--label", "site=berlin", *at(script)) == 0
    (asked,) = script.asked
    assert dict(asked.selection.labels) == {"site": "berlin"}
    capsys.readouterr()


def test_no_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("attributes", "--tenant", "t", "--target", f"127.0.0.1:{free_port()}") == 3
    err = capsys.readouterr().err
    assert "no gateway answers at 127.0.0.1:" in err
    assert err.count("\n") == 1


def test_bad_arguments_name_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ATLASCO_TENANT", raising=False)
    series = ["series", "p", "--attribute", "a", "--tenant", "t"]
    for arguments, flag in (
        (["attributes"], "--tenant"),
        (["attributes", "--ca", "x"], "--cert and --key"),
        (["attributes", "--ca", str(tmp_path / "no"), "--cert", "x", "--key", "x"], "--ca"),
        (["attributes", "--tenant", "t", "--limit", "-1"], "--limit"),
        ([*series, "--start", "yesterday"], "--start"),
        (["aggregate", "a", "--tenant", "t", "--start", "-1h", "--time-zone", "Mars/X"], "--bucket"),
        ([*series, "--start", "-1h", "--end", "-1y"], "--end"),
    ):
        assert run(*arguments) == 2, arguments
        assert flag in capsys.readouterr().err
