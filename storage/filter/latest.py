"""Conditions on the latest values of devices, as SQL that looks at them device by device."""

from typing import Any

from psycopg import sql

from storage.filter.bind import Bound, attribute_names, bind, compared_attributes
from storage.filter.compile import compile_filter
from storage.filter.syntax import parse
from storage.model import Attribute
from storage.reads.series import attributes_by_name
from storage.reads.session import ReadSession
from storage.statements import statements


async def bound_filter(session: ReadSession, text: str) -> Bound:
    """A filter, typed by the tenant's attributes.

    Raises:
        FilterInvalid: it is no filter, or compares what cannot be compared.
        AttributeNotFound: the tenant does not have one of the attributes.
        LatestNotKept: one of them opted out of latest values.
    """
    expression = parse(text)
    names = attribute_names(expression)
    return bind(expression, await attributes_by_name(session, names) if names else {})


def latest_condition(bound: Bound) -> tuple[sql.Composable, sql.Composable, dict[str, Any]]:
    """Joins, condition and parameters for a statement over `entities e` that names %(oldest)s."""
    compiled = compile_filter(bound, _LatestColumns())
    joins = sql.SQL("\n").join(
        sql.SQL(statements("search.sql")["latest_value"]).format(
            column=sql.Identifier(f"{attribute.type}_value"),
            attribute=sql.Literal(attribute.attribute_id),
            alias=_alias(attribute),
        )
        for attribute in compared_attributes(bound)
    )
    return joins, compiled.condition, compiled.parameters


class _LatestColumns:
    """The fields of a filter over `entities e` and the joins of `latest_condition`; see `Columns`."""

    name: sql.Composable = sql.SQL("e.external_id")
    entity_type: sql.Composable = sql.SQL("e.entity_type")
    labels: sql.Composable = sql.SQL("e.labels")
    prefix_indexed: bool = False

    def value(self, attribute: Attribute) -> sql.Composable:
        return sql.SQL("{}.value").format(_alias(attribute))

    def shown(self, _: Attribute) -> sql.Composable | None:
        return None


def _alias(attribute: Attribute) -> sql.Identifier:
    return sql.Identifier(f"l{attribute.attribute_id}")
