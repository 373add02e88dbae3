"""Which warehouse, from settings: a reader needs fewer than whoever loads."""

from dataclasses import dataclass
from pathlib import Path

from runtime.config import REQUIRED, byte_size, choice, duration, optional_path, positive_int, setting
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Warehouse
from storage.warehouse.steps import AtStep, no_step


@dataclass(frozen=True)
class WarehouseReadConfig:
    """Warehouse, to read it: no bucket and no role, which a reader has no right to."""

    kind: str = setting("ATLASCO_WAREHOUSE", "local", "What the warehouse is.", parse=choice("local", "redshift"))
    dsn: str = setting("ATLASCO_DSN", REQUIRED, "The primary.", secret=True)
    directory: Path | None = setting(
        "ATLASCO_WAREHOUSE_DIR", None, "Directory of a local warehouse's files.", parse=optional_path
    )
    catalog_dsn: str = setting(
        "ATLASCO_WAREHOUSE_CATALOG_DSN",
        "",
        "Database of a local warehouse's catalog; not set: the primary.",
        secret=True,
    )
    query_threads: int = setting(
        "ATLASCO_WAREHOUSE_QUERY_THREADS", 2, "Threads of one query of a local warehouse.", parse=positive_int
    )
    query_memory_bytes: int = setting(
        "ATLASCO_WAREHOUSE_QUERY_MEMORY",
        1024 * 1024 * 1024,
        "Memory of one query of a local warehouse; beyond it goes to disk.",
        parse=byte_size,
    )
    redshift_dsn: str = setting(
        "ATLASCO_REDSHIFT_DSN",
        "",
        "redshift://user:password@host:5439/database; with IAM authentication without password.",
        secret=True,
    )
    redshift_cluster: str = setting(
        "ATLASCO_REDSHIFT_CLUSTER",
        "",
        "Cluster identifier (or serverless:<workgroup>) for IAM authentication; not set: the password is used.",
    )
    aws_region: str = setting("ATLASCO_AWS_REGION", "", "Region of bucket and cluster; not set: the environment's.")

    def __post_init__(self) -> None:
        if self.kind == "local" and self.directory is None:
            raise ValueError("ATLASCO_WAREHOUSE_DIR must be set for a local warehouse")
        if self.kind == "redshift" and not self.redshift_dsn:
            raise ValueError("ATLASCO_REDSHIFT_DSN must be set for Redshift")


@dataclass(frozen=True)
class WarehouseConfig(WarehouseReadConfig):
    """Warehouse."""

    dsn: str = setting("ATLASCO_DSN", REQUIRED, "The primary, as a member of atlasco_loader.", secret=True)
    grace_s: float = setting(
        "ATLASCO_WAREHOUSE_GRACE",
        3600.0,
        "How long replaced and orphaned files stay: longer than the longest query.",
        parse=duration,
    )
    file_bytes: int = setting(
        "ATLASCO_WAREHOUSE_FILE_SIZE",
        128 * 1024 * 1024,
        "Size of file that the compaction of a local warehouse aims at.",
        parse=byte_size,
    )
    redshift_copy_role: str = setting(
        "ATLASCO_REDSHIFT_COPY_ROLE", "default", "ARN of the role with which COPY reads the staging bucket, or default."
    )
    staging: str = setting("ATLASCO_REDSHIFT_STAGING", "", "Where files are staged: s3://bucket/prefix.")
    staging_kms_key: str = setting(
        "ATLASCO_REDSHIFT_STAGING_KMS_KEY", "", "KMS key that encrypts staged files; not set: the bucket's default."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "redshift" and not self.staging:
            raise ValueError("ATLASCO_REDSHIFT_STAGING must be set for Redshift")


def open_warehouse(config: WarehouseConfig, *, at: AtStep = no_step) -> Warehouse:
    """The warehouse that the settings name. It connects when it is used.

    Raises:
        ValueError: a setting does not have the form it needs.
    """
    if config.kind == "redshift":
        # Imported here: a local warehouse needs neither the driver nor boto3.
        from storage.warehouse.redshift import RedshiftWarehouse  # noqa: PLC0415
        from storage.warehouse.redshift_session import RedshiftLogin  # noqa: PLC0415
        from storage.warehouse.staging import Staging  # noqa: PLC0415

        login = RedshiftLogin.parse(config.redshift_dsn, cluster=config.redshift_cluster, region=config.aws_region)
        staging = Staging.parse(
            config.staging, kms_key=config.staging_kms_key, region=config.aws_region, grace_s=config.grace_s
        )
        return RedshiftWarehouse(login, staging, copy_role=config.redshift_copy_role, at=at)
    assert config.directory is not None
    limits = LocalLimits(
        grace_s=config.grace_s,
        file_bytes=config.file_bytes,
        query_threads=config.query_threads,
        query_memory_bytes=config.query_memory_bytes,
    )
    return LocalWarehouse(config.directory, config.catalog_dsn or config.dsn, limits=limits, at=at)


def open_to_read(config: WarehouseReadConfig, *, measured_s: float = 0.0) -> Warehouse:
    """The warehouse that the settings name, for `query` and `completeness`: a load fails for want of a bucket, or of
    the rights that a reader's login lacks. It connects when it is used. `measured_s`: see `RedshiftReader`.

    Raises:
        ValueError: a setting does not have the form it needs.
    """
    if config.kind == "redshift":
        from storage.warehouse.redshift_reader import RedshiftReader  # noqa: PLC0415
        from storage.warehouse.redshift_session import RedshiftLogin  # noqa: PLC0415

        login = RedshiftLogin.parse(config.redshift_dsn, cluster=config.redshift_cluster, region=config.aws_region)
        return RedshiftReader(login, measured_s=measured_s)
    assert config.directory is not None
    limits = LocalLimits(query_threads=config.query_threads, query_memory_bytes=config.query_memory_bytes)
    return LocalWarehouse(config.directory, config.catalog_dsn or config.dsn, limits=limits)
