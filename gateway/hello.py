"""The hello of a device stream: checked, and its dictionary resolved."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from atlasco.telemetry.v1 import ingest_pb2

from gateway.aliases import MAX_ALIAS, AliasProblem, AliasTable, define, name_problem
from gateway.auth import Identity, IdentityKind
from gateway.status import Reason, Refusal, device_mismatch, protocol_unsupported
from storage.model import Reason as RejectionReason
from storage.registry import Registry, Tenant

PROTOCOL_VERSION = 1
MAX_LABELS = 32
MAX_LABEL_BYTES = 128

# Devices of one firmware share a dictionary; resolved ones are kept a while for the next device. Not longer, because
# an operator may change what is kept of an attribute, or raise a quota.
_CACHED = 512
_CACHED_S = 30.0
# In all of them together: ten thousand aliases are megabytes, and a client can send another list every time.
_CACHED_ALIASES = 100_000


def device_name(identity: Identity, named: str, field: str) -> str:
    """The device a request is for: the one named, as far as the caller may name it, or the caller itself.

    Raises:
        Refusal: DEVICE_MISMATCH, or HELLO_INVALID when a service names none or the name is not valid.
    """
    name = named or (identity.name if identity.kind is IdentityKind.DEVICE else "")
    problem = name_problem(name)
    if problem is not None:
        raise Refusal(Reason.HELLO_INVALID, f"{field}: {problem}", field=field)
    if not identity.may_name(name):
        raise device_mismatch(name)
    return name


def unregistered(device: str) -> str:
    """Why a device that was named has no id, and gets none."""
    return (
        f"device {device!r} is not registered: the tenant does not register devices on first sight, "
        "or the device of that name is being deleted, and then it can be registered anew soon"
    )


def check_hello(hello: ingest_pb2.Hello) -> None:
    """Check the bounds of a hello.

    Raises:
        Refusal: PROTOCOL_UNSUPPORTED or HELLO_INVALID.
    """
    if hello.protocol_version != PROTOCOL_VERSION:
        raise protocol_unsupported(hello.protocol_version, str(PROTOCOL_VERSION))
    if len(hello.session_id) != 16:
        raise _invalid("session_id", f"has {len(hello.session_id)} bytes, not 16")
    if len(hello.dictionary.id) not in {0, 16}:
        raise _invalid("dictionary.id", f"has {len(hello.dictionary.id)} bytes, not 0 or 16")
    if len(hello.dictionary.aliases) > MAX_ALIAS:
        raise _invalid("dictionary.aliases", f"has {len(hello.dictionary.aliases)} of them, and there are {MAX_ALIAS}")
    if len(hello.client.encode()) > MAX_LABEL_BYTES:
        raise _invalid("client", f"has more than {MAX_LABEL_BYTES} bytes")
    check_description(hello.entity_type, dict(hello.labels))


def check_description(entity_type: str, labels: dict[str, str]) -> None:
    """Check the type and labels that a device gives itself.

    Raises:
        Refusal: HELLO_INVALID.
    """
    if entity_type and (problem := name_problem(entity_type)) is not None:
        raise _invalid("entity_type", problem)
    if len(labels) > MAX_LABELS:
        raise _invalid("labels", f"has {len(labels)} entries, at most {MAX_LABELS} are allowed")
    for key, value in labels.items():
        if (problem := name_problem(key)) is not None or (value and (problem := name_problem(value)) is not None):
            raise _invalid("labels", f"{key!r}: {problem}")


def _invalid(field: str, problem: str) -> Refusal:
    return Refusal(Reason.HELLO_INVALID, f"{field} {problem}", field=field)


@dataclass(frozen=True, slots=True)
class ResolvedDictionary:
    """What became of a hello's dictionary."""

    table: AliasTable
    problems: list[AliasProblem]
    status: ingest_pb2.Welcome.DictionaryStatus.ValueType


class Dictionaries:
    """Resolves the dictionaries of hellos, those of the same content once."""

    def __init__(self, registry: Registry, *, most_aliases: int, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._most_aliases = most_aliases
        self._clock = clock
        self._cache: OrderedDict[tuple[int, bytes], tuple[float, ResolvedDictionary]] = OrderedDict()
        self._cached_aliases = 0

    async def resolve(self, tenant: Tenant, dictionary: ingest_pb2.Dictionary) -> ResolvedDictionary:
        """The alias table of a dictionary sent whole, or by an id that is known here.

        Raises:
            StorageError: the registry could not be asked.
        """
        key = (tenant.tenant_id, hashlib.sha256(dictionary.SerializeToString(deterministic=True)).digest())
        cached = self._cache.get(key)
        if cached is not None and self._clock() - cached[0] < _CACHED_S:
            self._cache.move_to_end(key)
            return cached[1]
        resolved = await self._resolve(tenant, dictionary)
        if resolved.status != ingest_pb2.Welcome.DICTIONARY_STATUS_UNKNOWN:
            self._forget(key)
            self._cache[key] = (self._clock(), resolved)
            self._cached_aliases += len(resolved.table.reason) + len(resolved.problems)
            while len(self._cache) > _CACHED or self._cached_aliases > _CACHED_ALIASES:
                self._forget(next(iter(self._cache)))
        return resolved

    def _forget(self, key: tuple[int, bytes]) -> None:
        forgotten = self._cache.pop(key, None)
        if forgotten is not None:
            self._cached_aliases -= len(forgotten[1].table.reason) + len(forgotten[1].problems)

    async def _resolve(self, tenant: Tenant, dictionary: ingest_pb2.Dictionary) -> ResolvedDictionary:
        aliases = dictionary.aliases
        if not dictionary.id and not aliases:
            return ResolvedDictionary(AliasTable(), [], ingest_pb2.Welcome.DICTIONARY_STATUS_UNSPECIFIED)
        if dictionary.id:
            dictionary_id = UUID(bytes=dictionary.id)
            if not aliases:
                stored = await self._registry.find_dictionary(tenant, dictionary_id)
                if stored is None:
                    return ResolvedDictionary(AliasTable(), [], ingest_pb2.Welcome.DICTIONARY_STATUS_UNKNOWN)
                aliases = ingest_pb2.Dictionary.FromString(stored).aliases
            else:
                sent = ingest_pb2.Dictionary(aliases=aliases).SerializeToString(deterministic=True)
                if await self._registry.store_dictionary(tenant, dictionary_id, sent) != sent:
                    return _conflict(dictionary)
        table, problems = await define(self._registry, tenant, AliasTable(), aliases, most_aliases=self._most_aliases)
        return ResolvedDictionary(table, problems, ingest_pb2.Welcome.DICTIONARY_STATUS_DEFINED)


def _conflict(dictionary: ingest_pb2.Dictionary) -> ResolvedDictionary:
    text = f"dictionary {dictionary.id.hex()} names another list of aliases; send the list under a new id"
    problems = [
        AliasProblem(definition.alias, RejectionReason.DICTIONARY_CONFLICT, text) for definition in dictionary.aliases
    ]
    table = AliasTable().with_aliases({}, {}, {problem.alias: problem for problem in problems})
    return ResolvedDictionary(table, problems, ingest_pb2.Welcome.DICTIONARY_STATUS_DEFINED)
