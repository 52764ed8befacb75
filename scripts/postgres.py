"""A throw-away PostgreSQL server on a free loopback port, for tests and for a try.

    python scripts/postgres.py start     # prints {"url": ..., "directory": ...}
    python scripts/postgres.py stop DIRECTORY

Needs PostgreSQL's own programs: those on PATH, or where Debian, Homebrew or Fedora put them (Debian: `apt-get install
postgresql`). All of the server is in DIRECTORY, below the system's temporary one, and `stop` deletes it. Its one user
has a random password. Nothing is synced to disk: it survives any killed client, and no power cut.

PostgreSQL refuses to run as root; started by root, the server belongs to the user postgres, or else nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

USER = "llmprune"
PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/usr/bin",
)
START_ATTEMPTS = 3


class Server(NamedTuple):
    """A server that runs."""

    url: str
    directory: Path


def programs() -> Path | None:
    """The directory of `initdb` and `pg_ctl`, the newest if there are several; None if PostgreSQL is not installed."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).parent] if on_path else []
    for pattern in PLACES:
        matches = Path("/").glob(pattern.removeprefix("/"))
        found += sorted(matches, key=lambda path: [int(part) for part in path.parts if part.isdigit()], reverse=True)
    return next((path for path in found if (path / "initdb").exists() and (path / "pg_ctl").exists()), None)


def start() -> Server:
    """Make and start a server. Raises SystemExit if PostgreSQL is not installed or does not start."""
    place = programs()
    if place is None:
        raise SystemExit("PostgreSQL is not installed (no initdb and pg_ctl); on Debian: apt-get install postgresql")
    directory = Path(tempfile.mkdtemp(prefix="llmprune-postgres-"))
    password = secrets.token_hex(12)
    secret = directory / "password"
    secret.write_text(password, encoding="ascii")
    if (owner := _owner()) is not None:
        for path in (directory, secret):
            shutil.chown(path, owner)
    data = str(directory / "data")
    login = ("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C")
    _run(str(place / "initdb"), "--pgdata", data, "--no-sync", *login)
    for attempt in range(START_ATTEMPTS):
        port = _free_port()
        # In the file rather than on a command line, which pg_ctl would give to a shell.
        (directory / "data" / "postgresql.auto.conf").write_text(
            f"port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\n"
        )
        started = _run(
            *(str(place / "pg_ctl"), "start", "--pgdata", data, "--wait", "--log", str(directory / "log")),
            check=attempt == START_ATTEMPTS - 1,
        )
        if started:
            break
    return Server(f"postgresql://{USER}:{password}@127.0.0.1:{port}/postgres", directory)


def stop(directory: Path) -> None:
    """Stop the server of a directory that `start` named, and delete it."""
    place = programs()
    assert place is not None, "a server that runs was started with its programs"
    _run(str(place / "pg_ctl"), "stop", "--pgdata", str(directory / "data"), "--mode", "immediate")
    shutil.rmtree(directory)


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server that lives as long as the body runs."""
    server = start()
    try:
        yield server.url
    finally:
        stop(server.directory)


def _run(*command: str, check: bool = True) -> bool:
    """Run one of PostgreSQL's programs as a user it accepts."""
    owner = _owner()
    ended = subprocess.run(
        command,
        # The server would inherit a pipe, and keep it open.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd="/",
        check=False,
        user=owner,
        group=None if owner is None else pwd.getpwnam(owner).pw_gid,
        extra_groups=None if owner is None else [],
    )
    if check and ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit code {ended.returncode}")
    return ended.returncode == 0


def _owner() -> str | None:
    """Whom the server belongs to, if not to us."""
    if os.geteuid() != 0:
        return None
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="start a server and print its URL and directory as JSON")
    commands.add_parser("stop", help="stop a server and delete its directory").add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "start":
        server = start()
        json.dump({"url": server.url, "directory": str(server.directory)}, sys.stdout)
        print()
    else:
        stop(arguments.directory)


if __name__ == "__main__":
    main()
