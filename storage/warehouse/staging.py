"""The staging bucket: where Parquet files wait for Redshift's COPY."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import boto3  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from storage.errors import StorageUnavailable
from storage.warehouse.tables import write_parquet

_PART_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StagedFile:
    """An object in the bucket."""

    url: str
    bytes: int


def manifest_of(files: Sequence[StagedFile]) -> bytes:
    """The manifest of a COPY: for Parquet each entry needs the length, and mandatory makes a missing file an error."""
    entries = [{"url": f.url, "mandatory": True, "meta": {"content_length": f.bytes}} for f in files]
    return json.dumps({"entries": entries}).encode()


def encoded(table: pa.Table) -> bytes:
    """Rows as Parquet, in memory."""
    sink = io.BytesIO()
    write_parquet(table, sink)
    return sink.getvalue()


class Staging:
    """A prefix of a bucket. Objects are encrypted with `kms_key` if one is given; large ones go up in parts.

    Errors of the bucket are all retriable: access that was forgotten is granted while the loader waits.
    """

    def __init__(self, bucket: str, prefix: str, *, kms_key: str = "", region: str = "", grace_s: float = 3600) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._client: Any = boto3.client("s3", region_name=region or None)
        self._extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
        self._grace = timedelta(seconds=grace_s)
        self._transfer = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)

    @classmethod
    def parse(cls, url: str, *, kms_key: str = "", region: str = "", grace_s: float = 3600) -> "Staging":
        """From s3://bucket/prefix.

        Raises:
            ValueError: it does not have this form.
        """
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError("ATLASCO_REDSHIFT_STAGING must be s3://bucket/prefix")
        return cls(parts.netloc, parts.path, kms_key=kms_key, region=region, grace_s=grace_s)

    def put(self, name: str, content: bytes) -> StagedFile:
        """Store an object; the same name overwrites.

        Raises:
            StorageUnavailable: the bucket refuses or does not answer.
        """
        key = f"{self._prefix}/{name}" if self._prefix else name
        try:
            self._client.upload_fileobj(
                io.BytesIO(content), self._bucket, key, ExtraArgs=self._extra, Config=self._transfer
            )
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"the staging bucket refuses {key}: {error}") from error
        return StagedFile(f"s3://{self._bucket}/{key}", len(content))

    def collect(self) -> int:
        """Delete what is older than the grace period: it was loaded, or a crash left it. Returns how many.

        Raises:
            StorageUnavailable: the bucket refuses or does not answer.
        """
        horizon = datetime.now(UTC) - self._grace
        deleted = 0
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                old = [{"Key": o["Key"]} for o in page.get("Contents", ()) if o["LastModified"] < horizon]
                if old:
                    self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": old, "Quiet": True})
                    deleted += len(old)
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StorageUnavailable(f"the staging bucket refuses to be tidied: {error}") from error
        return deleted
