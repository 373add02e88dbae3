"""Every secret that a pod names is made by External Secrets, and documented for making by hand."""

import re

from psycopg.conninfo import conninfo_to_dict

from storage.warehouse.redshift_session import RedshiftLogin
from tests.k8s.manifests import REPOSITORY, Manifests


def named(manifests: Manifests) -> dict[str, set[str]]:
    """The keys that pods read, by secret."""
    keys: dict[str, set[str]] = {}
    for container in manifests.containers():
        for value in manifests.environment(container).values():
            for name, key in re.findall(r"secret:([a-z-]+)/([a-z-]+)", value):
                keys.setdefault(name, set()).add(key)
        for volume in container.pod["volumes"]:
            for source in (volume, *volume.get("projected", {}).get("sources", [])):
                secret = source.get("secret")
                if secret:
                    name = secret.get("secretName") or secret["name"]
                    keys.setdefault(name, set()).update(item["key"] for item in secret.get("items", []))
    return keys


def test_external_secrets_make_what_is_named(prod: Manifests) -> None:
    made = {
        item["spec"]["target"]["name"]: set(item["spec"]["target"]["template"]["data"])
        for item in prod.of_kind("ExternalSecret")
    }
    made |= {item["spec"]["secretName"]: {"tls.crt", "tls.key"} for item in prod.of_kind("Certificate")}
    wanted = named(prod)
    assert made.keys() == wanted.keys()
    for name, keys in wanted.items():
        assert keys <= made[name], name


def test_templates_use_what_is_fetched(prod: Manifests) -> None:
    stores = {item["metadata"]["name"] for item in prod.of_kind("SecretStore")}
    for item in prod.of_kind("ExternalSecret"):
        spec = item["spec"]
        assert spec["secretStoreRef"]["name"] in stores
        fetched = {entry["secretKey"] for entry in spec["data"]}
        used = {
            word
            for template in spec["target"]["template"]["data"].values()
            for word in re.findall(r"\{\{ \.(\w+)", template)
        }
        assert used == fetched


def test_templates_make_connection_strings(prod: Manifests) -> None:
    password = r"it's a \ password"
    templates = prod.get("ExternalSecret", "atlasco-database")["spec"]["target"]["template"]["data"]
    # What the template engine does with `replace`.
    quoted = password.replace("\\", "\\\\").replace("'", "\\'")
    for key, template in templates.items():
        text = re.sub(r"\{\{ \.\w+Password [^}]*\}\}", lambda _: quoted, template)
        text = re.sub(r"\{\{ \.\w+User \}\}", "someone", text)
        assert conninfo_to_dict(text) == {"user": "someone", "password": password}, key
        assert r'replace "\\" "\\\\" | replace "' in template


def test_templates_make_the_warehouses_addresses(prod: Manifests) -> None:
    spec = prod.get("ExternalSecret", "atlasco-warehouse")["spec"]
    secrets = {entry["secretKey"]: entry["remoteRef"]["key"] for entry in spec["data"]}
    templates = spec["target"]["template"]["data"]
    assert templates.keys() == {"loader-dsn", "reader-dsn"}
    for user, other in (("loader", "reader"), ("reader", "loader")):
        text = re.sub(r"\{\{ \.\w+ \}\}", "x", templates[f"{user}-dsn"])
        login = RedshiftLogin.parse(text)
        assert (login.port, login.database) == (5439, "atlasco")
        assert login.host.endswith(".amazonaws.com")
        # Each signs in as itself: the reader's connection string must not be able to write.
        assert f".{user}User" in templates[f"{user}-dsn"] and f".{other}" not in templates[f"{user}-dsn"]
        assert secrets[f"{user}User"] == secrets[f"{user}Password"] == f"atlasco-prod/warehouse/{user}"


def test_the_plain_way_is_documented(manifests: Manifests) -> None:
    guide = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for name, keys in named(manifests).items():
        assert name in guide
        for key in keys:
            assert key in guide, f"{name}/{key}"
    for name in ("atlasco-postgres-ca", "atlasco-device-ca"):
        assert f"create configmap {name}" in guide


def test_config_maps_that_pods_mount_are_made_or_documented(manifests: Manifests) -> None:
    made = {item["metadata"]["name"] for item in manifests.of_kind("ConfigMap")}
    by_hand = {"atlasco-postgres-ca", "atlasco-device-ca"}
    for _, template in manifests.workloads():
        for volume in template["spec"]["volumes"]:
            for source in (volume, *volume.get("projected", {}).get("sources", [])):
                if "configMap" in source:
                    assert source["configMap"]["name"] in made | by_hand
