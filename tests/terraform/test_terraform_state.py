"""Modules applied to an in-memory AWS, and what that AWS then holds, asked through its own API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import boto3  # type: ignore[import-untyped]
import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from tests.terraform.conftest import Apply

pytestmark = pytest.mark.terraform

REGION = "eu-west-1"


def client(applied: Apply, service: str) -> Any:
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=applied.endpoint,
        aws_access_key_id="imitation",
        aws_secret_access_key="imitation",
    )


def test_data_subnets_have_no_route_out(applied: Apply) -> None:
    ec2 = client(applied, "ec2")
    subnets = applied.outputs()["data_subnet_ids"]
    tables = ec2.describe_route_tables(Filters=[{"Name": "association.subnet-id", "Values": subnets}])["RouteTables"]
    assert len(tables) == 1
    assert [
        route
        for route in tables[0]["Routes"]
        if route.get("DestinationCidrBlock") == "0.0.0.0/0" or "NatGatewayId" in route
    ] == []


def test_default_security_group_reaches_nothing(applied: Apply) -> None:
    groups = client(applied, "ec2").describe_security_groups(
        Filters=[
            {"Name": "vpc-id", "Values": [applied.outputs()["vpc_id"]]},
            {"Name": "group-name", "Values": ["default"]},
        ]
    )["SecurityGroups"]
    assert [(group["IpPermissions"], group["IpPermissionsEgress"]) for group in groups] == [([], [])]


def test_database_is_open_to_the_cluster_only(applied: Apply) -> None:
    outputs = applied.outputs()
    group = client(applied, "ec2").describe_security_groups(
        Filters=[{"Name": "group-name", "Values": [f"{outputs['database']}-postgres"]}]
    )["SecurityGroups"][0]
    assert [
        (rule["FromPort"], rule["ToPort"], rule["IpRanges"], [pair["GroupId"] for pair in rule["UserIdGroupPairs"]])
        for rule in group["IpPermissions"]
    ] == [(5432, 5432, [], [outputs["cluster_security_group_id"]])]


def test_flow_logs_cover_the_vpc(applied: Apply) -> None:
    logs = client(applied, "ec2").describe_flow_logs()["FlowLogs"]
    assert [(log["ResourceId"], log["TrafficType"]) for log in logs] == [(applied.outputs()["vpc_id"], "ALL")]


def test_database_is_private_encrypted_and_recoverable(applied: Apply) -> None:
    rds = client(applied, "rds")
    instance = rds.describe_db_instances(DBInstanceIdentifier=applied.outputs()["database"])["DBInstances"][0]
    assert instance["StorageEncrypted"]
    assert not instance["PubliclyAccessible"]
    assert instance["BackupRetentionPeriod"] == 3
    assert instance["MasterUsername"] == "atlasco_owner"
    group = instance["DBParameterGroups"][0]["DBParameterGroupName"]
    # The provider sends parameters in batches of twenty; this sees all of them arrive.
    parameters = {
        parameter["ParameterName"]: parameter.get("ParameterValue")
        for page in rds.get_paginator("describe_db_parameters").paginate(DBParameterGroupName=group)
        for parameter in page["Parameters"]
    }
    assert parameters["rds.force_ssl"] == "1"
    assert parameters["synchronous_commit"] == "on"
    assert parameters["max_wal_size"] == "4096"
    assert len(parameters) > 30


def test_bucket_is_private_and_encrypted(applied: Apply) -> None:
    s3 = client(applied, "s3")
    bucket = applied.outputs()["bucket"]
    assert set(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values()) == {True}
    rule = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["BucketKeyEnabled"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    assert s3.get_bucket_logging(Bucket=bucket)["LoggingEnabled"]["TargetPrefix"] == "staging/"
    denied = {
        statement["Sid"]
        for statement in json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        if statement["Effect"] == "Deny"
    }
    assert denied == {"TlsOnly", "NoOldTls", "NoOtherEncryption", "NoOtherKey"}
    lifecycle = {
        rule["ID"]: rule.get("Expiration", {}).get("Days")
        for rule in s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    }
    assert lifecycle == {"parquet": 400, "manifests": 30, "leftovers": None}


def test_image_tags_do_not_move(applied: Apply) -> None:
    repository = client(applied, "ecr").describe_repositories()["repositories"][0]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"]["scanOnPush"]
    assert repository["encryptionConfiguration"]["encryptionType"] == "KMS"


def passwords(applied: Apply) -> dict[str, dict[str, str]]:
    manager = client(applied, "secretsmanager")
    names: Any = applied.outputs()["secret_names"]
    return {path: json.loads(manager.get_secret_value(SecretId=name)["SecretString"]) for path, name in names.items()}


def test_passwords_are_made_rotated_and_never_in_the_state(applied: Apply) -> None:
    first = passwords(applied)
    assert {path: secret["username"] for path, secret in first.items()} == {
        "postgres/ingest": "atlasco_ingest",
        "postgres/query": "atlasco_query",
    }
    assert all(len(secret["password"]) == 64 for secret in first.values())

    def change(version: int) -> None:
        applied.terraform.run(
            "apply",
            "-auto-approve",
            "-no-color",
            "-target=module.secrets",
            f"-var=password_version={version}",
            cwd=applied.root,
        )

    # Applying again changes nothing, although the expression yields another value each time.
    change(1)
    assert passwords(applied) == first
    change(2)
    second = passwords(applied)

    every = [secret["password"] for secret in (*first.values(), *second.values())]
    assert len(set(every)) == 4
    states = "".join(path.read_text(encoding="utf-8") for path in applied.root.glob("terraform.tfstate*"))
    assert "atlasco-imitation/postgres/ingest" in states
    assert [password for password in every if password in states] == []


def test_nothing_else_was_made(applied: Apply) -> None:
    """The modules make one database and no access keys or users on the side."""
    assert client(applied, "iam").list_users()["Users"] == []
    assert len(client(applied, "rds").describe_db_instances()["DBInstances"]) == 1
    with pytest.raises(ClientError):
        client(applied, "s3").head_bucket(Bucket="atlasco-imitation")
