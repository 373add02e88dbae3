"""Write an overlay's values.yaml from what Terraform put out.

    terraform -chdir=terraform output -json |
        python3 k8s/values_from_terraform.py --tag 0.1.0 --trust-domain telemetry.example.com \
            --public-name telemetry.example.com > k8s/overlays/prod/values.yaml

Nothing in it is secret: secrets appear as names and ARNs.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NAMESPACE = "atlasco"

HEADER = """\
# The values of this environment: from `terraform output`, by k8s/values_from_terraform.py, which says how to write it
# again. ../../components/values puts them into place; this object itself is not applied.
apiVersion: v1
kind: ConfigMap
metadata:
  name: values
  annotations:
    config.kubernetes.io/local-config: "true"
data:
"""

Outputs = Mapping[str, Any]

# By the key in values.yaml: how it follows from the outputs.
FROM_OUTPUTS: Mapping[str, Callable[[Outputs], Any]] = {
    "image-repository": lambda out: out["repository_url"],
    "region": lambda out: out["region"],
    "postgres-host": lambda out: out["postgres_host"],
    "postgres-port": lambda out: out["postgres_port"],
    "postgres-database": lambda out: out["postgres_database"],
    "postgres-replica-dsns": lambda out: replica_dsns(out["postgres_member_hosts"]),
    "kafka-bootstrap-servers": lambda out: out["kafka_bootstrap_servers"],
    "kafka-partitions": lambda out: out["kafka_partitions"],
    "kafka-replication": lambda out: out["kafka_replication_factor"],
    "kafka-retention": lambda out: f"{out['settings']['kafka']['retention_hours']}h",
    "warehouse-address": lambda out: f"{out['warehouse_host']}:{out['warehouse_port']}/{out['warehouse_database']}",
    "warehouse-copy-role": lambda out: out["warehouse_copy_role_arn"],
    "staging-bucket": lambda out: out["staging_bucket"],
    "secret-postgres-owner": lambda out: out["secret_arns"]["postgres_owner"],
    "secret-postgres-ingest": lambda out: out["secret_names"]["postgres_ingest"],
    "secret-postgres-query": lambda out: out["secret_names"]["postgres_query"],
    "secret-postgres-relay": lambda out: out["secret_names"]["postgres_relay"],
    "secret-postgres-loader": lambda out: out["secret_names"]["postgres_loader"],
    "secret-postgres-rollup": lambda out: out["secret_names"]["postgres_rollup"],
    "secret-warehouse-loader": lambda out: out["secret_names"]["warehouse_loader"],
    "secret-warehouse-reader": lambda out: out["secret_names"]["warehouse_reader"],
}

# A single database has no standby.
MAY_BE_EMPTY = {"postgres-replica-dsns"}


class Unusable(Exception):
    """The outputs do not fit these manifests; the text says why."""


def replica_dsns(members: Sequence[str]) -> str:
    """ATLASCO_REPLICA_DSNS for the members of a Multi-AZ DB cluster: a connection string for each readable standby.

    Which member writes changes with every failover, so no string names one host. libpq tries the hosts in order and
    takes the first standby: of three members with one writer the order forwards and the order backwards always find
    the two different standbys. `standby` and not `prefer-standby`: without a standby the gateway asks the primary by
    its own connections, under its own limits.
    """
    orders = [list(members), list(reversed(members))][: max(0, len(members) - 1)]
    return ";".join(f"$(ATLASCO_QUERY_DSN) host={','.join(order)} target_session_attrs=standby" for order in orders)


def values_of(outputs: Outputs) -> dict[str, str]:
    """The values that follow from the outputs, by key. Raises Unusable."""
    if outputs.get("namespace") != NAMESPACE:
        raise Unusable(f"the roles in AWS are bound to namespace {outputs.get('namespace')!r}, not to {NAMESPACE!r}")
    values: dict[str, str] = {}
    for key, read in FROM_OUTPUTS.items():
        try:
            value = read(outputs)
        except KeyError as error:
            raise Unusable(f"there is no output for {key}: {error}") from error
        if value is None or (value == "" and key not in MAY_BE_EMPTY):
            raise Unusable(f"the output for {key} is empty: has everything been applied?")
        values[key] = str(value)
    return values


def render(values: Mapping[str, str]) -> str:
    """The text of values.yaml."""
    # JSON strings are YAML strings, and need no thought about quoting.
    return HEADER + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in values.items())


def _tag(text: str) -> str:
    # It becomes the end of a Job's name, whose pods add six characters.
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be lower-case letters, digits and dots, 40 at most")
    return text


def main() -> int:
    """Read outputs from standard input, write values.yaml to standard output; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", type=_tag, required=True, help="of the image, as pushed to the repository")
    parser.add_argument("--trust-domain", required=True, help="SPIFFE trust domain of the devices' certificates")
    parser.add_argument("--public-name", required=True, help="DNS name that devices connect to")
    arguments = parser.parse_args()
    try:
        outputs = {name: output["value"] for name, output in json.load(sys.stdin).items()}
        values = values_of(outputs)
    except (Unusable, ValueError) as error:
        sys.stderr.write(f"values_from_terraform: {error}\n")
        return 1
    values |= {
        "image-tag": arguments.tag,
        "trust-domain": arguments.trust_domain,
        "public-name": arguments.public_name,
    }
    sys.stdout.write(render(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
