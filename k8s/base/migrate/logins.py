"""Make the login roles that the platform's processes connect with, and set their passwords.

    python logins.py DIRECTORY

DIRECTORY is the mounted secret: `owner-dsn`, and one file `<purpose>-dsn` for each process. Every user named there,
the owner aside, becomes a role that may log in with the password given there. It may run any number of times; to take
over a rotated password, run it again. Which role may do what is granted by `atlasco migrate`.
"""

import sys
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

OWNER = "owner-dsn"
# As the program's other commands have it: starting again changes nothing, or may help.
CONFIGURATION, UNREACHABLE = 2, 3


class Unusable(Exception):
    """The secret cannot be used; the text says why, and holds no password."""


def read_logins(directory: Path) -> dict[str, str]:
    """The passwords by user name, the owner left out. Raises Unusable."""
    logins: dict[str, str] = {}
    owner = conninfo_to_dict((directory / OWNER).read_text(encoding="utf-8")).get("user")
    for file in sorted(directory.glob("*-dsn")):
        if file.name == OWNER:
            continue
        try:
            given = conninfo_to_dict(file.read_text(encoding="utf-8"))
        except psycopg.ProgrammingError:
            # The error's own text may quote the password.
            raise Unusable(f"{file.name} is not a connection string") from None
        user, password = str(given.get("user") or ""), str(given.get("password") or "")
        if not user or not password:
            raise Unusable(f"{file.name} needs a user and a password")
        if user == owner:
            raise Unusable(f"{file.name} names the owner: a process must not be able to change the schema")
        if logins.setdefault(user, password) != password:
            raise Unusable(f"{file.name} has another password for {user} than a file before it")
    if not logins:
        raise Unusable(f"{directory} holds no connection strings")
    return logins


def set_logins(connection: psycopg.Connection[tuple[object, ...]], logins: dict[str, str]) -> None:
    """Make the roles that are missing, and set the passwords of all."""
    for user, password in logins.items():
        known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [user]).fetchone()
        # The verifier, not the password: role statements are logged by the database.
        verifier = connection.pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256").decode()
        connection.execute(
            sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(
                sql.SQL("ALTER" if known else "CREATE"), sql.Identifier(user), sql.Literal(verifier)
            )
        )
        sys.stdout.write(f"{user}: {'password set' if known else 'made'}\n")


def main(arguments: list[str]) -> int:
    """Do it; returns the exit code."""
    directory = Path(arguments[0])
    try:
        logins = read_logins(directory)
        with psycopg.connect((directory / OWNER).read_text(encoding="utf-8"), connect_timeout=10) as connection:
            set_logins(connection, logins)
    except (Unusable, FileNotFoundError) as error:
        sys.stderr.write(f"logins: {error}\n")
        return CONFIGURATION
    except psycopg.OperationalError as error:
        sys.stderr.write(f"logins: the database cannot be reached: {error}\n")
        return UNREACHABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
