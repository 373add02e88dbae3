"""A warehouse as one question sees it."""

from collections.abc import Sequence
from typing import Any

from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import EVERYTHING, Answer, Scope, Warehouse


class WarehouseReader:
    """Runs the statements of one question; they end when it is given up."""

    def __init__(self, warehouse: Warehouse, cancellation: Cancellation | None = None) -> None:
        self._warehouse = warehouse
        self._cancellation = cancellation

    def query(self, statement: str, parameters: Sequence[Any] = (), *, scope: Scope = EVERYTHING) -> Answer:
        """See `Warehouse.query`."""
        return self._warehouse.query(statement, parameters, scope=scope, cancellation=self._cancellation)

    def microseconds(self, timestamp: str) -> str:
        """See `Warehouse.microseconds`."""
        return self._warehouse.microseconds(timestamp)
