"""The query side at work: questions at every tier, through the gateway, and whether the answers are what they say.

Half of the questions are about the fleet, as a dashboard or a report would ask them. The other half are about a probe,
a device of a tenant of its own that writes stamps: what must be in an answer about it is known, so its answers are
checked, by `Witness`.
"""

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from atlasco.telemetry.v1 import common_pb2, ingest_pb2, query_pb2

from demo.calls import Calls, Refused, now_us
from demo.declarations import FREEZER, declare_for_fleet, declare_for_stamps
from demo.witness import Shown, Witness
from device.connection import open_channel
from embedded.errors import ProcessFailed
from storage.times import MINUTE_US

Tier: TypeAlias = Literal["critical", "dashboard", "report", "analytics"]
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)

PROBE_TENANT: Final = "demo-probe"
STAMP: Final = "stamp"

_STAMP_EVERY_S = 0.25
_ROUND_EVERY_S = 1.0
# Rounds between two analytical ones: opening the warehouse's files is the dearest of all.
_ANALYTICS_EVERY = 3
_KNOWN_DEADLINE_S = 30.0
_POLL_S = 0.1
# Bounds on what a question costs, however long the demo runs and however large the fleet is.
_FREEZERS = 10
_STAMPS = 1_200
_FLEET_RANGE_US = 15 * MINUTE_US
_MINUTES = query_pb2.Bucket(unit=query_pb2.BUCKET_UNIT_MINUTE)


@dataclass(frozen=True, slots=True)
class TierFigures:
    """How one tier did: answers by source, and the worst of the last round."""

    answers: Mapping[str, int]
    # Of the last round of questions; None before the first answer.
    staleness_s: float | None
    took_s: float | None


@dataclass(frozen=True, slots=True)
class QueryFigures:
    """A snapshot. `unanswered`: questions that were refused, by tier and reason; `problem`: the last trouble."""

    tiers: Mapping[Tier, TierFigures]
    unanswered: Mapping[Tier, Mapping[str, int]]
    checked: int
    dishonest: int
    problem: str


class Questions:
    """Asks for as long as `run` runs, and once more with `ask_once`; the figures stay readable.

    `progress` is told what was declared, or why it was not.
    """

    def __init__(self, target: str, tenant: str, *, progress: Callable[[str], None]) -> None:
        self._target = target
        self._tenant = tenant
        self._progress = progress
        self._witness = Witness()
        self._probe = f"probe-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"
        self._answers: dict[Tier, Counter[str]] = {tier: Counter() for tier in TIERS}
        self._unanswered: dict[Tier, Counter[str]] = {tier: Counter() for tier in TIERS}
        self._last: dict[Tier, tuple[float, float]] = {}
        self._bounds_us: dict[Tier, int] = {}
        self._checked = self._dishonest = 0
        self._problem = ""
        # Empty until every source may be expected to know them.
        self._freezers: list[str] = []

    def figures(self) -> QueryFigures:
        """A snapshot."""
        tiers = {tier: TierFigures(dict(self._answers[tier]), *self._last.get(tier, (None, None))) for tier in TIERS}
        unanswered = {tier: dict(found) for tier, found in self._unanswered.items() if found}
        return QueryFigures(tiers, unanswered, self._checked, self._dishonest, self._problem)

    async def run(self) -> None:
        """Write stamps, declare, and ask, until cancelled.

        Raises:
            ProcessFailed: an answer that may be half a minute old still does not know the probe after that time.
        """
        async with open_channel(self._target) as channel:
            probe, fleet = Calls(channel, PROBE_TENANT), Calls(channel, self._tenant)
            await self._write(probe)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_writing(probe))
                tasks.create_task(self._declared(declare_for_stamps(probe, STAMP)))
                tasks.create_task(self._meet_fleet(fleet))
                await self._known(probe, [self._probe])
                for tier in (await probe(query_pb2.GetFreshnessRequest())).tiers:
                    self._bounds_us[_name(tier.tier)] = tier.max_staleness_us
                for number in itertools.count():
                    analytics = number % _ANALYTICS_EVERY == 0
                    work = self._round(probe, fleet, all_tiers=analytics)
                    await asyncio.gather(work, asyncio.sleep(_ROUND_EVERY_S))

    async def ask_once(self) -> None:
        """One more round, for the end: by now every source holds everything. Without effect unless `run` ever asked."""
        if self._bounds_us:
            async with open_channel(self._target) as channel:
                await self._round(Calls(channel, PROBE_TENANT), Calls(channel, self._tenant))

    # -- the probe

    async def _keep_writing(self, call: Calls) -> None:
        while True:
            await asyncio.gather(self._write(call), asyncio.sleep(_STAMP_EVERY_S))

    async def _write(self, call: Calls) -> None:
        """Write the next stamp, again and again until it is acked: it then counts as committed by that time."""
        stamp = self._witness.next_stamp(now_us())
        request = ingest_pb2.WriteBatchRequest(
            request_id=secrets.token_bytes(16),
            aliases=[ingest_pb2.AliasDefinition(alias=1, name=STAMP, type=common_pb2.ATTRIBUTE_TYPE_INT64, unit="us")],
            devices=[
                ingest_pb2.DeviceReadings(
                    device_id=self._probe,
                    entity_type="probe",
                    readings=ingest_pb2.Readings(
                        base_time_us=stamp, int64s=ingest_pb2.Int64Column(aliases=[1], values=[stamp])
                    ),
                )
            ],
        )
        while True:
            try:
                answer = await call(request)
                if answer.rejections:
                    raise ProcessFailed(f"the gateway rejects the probe's reading: {answer.rejections[0].text}")
                self._witness.note_acked()
                # The ack has no time; the primary's clock, asked for after it, is later for certain.
                clock = await call(query_pb2.GetFreshnessRequest())
            except Refused as refused:
                self._note_trouble(f"the probe writes: {refused}")
                await asyncio.sleep(_STAMP_EVERY_S)
                continue
            if clock.time_us:  # 0: the gateway has not measured it yet
                self._witness.note_committed(clock.time_us + clock.uncertainty_us)
                return
            await asyncio.sleep(_POLL_S)

    async def _known(self, call: Calls, devices: list[str]) -> None:
        """Wait until answers that may be as old as a report know these devices: it is no lie not to, at first."""
        request = query_pb2.BatchGetLatestRequest(
            entities=devices, freshness=query_pb2.Freshness(tier=query_pb2.TIER_REPORT)
        )
        deadline = time.monotonic() + _KNOWN_DEADLINE_S
        while True:
            try:
                problem = ", ".join((await call(request)).not_found)
            except Refused as refused:
                problem = str(refused)
            if not problem:
                return
            if time.monotonic() > deadline:
                raise ProcessFailed(f"not in an answer of tier REPORT after {_KNOWN_DEADLINE_S:.0f} s: {problem}")
            await asyncio.sleep(_POLL_S)

    # -- the fleet

    async def _meet_fleet(self, call: Calls) -> None:
        await self._declared(declare_for_fleet(call, self._progress))
        request = query_pb2.ListEntitiesRequest(entity_type=FREEZER, page_size=_FREEZERS)
        while True:
            try:
                names = [entity.name for entity in (await call(request)).entities]
            except Refused as refused:
                self._note_trouble(f"listing devices: {refused}")
                names = []
            if names:
                await self._known(call, names)
                self._freezers = names
                return
            await asyncio.sleep(_POLL_S)

    async def _declared(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Refused as refused:
            self._note_trouble(f"not declared: {refused}")
            self._progress(f"not declared: {refused}")

    # -- asking

    async def _round(self, probe: Calls, fleet: Calls, *, all_tiers: bool = True) -> None:
        """Every tier, each question beside the others."""
        tiers = [tier for tier in TIERS if all_tiers or tier != "analytics"]
        asked = [(tier, self._ask_probe(probe, tier)) for tier in tiers]
        if self._freezers:
            asked += [(tier, self._ask_fleet(fleet, tier)) for tier in tiers]
        found = await asyncio.gather(*(self._answered(tier, question) for tier, question in asked))
        for tier in tiers:
            told = [one for (of, _), one in zip(asked, found, strict=True) if of == tier and one is not None]
            if told:
                self._last[tier] = (max(stale for stale, _ in told), max(took for _, took in told))

    async def _answered(self, tier: Tier, question: Awaitable[query_pb2.Provenance]) -> tuple[float, float] | None:
        """(staleness, duration) of an answer in seconds, after counting it; None: there was none."""
        began = time.monotonic()
        try:
            provenance = await question
        except Refused as refused:
            self._unanswered[tier][refused.reason] += 1
            self._note_trouble(f"{tier}: {refused}")
            return None
        source = query_pb2.Provenance.Source.Name(provenance.source).removeprefix("SOURCE_").lower()
        self._answers[tier][source] += 1
        return provenance.staleness_us / 1e6, time.monotonic() - began

    async def _ask_probe(self, call: Calls, tier: Tier) -> query_pb2.Provenance:
        acked_before = self._witness.acked
        freshness = _freshness(tier)
        since_us = self._witness.since(_STAMPS)
        # To the end of the next minute: rollups serve whole minutes only.
        until_us = (now_us() // MINUTE_US + 2) * MINUTE_US
        request: Any
        match tier:
            case "critical" | "dashboard":
                request = query_pb2.GetLatestRequest(entity=self._probe, freshness=freshness)
            case "report":
                request = query_pb2.AggregateRequest(
                    selection=query_pb2.Selection(entities=[self._probe]),
                    attributes=[STAMP],
                    start_time_us=since_us,
                    end_time_us=until_us,
                    bucket=_MINUTES,
                    functions=[query_pb2.AGGREGATE_FUNCTION_COUNT, query_pb2.AGGREGATE_FUNCTION_MAX],
                    freshness=freshness,
                )
            case "analytics":
                request = query_pb2.ReadSeriesRequest(
                    entities=[self._probe],
                    attributes=[STAMP],
                    start_time_us=since_us,
                    end_time_us=until_us,
                    # All of them: a second page would be another answer.
                    page_size=2 * _STAMPS,
                    freshness=freshness,
                )
        answer = await call(request)
        self._checked += 1
        shown = _shown(answer, since_us)
        problem = self._witness.judge(self._bounds_us[tier], answer.provenance, shown, acked_before)
        if problem:
            self._dishonest += 1
            self._note_trouble(f"{tier}, dishonest: {problem}")
        provenance: query_pb2.Provenance = answer.provenance
        return provenance

    async def _ask_fleet(self, call: Calls, tier: Tier) -> query_pb2.Provenance:
        answer = await call(self._fleet_question(tier))
        provenance: query_pb2.Provenance = answer.provenance
        return provenance

    def _fleet_question(self, tier: Tier) -> Any:
        freshness = _freshness(tier)
        match tier:
            case "critical":
                return query_pb2.GetLatestRequest(entity=self._freezers[0], freshness=freshness)
            case "dashboard":
                return query_pb2.BatchGetLatestRequest(entities=self._freezers, freshness=freshness)
            case "report":
                return query_pb2.FindEntitiesRequest(
                    filter=f'type = "{FREEZER}" AND temperature > -15', attributes=["status"], freshness=freshness
                )
            case "analytics":
                now = now_us()
                return query_pb2.AggregateRequest(
                    selection=query_pb2.Selection(entities=self._freezers),
                    attributes=["temperature"],
                    start_time_us=now - _FLEET_RANGE_US,
                    end_time_us=now,
                    bucket=_MINUTES,
                    functions=[query_pb2.AGGREGATE_FUNCTION_MEAN, query_pb2.AGGREGATE_FUNCTION_MAX],
                    freshness=freshness,
                )

    def _note_trouble(self, text: str) -> None:
        self._problem = text


def _freshness(tier: Tier) -> query_pb2.Freshness:
    return query_pb2.Freshness(tier=query_pb2.Tier.Value(f"TIER_{tier.upper()}"))


def _name(tier: "query_pb2.Tier.ValueType") -> Tier:
    name = query_pb2.Tier.Name(tier).removeprefix("TIER_").lower()
    return next(known for known in TIERS if known == name)


def _shown(answer: Any, since_us: int) -> Shown:
    """The stamps in an answer about the probe, whatever was asked."""
    if isinstance(answer, query_pb2.GetLatestResponse):
        return Shown(max((one.value.int64_value for one in answer.latest.values), default=0))
    if isinstance(answer, query_pb2.ReadSeriesResponse):
        stamps = [value for series in answer.series for value in series.int64_values]
        return Shown(max(stamps, default=0), len(stamps), since_us)
    columns = [column for series in answer.series for column in series.columns]
    counts = [c.int64_values for c in columns if c.function == query_pb2.AGGREGATE_FUNCTION_COUNT]
    newest = [c.int64_values for c in columns if c.function == query_pb2.AGGREGATE_FUNCTION_MAX]
    return Shown(max((max(n) for n in newest if n), default=0), sum(map(sum, counts)), since_us)
