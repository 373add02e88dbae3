"""Page tokens: where the next page begins, bound to the request that made them.

A token is a digest and a position, in URL-safe base64. The digest covers the position, the tenant, the method and
every argument but the page's size, the freshness (each page is routed by itself) and the token itself: with another
request, or changed in any bit, it does not fit.

Not a boundary of trust: whatever a token says, the request's own tenant and arguments decide what is read. The key
only keeps clients from building tokens of their own; all gateways of a deployment need the same one.
"""

import base64
import binascii
import hashlib
import hmac
import struct
from copy import deepcopy
from typing import Final, TypeAlias

from atlasco.telemetry.v1 import admin_pb2, query_pb2
from google.protobuf.message import Message

from gateway.status import Reason, Refusal, field_invalid
from storage.reads.model import Position

PagedRequest: TypeAlias = (
    query_pb2.ReadSeriesRequest
    | query_pb2.FindEntitiesRequest
    | query_pb2.ListEntitiesRequest
    | query_pb2.ListAttributesRequest
    | admin_pb2.ListOperationsRequest
)
"""A request that may carry a page token."""

_DIGEST_BYTES: Final = 16
# As in Position: indexes of device and attribute in the request, time, the device's id, readings of the series so far.
_POSITION: Final = struct.Struct(">HHqqI")
# The version of a request's positions, where their format has changed: a gateway of another release, which would
# misread a token, then refuses it.
_FORMATS: Final = {"atlasco.telemetry.v1.ReadSeriesRequest": b"#2"}
# What a client may change from page to page.
_UNBOUND: Final = frozenset({"page_token", "page_size", "freshness"})
_MAX_TOKEN: Final = 1024


class PageTokens:
    """Makes and reads page tokens; `key` is any byte string, the same on every gateway."""

    def __init__(self, key: bytes = b"") -> None:
        # blake2 takes no key of more than 64 bytes; hashed, any length will do.
        self._key = hashlib.blake2b(key, digest_size=32).digest()

    def seal(self, position: bytes, tenant: str, request: PagedRequest) -> str:
        """A token that leads `request` of `tenant` on from `position`."""
        return base64.urlsafe_b64encode(self._digest(position, tenant, request) + position).rstrip(b"=").decode()

    def open(self, tenant: str, request: PagedRequest) -> bytes | None:
        """The position in the request's own token; None when it has none and starts at the beginning.

        Raises:
            Refusal: PAGE_TOKEN_INVALID: damaged, or made for other arguments or another caller.
        """
        token = request.page_token
        if not token:
            return None
        if len(token) > _MAX_TOKEN or not token.isascii():
            raise token_invalid()
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except binascii.Error:
            raise token_invalid() from None
        digest, position = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        # Encoded again, because base64 ignores the spare bits of the last character.
        if not hmac.compare_digest(digest, self._digest(position, tenant, request)) or token != self.seal(
            position, tenant, request
        ):
            raise token_invalid()
        return position

    def _digest(self, position: bytes, tenant: str, request: PagedRequest) -> bytes:
        bare: Message = deepcopy(request)
        for field in _UNBOUND.intersection(bare.DESCRIPTOR.fields_by_name):
            bare.ClearField(field)
        # Deterministic: a map's entries would otherwise come in any order.
        arguments = bare.SerializeToString(deterministic=True)
        name = bare.DESCRIPTOR.full_name
        parts = (name.encode() + _FORMATS.get(name, b""), tenant.encode(), arguments, position)
        digest = hashlib.blake2b(key=self._key, digest_size=_DIGEST_BYTES)
        for part in parts:
            # With its length, so that no two splits of the same bytes are the same.
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()


def token_invalid() -> Refusal:
    """The refusal of a token that does not fit its request."""
    return field_invalid(
        "page_token", "is not one that this request returned; start again without it", Reason.PAGE_TOKEN_INVALID
    )


def pack_position(position: Position) -> bytes:
    """A position in a series as bytes."""
    return _POSITION.pack(position.entity, position.attribute, position.time_us, position.entity_id, position.taken)


def unpack_position(data: bytes) -> Position:
    """The inverse of `pack_position`, for bytes that a digest vouches for."""
    entity, attribute, time_us, entity_id, taken = _POSITION.unpack(data)
    return Position(entity, attribute, time_us, entity_id, taken)
