"""Java, and the jars of a Kafka broker: resolved once by Maven, kept in a cache of the user.

Maven is asked with the user's own settings, so mirrors and proxies set there apply. Once the jars are in
the cache neither Maven nor the network is needed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from embedded.errors import JarsUnresolved, JavaMissing, MavenMissing
from embedded.processes import Progress

POM = Path(__file__).with_name("kafka-pom.xml")
"""Which Kafka, and what it needs."""

JAVA_MAJOR = 17
"""The oldest Java that the broker runs on."""

_SIZE_MB = 60
_TIMEOUT_S = 900
_REPORT_EVERY_S = 5


def default_cache_dir() -> Path:
    """Return the user's cache directory for this project, by the platform's custom."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "atlasco"
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # A relative value is to be ignored, says the specification.
    base = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    return base / "atlasco"


def find_java() -> Path:
    """Return a `java` program of version 17 or newer: of JAVA_HOME, else on the PATH. Errors: JavaMissing."""
    home = os.environ.get("JAVA_HOME")
    candidates = [str(Path(home, "bin", "java"))] if home else []
    candidates.append("java")
    found = []
    for candidate in candidates:
        program = shutil.which(candidate)
        if program is None:
            continue
        version = _java_major(program)
        if version >= JAVA_MAJOR:
            return Path(program)
        found.append(f"{program} is version {version or 'unknown'}")
    raise JavaMissing(
        f"Kafka needs Java {JAVA_MAJOR} or newer; {', '.join(found) or 'no java program was found'}. "
        f"Debian and Ubuntu: apt-get install openjdk-{JAVA_MAJOR}-jre-headless"
    )


def kafka_version() -> str:
    """Return the version of Kafka that the jars are of."""
    names = {"m": "http://maven.apache.org/POM/4.0.0"}
    return ElementTree.parse(POM).findtext("m:properties/m:kafka.version", "", names)  # noqa: S314 - our file


def kafka_jars(cache_dir: Path, progress: Progress) -> Path:
    """Return a directory with the broker's jars; resolve them with Maven if the cache has none.

    The cached set belongs to this very pom: another version gets a directory of its own. Processes that
    need it at the same time wait for the first. Errors: MavenMissing; JarsUnresolved with Maven's words.
    """
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    target = cache_dir.expanduser() / f"kafka-{kafka_version()}-{digest}"
    if target.is_dir():
        return target
    maven = shutil.which("mvn")
    if maven is None:
        raise MavenMissing(
            "Kafka's jars are resolved by Maven on the first run, and no mvn program was found. "
            "Debian and Ubuntu: apt-get install maven"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two Mavens in one local repository damage each other's downloads.
    with target.with_name("kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _resolve(maven, target, progress)
    return target


def _resolve(maven: str, target: Path, progress: Progress) -> None:
    progress(f"resolving Kafka jars (first run, about {_SIZE_MB} MB)…")
    began = time.monotonic()
    # Beside the target and renamed at the end: a set that is there is complete.
    with tempfile.TemporaryDirectory(prefix="kafka-", dir=target.parent) as directory:
        unfinished = Path(directory, "jars")
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            maven_process = subprocess.Popen(
                [
                    maven,
                    "--batch-mode",
                    "--quiet",
                    f"--file={POM}",
                    f"-DoutputDirectory={unfinished}",
                    "dependency:copy-dependencies",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
            )
            try:
                ended = _wait(maven_process, began, progress)
            finally:
                maven_process.kill()
                maven_process.wait()
            if ended != 0:
                output.seek(0)
                words = [line.rstrip() for line in output if line.strip()][-12:]
                how = "took too long" if ended is None else f"ended with {ended}"
                raise JarsUnresolved(f"Maven {how} resolving Kafka's jars:\n" + "\n".join(words))
        unfinished.rename(target)
    progress(f"Kafka jars resolved in {time.monotonic() - began:.0f} s")


def _wait(maven_process: subprocess.Popen[bytes], began: float, progress: Progress) -> int | None:
    while (elapsed := time.monotonic() - began) < _TIMEOUT_S:
        try:
            return maven_process.wait(_REPORT_EVERY_S)
        except subprocess.TimeoutExpired:
            progress(f"resolving Kafka jars… {elapsed + _REPORT_EVERY_S:.0f} s")
    return None


def _java_major(program: str) -> int:
    try:
        answer = subprocess.run([program, "-version"], check=False, capture_output=True, text=True, timeout=30).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    # "17.0.15", "21", and "1.8.0_452" for version 8.
    match = re.search(r'version "(?:1\.)?(\d+)', answer)
    return int(match[1]) if match else 0
