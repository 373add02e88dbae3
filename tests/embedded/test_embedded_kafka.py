import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from embedded.errors import (
    DataDirInUse,
    DataDirUnusable,
    JarsUnresolved,
    JavaMissing,
    KafkaStartFailed,
    MavenMissing,
)
from embedded.jars import find_java, kafka_jars, kafka_version
from embedded.kafka import EmbeddedKafka
from embedded.kafka_probe import serves
from embedded.ports import LOOPBACK, free_port
from tests.waiting import PATIENCE_S, wait_until

OWNER = """
import sys
from pathlib import Path
from embedded.kafka import EmbeddedKafka
broker = EmbeddedKafka(Path(sys.argv[1]))
broker.start()
print(broker.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def running(request):
    """Each test finds the shared broker serving, whatever the one before did to it."""
    if "kafka" in request.fixturenames:
        request.getfixturevalue("kafka").start()


def new_topic(broker, partitions=2):
    name = f"t-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(PATIENCE_S)
    return name


def produce(broker, topic, values):
    failures = []
    producer = Producer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "acks": "all",
            "enable.idempotence": True,
            "compression.type": "zstd",
        }
    )
    for value in values:
        producer.produce(topic, value, on_delivery=lambda error, _: failures.append(error) if error else None)
    assert producer.flush(PATIENCE_S) == 0
    assert failures == []


def consume(broker, topic, count, partitions=2):
    consumer = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "enable.auto.commit": False,
        }
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    found = []

    def enough():
        messages = consumer.consume(1000, timeout=0.1)
        found.extend(message.value() for message in messages if message.error() is None)
        return len(found) >= count

    wait_until(enough, f"{count} records")
    consumer.close()
    return sorted(found)


FAKE_MAVEN = """
for word; do
    case $word in
        -DoutputDirectory=*) /bin/mkdir "${word#*=}"; : > "${word#*=}/a.jar";;
    esac
done
"""


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def programs(directory, monkeypatch):
    """The only directory on the PATH."""
    path = directory / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return path


def test_what_is_produced_is_consumed(kafka):
    topic = new_topic(kafka)
    values = [b"%05d" % number for number in range(5000)]
    produce(kafka, topic, values)
    assert consume(kafka, topic, 5000) == values


def test_a_restart_keeps_data_and_port(kafka):
    topic = new_topic(kafka)
    produce(kafka, topic, [b"before"])
    servers = kafka.bootstrap_servers
    kafka.restart()
    assert kafka.bootstrap_servers == servers
    produce(kafka, topic, [b"later"])
    assert consume(kafka, topic, 2) == [b"before", b"later"]


def test_killed_it_recovers_everything_acknowledged(kafka):
    topic = new_topic(kafka)
    values = [b"%05d" % number for number in range(5000)]
    produce(kafka, topic, values)
    kafka.kill()
    assert not kafka.is_running
    kafka.start()
    assert consume(kafka, topic, 5000) == values


def test_a_producer_waits_through_a_crash(kafka):
    topic = new_topic(kafka)
    delivered = []
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "acks": "all", "enable.idempotence": True})
    kafka.kill()
    producer.produce(topic, b"patient", on_delivery=lambda error, _: delivered.append(error))
    kafka.start()
    assert producer.flush(PATIENCE_S) == 0
    assert delivered == [None]
    assert consume(kafka, topic, 1) == [b"patient"]


def test_consumer_groups_work(kafka):
    topic = new_topic(kafka)
    produce(kafka, topic, [b"one"])
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    got = []
    wait_until(lambda: bool((m := consumer.poll(0.1)) and not m.error() and (got.append(m) or True)), "record")
    assert got[0].value() == b"one"
    committed = consumer.commit(message=got[0], asynchronous=False)
    assert committed[0].error is None
    consumer.close()


def test_topics_do_not_make_themselves(kafka):
    errors = []
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "message.timeout.ms": 2000})
    try:
        producer.produce("misspelt", b"x", on_delivery=lambda error, _: errors.append(error.code()))
    except KafkaException as error:
        errors.append(error.args[0].code())
    producer.flush(PATIENCE_S)
    assert errors[0] in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._MSG_TIMED_OUT)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    assert "misspelt" not in admin.list_topics(timeout=PATIENCE_S).topics


def test_only_the_loopback_interface_listens(kafka):
    listening = Path(f"/proc/{kafka.pid}/net/tcp").read_text().splitlines()[1:]
    ports = {int(port) for port in (kafka.data_dir / "ports").read_text().split()}
    addresses = [line.split()[1] for line in listening if line.split()[3] == "0A"]
    ours = {address for address in addresses if int(address.split(":")[1], 16) in ports}
    assert {address.split(":")[0] for address in ours} == {"0100007F"}
    assert len(ours) == 2


def test_a_second_user_of_the_directory_attaches(kafka):
    guest = EmbeddedKafka(kafka.data_dir)
    guest.start()
    assert not guest.is_owner
    assert guest.bootstrap_servers == kafka.bootstrap_servers
    guest.stop()
    assert kafka.is_running
    with pytest.raises(DataDirInUse):
        guest.restart()
    with pytest.raises(DataDirInUse, match="stop that first"):
        EmbeddedKafka(kafka.data_dir, port=1).start()


def test_the_broker_outlives_a_killed_owner_and_is_taken_over(kafka):
    kafka.stop()
    assert not kafka.is_running
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(kafka.data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    said = []
    heir = EmbeddedKafka(kafka.data_dir, progress=said.append)
    heir.start()
    assert (heir.pid, heir.is_owner) == (pid, True)
    assert said == [f"taking over the running Kafka (process {pid})"]
    heir.stop()
    assert not heir.is_running


def test_a_kept_port_that_is_taken_is_replaced(kafka):
    port = kafka.port
    kafka.stop()
    with socket.create_server((LOOPBACK, port)):
        kafka.start()
        assert kafka.port != port
        assert serves(kafka.port, PATIENCE_S)
    topic = new_topic(kafka)
    produce(kafka, topic, [b"moved"])
    assert consume(kafka, topic, 1) == [b"moved"]


def test_a_failed_start_shows_the_log_and_leaves_nothing_running(directory):
    broker = EmbeddedKafka(directory / "kafka", properties={"num.io.threads": "none"})
    with pytest.raises(KafkaStartFailed) as failed:
        broker.start()
    assert str(broker.log_file) in str(failed.value)
    assert "Invalid value none for configuration num.io.threads" in str(failed.value)
    assert not broker.is_running
    assert not broker.is_owner


def test_a_broker_that_is_never_ready_is_ended_at_the_deadline(directory, programs):
    script(programs / "mvn", FAKE_MAVEN)
    # Formats without a word, then hangs.
    script(
        programs / "java",
        """case "$*" in
            -version) echo 'openjdk version "17.0.1"' >&2;;
            *StorageTool*) ;;
            *) kill -STOP $$;;
        esac""",
    )
    broker = EmbeddedKafka(directory / "kafka", cache_dir=directory / "cache", start_timeout_s=0.3)
    with pytest.raises(KafkaStartFailed, match="not ready within"):
        broker.start()
    assert not broker.is_running


def test_any_name_of_a_data_directory_will_do(directory, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    with EmbeddedKafka(directory / "it's, 温度 \\ $x") as broker:
        topic = new_topic(broker)
        produce(broker, topic, [b"odd"])
        assert consume(broker, topic, 1) == [b"odd"]
        assert (broker.data_dir / "data" / f"{topic}-0").is_dir()


@pytest.mark.parametrize("name", ["listeners", "log.dirs", "", "a b"])
def test_properties_that_are_ours_or_no_names_are_refused(directory, name):
    with pytest.raises(ValueError, match="not a property"):
        EmbeddedKafka(directory, properties={name: "1"})


def test_a_file_in_place_of_the_directory_is_refused(directory):
    (directory / "file").write_text("")
    with pytest.raises(DataDirUnusable):
        EmbeddedKafka(directory / "file").start()


def test_without_java_it_says_what_to_install(directory, programs):
    broker = EmbeddedKafka(directory / "kafka")
    with pytest.raises(JavaMissing, match=r"no java program.*apt-get install openjdk-17-jre-headless"):
        broker.start()
    assert not broker.is_owner


@pytest.mark.parametrize(
    ("answer", "understood"),
    [
        ('openjdk version "11.0.2" 2019-01-15', "11"),
        ('java version "1.8.0_452"', "8"),
        ("nonsense", "unknown"),
    ],
    ids=["11", "8", "no Java"],
)
def test_an_old_java_is_named(programs, answer, understood):
    script(programs / "java", f"echo '{answer}' >&2")
    with pytest.raises(JavaMissing, match=f"is version {understood}"):
        find_java()


def test_a_new_java_of_java_home_comes_first(programs, directory, monkeypatch):
    script(programs / "java", "echo 'openjdk version \"17.0.1\"' >&2")
    assert find_java() == programs / "java"
    home = directory / "jdk"
    (home / "bin").mkdir(parents=True)
    script(home / "bin" / "java", "echo 'openjdk version \"25\" 2025-09-16' >&2")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_java() == home / "bin" / "java"


def test_without_maven_it_says_what_to_install(directory, programs):
    with pytest.raises(MavenMissing, match="apt-get install maven"):
        kafka_jars(directory / "cache", lambda _: None)


def test_maven_that_fails_is_quoted_and_leaves_no_half_set(directory, programs):
    script(programs / "mvn", "echo 'no route to anywhere'; exit 3")
    with pytest.raises(JarsUnresolved, match=r"ended with 3(.|\n)*no route to anywhere") as failed:
        kafka_jars(directory / "cache", lambda _: None)
    assert failed.value.retriable
    assert [path.name for path in (directory / "cache").iterdir()] == ["kafka.lock"]


def test_jars_are_resolved_once_and_the_person_is_told(directory, programs):
    script(programs / "mvn", FAKE_MAVEN)
    said = []
    jars = kafka_jars(directory / "cache", said.append)
    assert [path.name for path in jars.iterdir()] == ["a.jar"]
    assert said[0].startswith("resolving Kafka jars (first run, about ")
    (programs / "mvn").unlink()
    assert kafka_jars(directory / "cache", said.append) == jars
    assert len(said) == 2
    assert kafka_version() in jars.name


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x00\x0cshort"])
def test_the_probe_is_not_fooled_by_other_servers(answer):
    def answer_one(server):
        connection, _ = server.accept()
        with connection:
            connection.sendall(answer)

    with socket.create_server((LOOPBACK, 0)) as server:
        thread = threading.Thread(target=answer_one, args=(server,))
        thread.start()
        assert not serves(server.getsockname()[1])
        thread.join()


def test_the_probe_says_no_where_nobody_listens():
    assert not serves(free_port())
