"""Dropping outbox partitions that nobody needs any more.

What is loaded is known through checkpoints. The loader says "everything of this lane committed before L is loaded";
the relay remembers a pair (snapshot S, clock before S) that it had published. Once L has passed that clock, whatever
is visible in S is in the warehouse. `retire_outbox` in the schema drops a partition only if every batch in it is
visible in its lane's S, and checks that once more when no writer of the partition is left.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta

from runtime.metrics import Metrics
from storage.database import Pool
from storage.errors import TransactionConflict, translated
from storage.statements import statements

log = logging.getLogger(__name__)

_SQL = statements("relay.sql")


@dataclass(frozen=True, slots=True)
class Retirement:
    """What became of the oldest partition that was old enough."""

    partition: str
    dropped: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Retirer:
    """Drops partitions after they are "loaded", or "published", and `margin_s` seconds more.

    Any number of relays may run one.
    """

    pool: Pool
    after: str
    margin_s: float
    metrics: Metrics

    async def run_once(self) -> list[Retirement]:
        """Drop what can be dropped now, oldest first, until one cannot.

        Raises:
            StorageError: the database.
        """
        margin = timedelta(seconds=self.margin_s)
        done: list[Retirement] = []
        with translated():
            async with self.pool.connection() as connection:
                await connection.execute(_SQL["confirm_checkpoints"], {"margin": margin})
                await connection.execute(_SQL["begin_checkpoints"])
        while True:
            try:
                with translated():
                    async with self.pool.connection() as connection:
                        asked = await connection.execute(_SQL["retire_outbox"], {"after": self.after, "margin": margin})
                        found = await asked.fetchone()
            except TransactionConflict:
                return done
            if found is None or found[1] == "none":
                return done
            partition, outcome, reason = found
            dropped = outcome == "dropped"
            done.append(Retirement(partition or "", dropped, reason or ""))
            if not dropped:
                log.info("outbox partition kept", extra={"partition": partition, "reason": reason})
                self.metrics.count("atlasco_outbox_retirements_postponed")
                return done
            log.info("outbox partition dropped", extra={"partition": partition})
            self.metrics.count("atlasco_outbox_partitions_retired")
