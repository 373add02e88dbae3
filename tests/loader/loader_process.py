"""A loader as a process of its own, for tests that kill it: at a step it names, or from outside."""

import json
import os
import signal
import sys
from pathlib import Path

from runtime.metrics import NullMetrics
from storage.kafka import KafkaConfig
from storage.loader.config import LoaderConfig
from storage.loader.process import make_follower
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.port import Warehouse
from storage.warehouse.steps import Step


def main() -> None:
    given = json.loads(sys.argv[1])

    def at(step: Step) -> None:
        if step == given["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    warehouse: Warehouse = LocalWarehouse(Path(given["directory"]), given["dsn"], at=at)
    kafka = KafkaConfig(bootstrap_servers=given["bootstrap"], topic=given["topic"])
    config = LoaderConfig(
        age_s=0.2, retry_s=0.5, session_s=given["session_s"], group="atlasco-loader-" + given["topic"]
    )
    follower = make_follower(config, kafka, given["dsn"], warehouse, NullMetrics(), at=at)
    signal.signal(signal.SIGTERM, lambda *_: follower.stop())
    follower.run()


if __name__ == "__main__":
    main()
