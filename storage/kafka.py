"""Kafka clients: their configuration, the errors they raise, and what a topic is.

The settings select an existing cluster: plaintext, TLS, SASL with a password, or Amazon MSK with IAM, for which the
extra `msk` (aws-msk-iam-sasl-signer-python) signs a token with whatever AWS credentials the process has.

Client errors are translated here and nowhere else, by code, never by text.
"""

import asyncio
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource

from runtime.config import REQUIRED, ConfigError, choice, setting

log = logging.getLogger("storage.kafka")

MSK_IAM = "AWS_MSK_IAM"
DEFAULT_TOPIC = "atlasco.changes.v1"


@dataclass(frozen=True)
class KafkaConfig:
    """Kafka."""

    bootstrap_servers: str = setting(
        "KAFKA_BOOTSTRAP_SERVERS", REQUIRED, "Brokers to connect to first, as host:port, separated by commas."
    )
    topic: str = setting("ATLASCO_CHANGES_TOPIC", DEFAULT_TOPIC, "The topic that carries the changes.")
    security_protocol: str = setting(
        "KAFKA_SECURITY_PROTOCOL",
        "PLAINTEXT",
        "How connections are protected.",
        parse=choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
    )
    sasl_mechanism: str = setting(
        "KAFKA_SASL_MECHANISM",
        "",
        f"How the client proves who it is; {MSK_IAM} needs the extra 'msk'.",
        parse=choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", MSK_IAM),
    )
    sasl_username: str = setting("KAFKA_SASL_USERNAME", "", "User name for PLAIN and SCRAM.")
    sasl_password: str = setting("KAFKA_SASL_PASSWORD", "", "Password for PLAIN and SCRAM.", secret=True)
    ssl_ca_file: str = setting(
        "KAFKA_SSL_CA_FILE", "", "Certificates of the authorities trusted; not set: the system's."
    )
    ssl_certificate_file: str = setting("KAFKA_SSL_CERTIFICATE_FILE", "", "The client's own certificate.")
    ssl_key_file: str = setting("KAFKA_SSL_KEY_FILE", "", "The private key of the client's certificate.")
    ssl_key_password: str = setting("KAFKA_SSL_KEY_PASSWORD", "", "Password of the private key.", secret=True)
    aws_region: str = setting("KAFKA_AWS_REGION", "", f"Region of the cluster for {MSK_IAM}; not set: AWS_REGION.")

    def __post_init__(self) -> None:
        if bool(self.sasl_mechanism) != self.security_protocol.startswith("SASL"):
            raise ValueError("KAFKA_SASL_MECHANISM and a SASL KAFKA_SECURITY_PROTOCOL go together")
        if self.sasl_mechanism == MSK_IAM and self.security_protocol != "SASL_SSL":
            raise ValueError(f"{MSK_IAM} needs KAFKA_SECURITY_PROTOCOL=SASL_SSL")
        if self.sasl_mechanism not in {"", MSK_IAM} and not (self.sasl_username and self.sasl_password):
            raise ValueError(f"{self.sasl_mechanism} needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD")


class BrokerError(Exception):
    """The root: something with Kafka failed. `retriable`: the same work, tried again unchanged, can succeed."""

    retriable: ClassVar[bool] = False

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class BrokerUnavailable(BrokerError):
    """Brokers cannot be reached, are starting, elect leaders, or did not confirm in time."""

    retriable = True


class TopicMissing(BrokerError):
    """The topic, or the partition, does not exist (any more)."""

    retriable = True


class RecordTooLarge(BrokerError):
    """A record is larger than the topic takes."""


class ProducerBroken(BrokerError):
    """An idempotent producer that cannot go on; a new one can."""

    retriable = True


class BrokerRefused(BrokerError):
    """Authentication, authorization or configuration: an operator has to look."""


_UNAVAILABLE = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._PURGE_QUEUE,
        KafkaError._QUEUE_FULL,
        KafkaError._WAIT_COORD,
        KafkaError._RETRY,
        KafkaError._DESTROY,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_CONTROLLER,
        KafkaError.KAFKA_STORAGE_ERROR,
    }
)
_MISSING = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_ID,
    }
)
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})


def translate(error: KafkaError) -> BrokerError:
    """The error that a client error stands for."""
    code = error.code()
    text = f"{error.name()}: {error.str()}"
    kind: type[BrokerError] = BrokerRefused
    if error.fatal():
        kind = ProducerBroken
    elif code in _MISSING:
        kind = TopicMissing
    elif code in _TOO_LARGE:
        kind = RecordTooLarge
    elif code in _UNAVAILABLE or error.retriable():
        kind = BrokerUnavailable
    return kind(text, error.name())


def _msk_token(region: str) -> Callable[[str], tuple[str, float]]:
    try:
        signer = importlib.import_module("aws_msk_iam_sasl_signer.MSKAuthTokenProvider")
    except ImportError as error:
        raise ConfigError(
            [f"KAFKA_SASL_MECHANISM={MSK_IAM} needs the extra 'msk': pip install 'atlasco-telemetry[msk]'"]
        ) from error
    if not region:
        raise ConfigError([f"KAFKA_AWS_REGION (or AWS_REGION) must be set for {MSK_IAM}"])

    def token(_: str) -> tuple[str, float]:
        text, expiry_ms = signer.generate_auth_token(region)
        return text, expiry_ms / 1000

    return token


def client_config(config: KafkaConfig, client_id: str) -> dict[str, Any]:
    """What every client of ours gives to librdkafka; `client_id` shows in the broker's logs and quotas.

    A client with MSK IAM gets its first token in a `poll`: an AdminClient must be polled before its first use.

    Raises:
        ConfigError: MSK IAM without its extra, or without a region.
    """
    settings: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": client_id,
        "security.protocol": config.security_protocol,
        # A broker that restarts is found again within a second instead of ten.
        "reconnect.backoff.max.ms": 1000,
        "socket.keepalive.enable": True,
    }
    if config.security_protocol.endswith("SSL"):
        files = {
            "ssl.ca.location": config.ssl_ca_file,
            "ssl.certificate.location": config.ssl_certificate_file,
            "ssl.key.location": config.ssl_key_file,
            "ssl.key.password": config.ssl_key_password,
        }
        settings |= {name: value for name, value in files.items() if value}
    if config.sasl_mechanism == MSK_IAM:
        region = config.aws_region or os.environ.get("AWS_REGION", "")
        settings |= {"sasl.mechanisms": "OAUTHBEARER", "oauth_cb": _msk_token(region)}
    elif config.sasl_mechanism:
        settings |= {
            "sasl.mechanisms": config.sasl_mechanism,
            "sasl.username": config.sasl_username,
            "sasl.password": config.sasl_password,
        }
    return settings


def producer_config(config: KafkaConfig, client_id: str, *, max_message_bytes: int, timeout_s: float) -> dict[str, Any]:
    """A producer that loses nothing and repeats nothing within its own life.

    `max_message_bytes` is the topic's limit. A record that is not confirmed within `timeout_s` seconds is reported as
    failed, whatever became of it. Raises ConfigError as `client_config` does.
    """
    return client_config(config, client_id) | {
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "zstd",
        "linger.ms": 5,
        "batch.size": 1_000_000,
        "message.max.bytes": max_message_bytes,
        "message.timeout.ms": int(timeout_s * 1000),
        # Memory for what waits to be sent; beyond it the caller waits.
        "queue.buffering.max.kbytes": 65_536,
        "queue.buffering.max.messages": 100_000,
    }


def consumer_config(config: KafkaConfig, client_id: str, group: str) -> dict[str, Any]:
    """A consumer that commits nothing by itself and never skips: a missing offset is an error it reports.

    Raises ConfigError as `client_config` does.
    """
    return client_config(config, client_id) | {
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "partition.assignment.strategy": "cooperative-sticky",
        "isolation.level": "read_committed",
    }


def make_admin(config: KafkaConfig, client_id: str) -> AdminClient:
    """A client for looking at and making topics. It connects when it is used."""
    admin = AdminClient(client_config(config, client_id), logger=log)
    # Serves the token callback of MSK IAM, which the first request would otherwise wait for in vain.
    admin.poll(0)
    return admin


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the brokers have it now."""

    name: str
    # Another id under the same name is another topic: the old one's records are gone.
    topic_id: str
    partitions: int
    # Largest record batch, in bytes, that the brokers take (max.message.bytes).
    max_message_bytes: int


async def describe_topic(admin: AdminClient, name: str, *, timeout_s: float = 10.0) -> Topic | None:
    """The topic, or None when there is none of this name.

    Raises:
        BrokerError: the brokers cannot be reached or refuse to say.
    """
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    try:
        described = admin.describe_topics(TopicCollection([name]), request_timeout=timeout_s)[name]
        topic = await asyncio.wrap_future(described)
        configured = admin.describe_configs([resource], request_timeout=timeout_s)[resource]
        entries = await asyncio.wrap_future(configured)
    except KafkaException as error:
        problem = translate(error.args[0])
        if isinstance(problem, TopicMissing):
            return None
        raise problem from error
    return Topic(name, str(topic.topic_id), len(topic.partitions), int(entries["max.message.bytes"].value))
