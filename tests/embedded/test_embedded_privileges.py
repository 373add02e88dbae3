import os
import stat
import struct
import subprocess

import pytest

from embedded.privileges import Account, open_binaries, open_path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root grants access to another account")

SOMEBODY = Account(64999, 64999)


def reaches(account, path):
    return (
        subprocess.run(
            ["/usr/bin/test", "-r", str(path)],
            check=False,
            cwd="/",
            user=account.uid,
            group=account.gid,
            extra_groups=[],
        ).returncode
        == 0
    )


def entries(path):
    return list(struct.iter_unpack("<HHI", os.getxattr(path, "system.posix_acl_access")[4:]))


def test_search_is_granted_to_the_account_alone(directory):
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    file = closed / "file"
    file.write_text("x")
    file.chmod(0o644)
    assert not reaches(SOMEBODY, file)
    open_path(file, SOMEBODY)
    assert reaches(SOMEBODY, file)
    assert not reaches(Account(64998, 64998), file)
    assert closed.stat().st_mode & stat.S_IRWXO == 0


def test_granting_twice_and_to_two_accounts(directory):
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    file = closed / "file"
    open_path(file, SOMEBODY)
    once = entries(closed)
    open_path(file, SOMEBODY)
    assert entries(closed) == once
    open_path(file, Account(1, 1))
    assert [(tag, who) for tag, _, who in entries(closed) if tag == 2] == [(2, 1), (2, SOMEBODY.uid)]


def test_open_directories_are_left_as_they_are(directory):
    directory.chmod(0o755)
    open_path(directory / "file", SOMEBODY)
    with pytest.raises(OSError):
        os.getxattr(directory, "system.posix_acl_access")


def test_programs_installed_under_a_strict_umask_become_runnable(directory):
    tree = directory / "install" / "bin"
    tree.mkdir(parents=True)
    program, data = tree / "program", tree / "data"
    program.write_text("")
    program.chmod(0o700)
    data.write_text("")
    data.chmod(0o600)
    tree.chmod(0o700)
    open_binaries(directory / "install", SOMEBODY)
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert stat.S_IMODE(data.stat().st_mode) == 0o644
    assert stat.S_IMODE(tree.stat().st_mode) == 0o755
    assert reaches(SOMEBODY, program)
