"""Computing rows of projections from latest values, within a caller's transaction."""

from collections.abc import Sequence
from typing import Final, LiteralString

from psycopg import sql

from storage.binary import Int4Array, Int8Array
from storage.database import Connection
from storage.model import ValueType
from storage.rollup.dirty import ProjectionTable
from storage.statements import statements

_SQL = statements("projections.sql")
_PER_STATEMENT: Final = 5_000


async def refresh(connection: Connection, table: ProjectionTable, entities: Sequence[int]) -> None:
    """Bring the rows of these devices up to date; those of devices that are gone go."""
    for at in range(0, len(entities), _PER_STATEMENT):
        parameters = {
            "tenant": table.tenant_id,
            "type": table.entity_type,
            "entities": Int8Array(entities[at : at + _PER_STATEMENT]),
            "attributes": Int4Array(list(table.columns)),
        }
        await connection.execute(_refresh_statement(table), parameters)
        forget = sql.SQL(_SQL["forget"]).format(table=table_of(table.projection_id))
        await connection.execute(forget, parameters)


def table_of(projection_id: int) -> sql.Identifier:
    """A projection's table."""
    return sql.Identifier("projections", f"p{projection_id}")


def _refresh_statement(table: ProjectionTable) -> sql.Composed:
    names = [f"{part}{attribute}" for attribute in table.columns for part in ("v", "t")]
    comma = sql.SQL(", ")
    return sql.SQL(_SQL["refresh"]).format(
        table=table_of(table.projection_id),
        columns=comma.join(map(sql.Identifier, names)),
        names=comma.join(sql.Identifier("v", name) for name in names),
        excluded=comma.join(sql.Identifier("excluded", name) for name in names),
        current=comma.join(sql.Identifier("p", name) for name in names),
        pivots=comma.join(
            sql.SQL(
                "{pick}(l.{column}) FILTER (WHERE l.attribute_id = {id}) AS {value}, "
                "max(l.ts) FILTER (WHERE l.attribute_id = {id}) AS {time}"
            ).format(
                pick=sql.SQL(_pick(value_type)),
                column=sql.Identifier(f"{value_type}_value"),
                id=sql.Literal(attribute),
                value=sql.Identifier(f"v{attribute}"),
                time=sql.Identifier(f"t{attribute}"),
            )
            for attribute, value_type in table.columns.items()
        ),
    )


def _pick(value_type: ValueType) -> LiteralString:
    """An aggregate that gives back the one value there is."""
    return "bool_or" if value_type is ValueType.BOOLEAN else "max"
