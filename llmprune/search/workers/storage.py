"""Where a study is kept: the run's journal file, a PostgreSQL database, or a gRPC proxy before one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    RDBStorage,
    _CachedStorage,
    get_storage,
    run_grpc_proxy_server,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError, ProgrammingError

from llmprune.core.errors import StorageError
from llmprune.search.workers.journal import open_journal

try:
    from grpc import RpcError
except ImportError:  # the extra is not installed, so nothing raises it

    class RpcError(Exception):  # type: ignore[no-redef]
        """Stands in for gRPC's."""


UNREACHABLE = (StorageInternalError, OperationalError, RpcError)
"""What Optuna raises when a storage is away or refuses."""

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60
"""A worker of another host that was not heard of for so long is gone."""

CONNECT_SECONDS = 10
_POSTGRES = "postgresql+psycopg"
# Parts of a query that libpq would take, and that would be shown.
_SECRETS = ("password", "sslpassword")
_FORMS = "postgresql://USER@HOST:PORT/DATABASE or grpc://HOST:PORT"


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """The storage that `url` names; without one, the run's journal file.

    Raises StorageError if the URL is not of a kind we know or its server cannot be reached, RunDirectoryError if the
    journal is damaged.
    """
    # Optuna tells of every new study and trial otherwise, and in an error of a database of its address.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        return open_journal(journal)
    if _is_grpc(url):
        return _open_grpc(url)
    return _open_postgres(_postgres_url(url))


def masked(url: str) -> str:
    """A storage URL without its password, to be shown or written down."""
    try:
        shown = make_url(url).difference_update_query(_SECRETS).render_as_string(hide_password=True)
        return shown.replace(f"{_POSTGRES}://", "postgresql://", 1)
    except (ArgumentError, ValueError):
        # Whatever it is, it may hold a password.
        return f"{url.partition(':')[0]}:***"


@contextmanager
def opened_storage(url: str | None, journal: Path) -> Iterator[BaseStorage]:
    """`open_storage` for as long as the body runs; a storage that goes away meanwhile is one StorageError."""
    storage = open_storage(url, journal)
    try:
        yield storage
    except UNREACHABLE as error:
        raise StorageError(
            f"the study's storage {masked(url) if url else journal} went away ({_cause(error, url)}); "
            "finished trials are safe: start the same command again once it is back"
        ) from None
    finally:
        close_storage(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a storage that `open_storage` opened."""
    if isinstance(storage, GrpcStorageProxy):
        storage.close()
    elif isinstance(storage, _CachedStorage):
        storage._backend.engine.dispose()


def serve_proxy(url: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve a database to workers that cannot reach it themselves; returns when it is stopped.

    Raises StorageError if the database or the port cannot be used.
    """
    if _is_grpc(url):
        raise StorageError(f"a proxy stands before a database, got {masked(url)}; use --storage postgresql://...")
    storage = _open_postgres(_postgres_url(url))
    _require("grpc", "grpc", "a storage proxy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        say(f"{masked(url)} is served to workers at grpc://{host}:{port} until this process ends")
        try:
            run_grpc_proxy_server(storage, host=host, port=port)
        except RuntimeError:
            raise StorageError(f"cannot listen on {host}:{port}; name another --host or --port") from None
        finally:
            close_storage(storage)


def _is_grpc(url: str) -> bool:
    return url.partition("://")[0] == "grpc"


def _open_grpc(url: str) -> BaseStorage:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path.strip("/") or parts.username is not None:
        raise StorageError(f"a proxy's address is grpc://HOST:PORT, got {masked(url)}")
    _require("grpc", "grpc", "a grpc:// storage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = GrpcStorageProxy(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError:
        storage.close()
        raise StorageError(
            f"no storage proxy answers at {masked(url)} within {CONNECT_SECONDS} s; start one there with "
            "llmprune storage-proxy"
        ) from None
    return storage


def _postgres_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise StorageError(f"--storage is {_FORMS}, got {masked(text)}") from None
    if url.drivername not in ("postgresql", "postgres", _POSTGRES):
        raise StorageError(f"--storage is {_FORMS}, got {masked(text)}; leave it out for the run's journal file")
    if not url.host or not url.database:
        raise StorageError(f"--storage needs a host and a database, as in {_FORMS}; got {masked(text)}")
    if secret := next((name for name in _SECRETS if name in url.query), None):
        raise StorageError(
            f"--storage takes no {secret} behind a ?, got {masked(text)}; write it before the host, as in "
            "postgresql://USER:PASSWORD@HOST, or set PGPASSWORD"
        )
    return url.set(drivername=_POSTGRES)


def _open_postgres(url: URL) -> BaseStorage:
    _require("psycopg", "postgres", "a postgresql:// storage")
    text = url.render_as_string(hide_password=False)
    # Optuna fills {placeholders} in; ours has none.
    template = text.replace("{", "{{").replace("}", "}}")
    try:
        try:
            return _database(template)
        except (IntegrityError, ProgrammingError):
            # Another process made the tables at the same moment.
            return _database(template)
    except (DatabaseError, StorageInternalError) as error:
        raise StorageError(
            f"cannot use the database {masked(text)}: {_cause(error, text)}; check that the server runs, and the "
            "user, password and database"
        ) from None


def _database(template: str) -> BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            template,
            # A connection that idled through a long trial may have been cut on the way.
            engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
        )
    return get_storage(storage)


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise StorageError(f"{purpose} needs the package {module}; pip install 'llmprune[{extra}]'")


def _cause(error: BaseException, url: str | None) -> str:
    """The driver's own words, one line, without the password."""
    cause: BaseException = error
    while isinstance(cause, StorageInternalError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, DatabaseError) and cause.orig is not None:
        cause = cause.orig
    text = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, RpcError):
        text = "the proxy does not answer, or its database is away"
    try:
        password = make_url(url).password if url else None
    except (ArgumentError, ValueError):
        password = None
    return text.replace(str(password), "***") if password else text
