# syntax=docker/dockerfile:1

# One image for every role: gateway, relay, loader, migration, maintenance, tools.
#
#   docker build --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" \
#       --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)" --sbom=true --tag atlasco/telemetry:0.1.0 .
#
# A release pins the base by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
# 3.11 on purpose: gRPC's event loop integration is slower on 3.12.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    # Every wheel in the version that was tested. The file pins what development needs too; it only constrains, so
    # none of that is installed.
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt

WORKDIR /src

# Dependencies first: this layer is built again when they change, not with every line of code. What embeds servers, and
# what develops, stays out.
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py pyproject.toml > /tmp/requirements.txt \
    # Without pip: the venv goes into the image, the installer does not.
    && python -m venv --without-pip /opt/atlasco \
    # Wheels only: nothing is compiled here, and nothing runs a stranger's build script.
    && pip --python /opt/atlasco/bin/python install --only-binary=:all: --requirement /tmp/requirements.txt \
    # Headers and tests of the large ones: nobody compiles against them or tests them here.
    && cd /opt/atlasco/lib/python3.*/site-packages \
    && rm -rf pyarrow/include pyarrow/tests numpy/_core/include numpy/tests numpy/*/tests

COPY . .
RUN pip --python /opt/atlasco/bin/python install --no-deps . \
    # What a command imports must be installed: find out here, not in a cluster.
    && for command in serve relay load rollup warehouse rebuild migrate maintain tenant pki query simulate; do \
         /opt/atlasco/bin/atlasco "$command" --help > /dev/null || exit 1; \
       done


FROM ${PYTHON_IMAGE} AS runtime

ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
ARG PYTHON_IMAGE

LABEL org.opencontainers.image.title="AtlasCo Telemetry Platform" \
      org.opencontainers.image.description="Gateway, relay, loader and tools of the telemetry platform." \
      org.opencontainers.image.vendor="AtlasCo" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"

# A number, so that Kubernetes can see that it is not root; above 10000, so that it is nobody on the node either.
# The directories are for volumes, which take over their owner.
RUN groupadd --system --gid 10001 atlasco \
    && useradd --system --uid 10001 --gid 10001 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin atlasco \
    && install --directory --owner=10001 --group=10001 /var/lib/atlasco/warehouse /var/lib/atlasco/pki \
    # The installer of the base image: nothing here installs.
    && python -m pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel

COPY --from=build /opt/atlasco /opt/atlasco

ENV PATH=/opt/atlasco/bin:$PATH \
    # A log line leaves at once, also when the process is killed.
    PYTHONUNBUFFERED=1 \
    # The root file system is read-only; the modules were compiled above.
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
WORKDIR /tmp

# gRPC, and health with metrics.
EXPOSE 7070 9464

ENTRYPOINT ["atlasco"]
CMD ["--help"]
