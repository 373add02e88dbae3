"""A warehouse as one question sees it."""

from collections.abc import Sequence
from typing import Any

from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import EVERYTHING, Answer, Completeness, Dialect, Scope, Warehouse


class WarehouseReader:
    """Runs the statements of one question; they end when it is given up."""

    def __init__(self, warehouse: Warehouse, cancellation: Cancellation | None = None) -> None:
        self._warehouse = warehouse
        self._cancellation = cancellation

    def query(self, statement: str, parameters: Sequence[Any] = (), *, scope: Scope = EVERYTHING) -> Answer:
        """See `Warehouse.query`."""
        return self._warehouse.query(statement, parameters, scope=scope, cancellation=self._cancellation)

    def completeness(self, scope: Scope) -> Completeness:
        """See `Warehouse.completeness`."""
        return self._warehouse.completeness(scope)

    @property
    def dialect(self) -> Dialect:
        """See `Warehouse.dialect`."""
        return self._warehouse.dialect
