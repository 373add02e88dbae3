"""Running PostgreSQL when we are root: it refuses to, so it gets an unprivileged account.

Root's directories are often closed to others (a home, a `mktemp -d`). The server must reach its data
and its binaries through them, so the account, and nobody else, is granted *search* (not listing) on the
closed ancestors by an access control list; where the file system has none, everybody gets search.
The server keeps no root power of any kind: SQL superusers can read every file that it can.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from embedded.errors import DataDirUnusable

# The account the wheel's own launcher uses, so both find the same one.
_ACCOUNT = "pgserver"
_FALLBACK = "nobody"

_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


@dataclass(frozen=True)
class Account:
    """Who runs the server. None in place of an account means: we do, as we are."""

    uid: int
    gid: int


def account_for(cluster_dir: Path) -> Account | None:
    """Return the account that must run a cluster in `cluster_dir`: None unless we are root.

    An existing cluster keeps its owner. A new one gets the account `pgserver`, which is created when
    missing; where accounts cannot be created (read-only image), `nobody`.
    """
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(FileNotFoundError):
        found = cluster_dir.stat()
        if found.st_uid != 0:
            return Account(found.st_uid, found.st_gid)
    with contextlib.suppress(KeyError):
        return _entry(_ACCOUNT)
    useradd = shutil.which("useradd") or "/usr/sbin/useradd"
    options = ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin"]
    with contextlib.suppress(OSError):
        # Another process may win the race to create it; the look-up below is what counts.
        subprocess.run(
            [useradd, *options, _ACCOUNT],
            check=False,
            capture_output=True,
        )
    try:
        return _entry(_ACCOUNT)
    except KeyError:
        return _entry(_FALLBACK)


def give(path: Path, account: Account | None) -> None:
    """Make `path` the account's own (not what is in it)."""
    if account is not None:
        os.chown(path, account.uid, account.gid)


def open_binaries(tree: Path, account: Account | None) -> None:
    """Make an installed tree readable and its programs runnable for the account.

    Needed after an installation under a strict umask. The tree is public software, so opening it to
    everybody gives nothing away.
    """
    if account is None or not tree.exists():
        return
    open_path(tree, account)
    for directory, _, files in os.walk(tree):
        for path in [Path(directory), *(Path(directory, name) for name in files)]:
            mode = path.lstat().st_mode
            wanted = mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0)
            if not stat.S_ISLNK(mode) and wanted != mode:
                path.chmod(stat.S_IMODE(wanted))


def open_path(path: Path, account: Account | None) -> None:
    """Let the account search every ancestor of `path`. Errors: DataDirUnusable."""
    if account is None:
        return
    for ancestor in path.parents:
        if _can_search(ancestor, account):
            continue
        try:
            _grant_search(ancestor, account)
        except OSError as error:
            raise DataDirUnusable(
                f"{path} lies under {ancestor}, which the unprivileged account that runs PostgreSQL "
                f"(uid {account.uid}) may not enter, and access could not be granted: {error}. "
                "Choose another data directory."
            ) from error


def _entry(name: str) -> Account:
    entry = pwd.getpwnam(name)
    return Account(entry.pw_uid, entry.pw_gid)


def _can_search(directory: Path, account: Account) -> bool:
    found = directory.stat()
    if found.st_uid == account.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == account.gid:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


def _grant_search(directory: Path, account: Account) -> None:
    mode = stat.S_IMODE(directory.stat().st_mode)
    try:
        acl = _with_search(_read_acl(directory, mode), account.uid)
        os.setxattr(directory, _ACL, acl)
    except (AttributeError, OSError):  # no such call on this system, or no lists on this file system
        directory.chmod(mode | stat.S_IXOTH)


def _read_acl(directory: Path, mode: int) -> list[tuple[int, int, int]]:
    try:
        raw = os.getxattr(directory, _ACL)
    except OSError:  # none yet: the list that says the same as the mode
        return [
            (_USER_OBJ, mode >> 6 & 7, _NO_ID),
            (_GROUP_OBJ, mode >> 3 & 7, _NO_ID),
            (_OTHER, mode & 7, _NO_ID),
        ]
    return list(struct.iter_unpack("<HHI", raw[4:]))


def _with_search(entries: list[tuple[int, int, int]], uid: int) -> bytes:
    kept: dict[tuple[int, int], int] = {(tag, who): permissions for tag, permissions, who in entries}
    kept[_USER, uid] = kept.get((_USER, uid), 0) | 1
    # The mask caps every entry but owner and others; without one it equals the group's permissions.
    kept[_MASK, _NO_ID] = kept.get((_MASK, _NO_ID), kept[_GROUP_OBJ, _NO_ID]) | 1
    # The kernel wants the entries ordered by tag, then by id.
    body = b"".join(struct.pack("<HHI", tag, kept[tag, who], who) for tag, who in sorted(kept))
    return struct.pack("<I", _ACL_VERSION) + body
