#!/usr/bin/env bash
# Installs the security scanner into a virtual environment of its own, because it pins versions of
# shared libraries (boto3, pydantic, click) that the platform's own environment must be free to move.
#
#   terraform/checks/install-checkov.sh            installs into .venv-checkov at the repository root
#   PYTHON=python3.12 terraform/checks/install-checkov.sh
set -euo pipefail

version="3.3.30"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${root}/.venv-checkov"
python="${PYTHON:-python3}"

if [[ -x "${venv}/bin/checkov" && "$("${venv}/bin/checkov" --version 2>/dev/null)" == "${version}" ]]; then
  echo "checkov ${version} is already in ${venv}"
  exit 0
fi

"${python}" -m venv --clear "${venv}"
# The environment keeps itself out of version control wherever it is made.
printf '*\n' >"${venv}/.gitignore"
"${venv}/bin/python" -m pip install --quiet --disable-pip-version-check "checkov==${version}"
"${venv}/bin/checkov" --version
