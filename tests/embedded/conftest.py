import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedded.kafka import EmbeddedKafka
from embedded.postgres import EmbeddedPostgres


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that is gone after the test, whoever owns what is in it."""
    with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
        yield Path(name).resolve()


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Path]:
    """A data directory that tests take in turn: creating a cluster takes longer than most of them."""
    with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
        yield Path(name).resolve() / "pg"


@pytest.fixture
def new_postgres(shared_cluster: Path) -> Iterator[Callable[..., EmbeddedPostgres]]:
    """Make servers, not started, by default all of one data directory; none is left running."""
    made: list[EmbeddedPostgres] = []

    def make(where: Path = shared_cluster, **options: Any) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(where, **options))
        return made[-1]

    yield make
    for server in made:
        server.kill()
        server.stop()


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
        broker = EmbeddedKafka(Path(name, "kafka"))
        broker.start()
        yield broker
        broker.kill()
        broker.stop()
