"""The rendered overlays: rendered once for the whole run."""

import pytest

from tests.k8s.manifests import K8S, OVERLAYS, Manifests, kustomize


@pytest.fixture(scope="session", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """Each overlay."""
    return Manifests(request.param, kustomize(K8S / "overlays" / request.param))


@pytest.fixture(scope="session")
def prod() -> Manifests:
    """The overlay that has everything."""
    return Manifests("prod", kustomize(K8S / "overlays" / "prod"))
