"""A node's wanted state: one SQLite file, one writer at a time.

The file holds the resources that were applied, whole, and where each came from. It is the only copy of what is wanted;
what is, is in the kernel. A change is written inside a transaction that is committed after the kernel has it: a process
that is killed in between leaves the kernel ahead of the file, and the next change brings both together again.

A `source` is what set a resource: a file's path, or the name of an owner that alone may change it (``lab``).

Every change of objects that no owner has is a generation: its number, time, what asked for it, and each object before and
after. The last `KEPT_GENERATIONS` are kept. What they hold is enough to go back to each: an object is then what it was before
the oldest generation that is undone.

SQLite sees when its own structure is damaged, not when a letter of a document changes: each document is sealed with a hash over
it, its reference and its source. `salvage` moves a damaged file away and gives what can still be trusted. A state that was lost,
in part or whole, carries a mark until every service that the kernel has is wanted by an object again (see `recovery`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from hookline.control._errors import StateDamaged, StateError
from hookline.control.health import ACTIVE, Health, HealthKey
from hookline.control.lives import Leaving, LeavingKey, Lives, boot_id
from hookline.control.pools import State as BackendState
from hookline.control.pools import Target
from hookline.errors import HooklineError
from hookline.model import Resource, parse
from hookline.policy import Direction, RuleSource

SCHEMA_VERSION = 5
KEPT_GENERATIONS = 20
SCHEMA = """
CREATE TABLE IF NOT EXISTS resources (
    reference TEXT PRIMARY KEY,
    source    TEXT NOT NULL,
    document  TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS neighbours (
    address   TEXT NOT NULL,
    interface TEXT NOT NULL,
    PRIMARY KEY (address, interface)
);
CREATE TABLE IF NOT EXISTS generations (
    number    INTEGER PRIMARY KEY AUTOINCREMENT,
    time      REAL NOT NULL,
    cause     TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS generation_changes (
    generation      INTEGER NOT NULL REFERENCES generations (number) ON DELETE CASCADE,
    reference       TEXT NOT NULL,
    source_before   TEXT,
    document_before TEXT,
    source_after    TEXT,
    document_after  TEXT,
    PRIMARY KEY (generation, reference)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS health (
    service  TEXT NOT NULL,
    port     TEXT NOT NULL,
    protocol TEXT NOT NULL,
    address  TEXT NOT NULL,
    number   INTEGER NOT NULL,
    state    TEXT NOT NULL,
    share    INTEGER NOT NULL,
    PRIMARY KEY (service, port, protocol, address, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leaving (
    service  TEXT NOT NULL,
    pool     TEXT NOT NULL,
    address  TEXT NOT NULL,
    number   INTEGER NOT NULL,
    weight   INTEGER NOT NULL,
    name     TEXT NOT NULL,
    deadline REAL NOT NULL,
    removed  INTEGER NOT NULL,
    boot     TEXT NOT NULL,
    PRIMARY KEY (service, pool, address, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rule_numbers (
    policy    TEXT NOT NULL,
    direction TEXT NOT NULL,
    place     INTEGER NOT NULL,
    number    INTEGER NOT NULL UNIQUE,
    PRIMARY KEY (policy, direction, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
"""
STATE_FILE = "state.db"
DAMAGED_FILE = "state.db.damaged"
_LOST = "lost"
_FOLDER = "folder:"
_SEAL_BYTES = 8
LOCK_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Stored:
    """A resource and what set it."""

    resource: Resource
    source: str


@dataclass(frozen=True, slots=True)
class Generation:
    """One change of the wanted state.

    Attributes:
        time: When, in seconds since 1970.
        cause: What asked for it: ``apply a.yaml``, ``delete Service/default/a``, ``rollback to 3``.
        created: References of objects that came with it, ``changed`` and ``removed`` likewise.
    """

    number: int
    time: float
    cause: str
    created: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The generation as plain values."""
        return {
            "generation": self.number,
            "time": self.time,
            "cause": self.cause,
            "created": list(self.created),
            "changed": list(self.changed),
            "removed": list(self.removed),
        }


class State:
    """The wanted state of one node. Open it, and close it or use it as a context manager.

    Args:
        folder: Where ``state.db`` and ``lock`` are; made when it is missing.
        lost: Asked where the file begins anew, for why what was there before is lost; empty: nothing was.

    Attributes:
        fresh: There was no file, or an empty one.

    Raises:
        StateDamaged: The file does not hold what was written to it.
        StateError: The folder or the file cannot be made, read or written.
    """

    def __init__(self, folder: Path, lost: Callable[[], str] = str) -> None:
        self.folder = folder
        self.path = folder / STATE_FILE
        self._data_version = -1
        self.fresh = False
        with self._explained("opened"):
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        try:
            with self._explained("opened"):
                version = self._prepare(lost)
        except BaseException:
            self.close()
            raise
        if version > SCHEMA_VERSION:
            self.close()
            raise StateError(
                f"{self.path} was written by another version of Hookline",
                why=f"it has layout {version}, this version knows up to {SCHEMA_VERSION}",
                remedy="use that version, or move the file away and apply again",
            )

    def _prepare(self, lost: Callable[[], str]) -> int:
        """Sets up the connection, makes the tables that are missing, and gives the layout's number."""
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA journal_mode = WAL")
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        self._connection.execute("PRAGMA foreign_keys = ON")
        self.fresh = version == 0
        if version < SCHEMA_VERSION:  # every layout so far has the tables of the one before, and more
            # In one piece: who is killed here leaves a file that still begins anew, and no loss is forgotten.
            with self.change():
                now: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
                self.fresh = now == 0  # unless another process was faster
                for statement in SCHEMA.split(";"):
                    self._connection.execute(statement)
                if self.fresh:
                    self.mark_lost(lost())
                self._connection.execute(f"PRAGMA user_version = {max(now, SCHEMA_VERSION)}")
        return version

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- reading

    def changed_elsewhere(self) -> bool:
        """Whether another process changed the file since this was last asked; True the first time."""
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        changed = version != self._data_version
        self._data_version = version
        return bool(changed)

    def resources(self) -> dict[str, Stored]:
        """All resources by reference.

        Raises:
            StateError: The file is damaged.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT reference, source, document FROM resources ORDER BY rowid"
            ).fetchall()
            documents = [(one[0], one[1], _unsealed(*one)) for one in rows]
        return {reference: Stored(parse(document), source) for reference, source, document in documents}

    def check(self) -> None:
        """Reads everything and has SQLite check its own structure.

        Raises:
            StateDamaged: Saying what is wrong.
        """
        with self._explained("read"):
            problems = [one for (one,) in self._connection.execute("PRAGMA quick_check(5)") if one != "ok"]
            if problems:
                raise sqlite3.DatabaseError("; ".join(problems))
            rows = self._connection.execute(
                "SELECT reference, source, document FROM resources UNION ALL "
                "SELECT reference, source_before, document_before FROM generation_changes WHERE document_before IS NOT NULL "
                "UNION ALL "
                "SELECT reference, source_after, document_after FROM generation_changes WHERE document_after IS NOT NULL"
            )
            for row in rows:
                _unsealed(*row)
        self.neighbours()
        self.lives()
        self.rule_numbers()

    def lost(self) -> str:
        """Why the state, or a part of it, was lost and is not whole again; empty where it is."""
        with self._explained("read"):
            row = self._connection.execute("SELECT value FROM marks WHERE name = ?", (_LOST,)).fetchone()
        return row[0] if row else ""

    def neighbours(self) -> set[tuple[str, str]]:
        """The (address, interface) pairs whose neighbour entries Hookline made."""
        with self._explained("read"):
            return set(self._connection.execute("SELECT address, interface FROM neighbours").fetchall())

    def rule_numbers(self) -> dict[RuleSource, int]:
        """The numbers of the firewall's rules."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT policy, direction, place, number FROM rule_numbers"
            ).fetchall()
            for _, direction, _, _ in rows:
                if direction not in get_args(Direction):
                    raise ValueError(f"{direction!r} is no direction of a rule")
        return {RuleSource(policy, direction, place): number for policy, direction, place, number in rows}

    def generations(self) -> list[Generation]:
        """The generations that are kept, the newest first."""
        with self._explained("read"):
            heads = self._connection.execute(
                "SELECT number, time, cause FROM generations ORDER BY number DESC"
            ).fetchall()
            rows = self._connection.execute(
                "SELECT generation, reference, document_before IS NULL, document_after IS NULL "
                "FROM generation_changes ORDER BY generation, reference"
            ).fetchall()
        found: dict[int, dict[str, list[str]]] = {}
        for number, reference, was_absent, is_absent in rows:
            kind = "created" if was_absent else "removed" if is_absent else "changed"
            found.setdefault(number, {}).setdefault(kind, []).append(reference)
        return [
            Generation(
                number, at, cause, **{kind: tuple(names) for kind, names in found.get(number, {}).items()}
            )
            for number, at, cause in heads
        ]

    def before_generation(self, number: int) -> dict[str, Stored | None]:
        """Every object that this generation or a later one changed, as it was before; None: it was not there."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT reference, source_before, document_before FROM generation_changes AS one "
                "WHERE generation = (SELECT MIN(generation) FROM generation_changes "
                "WHERE reference = one.reference AND generation >= ?) ORDER BY reference",
                (number,),
            ).fetchall()
            documents = [(one[0], one[1], _unsealed(*one) if one[2] is not None else None) for one in rows]
        return {
            reference: None if document is None else Stored(parse(document), source)
            for reference, source, document in documents
        }

    def lives(self) -> Lives:
        """Health and drains. Drains of another boot are left out: their connections ended with it."""
        with self._explained("read"):
            health = self._connection.execute(
                "SELECT service, port, protocol, address, number, state, share FROM health"
            ).fetchall()
            leaving = self._connection.execute(
                "SELECT service, pool, address, number, weight, name, deadline, removed FROM leaving WHERE boot = ?",
                (boot_id(),),
            ).fetchall()
        with self._explained("read"):
            healths: dict[str, dict[HealthKey, Health]] = {}
            for service, port, protocol, address, number, state, share in health:
                if state not in get_args(BackendState):
                    raise ValueError(f"{state!r} is no state of a backend")
                key = HealthKey(service, port, protocol, ip_address(address), number)
                healths.setdefault(service, {})[key] = Health(state, share)
            leavings: dict[str, dict[LeavingKey, Leaving]] = {}
            for service, pool, text, number, weight, name, deadline, removed in leaving:
                address = ip_address(text)
                target = Target(address, number, weight, name, "draining")
                leaver = LeavingKey(service, int(pool), address, number)
                leavings.setdefault(service, {})[leaver] = Leaving(target, deadline, bool(removed))
        return Lives(healths, leavings)

    # -- writing

    @contextmanager
    def change(self) -> Iterator[State]:
        """A transaction: committed at the end of the block, undone when it raises.

        Raises:
            StateError: The file cannot be written.
        """
        with self._explained("written"):
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        with self._explained("written"):
            self._connection.execute("COMMIT")

    def put(self, stored: Iterable[Stored]) -> None:
        """Adds or replaces resources."""
        with self._explained("written"):
            self._connection.executemany(
                "INSERT INTO resources VALUES (?, ?, ?) ON CONFLICT (reference) DO UPDATE "
                "SET source = excluded.source, document = excluded.document",
                [
                    (
                        item.resource.reference,
                        item.source,
                        _sealed(
                            item.resource.reference, item.source, json.dumps(item.resource.to_document())
                        ),
                    )
                    for item in stored
                ],
            )

    def remove(self, references: Iterable[str]) -> None:
        """Removes resources; those that are not there are passed over."""
        with self._explained("written"):
            self._connection.executemany(
                "DELETE FROM resources WHERE reference = ?", [(reference,) for reference in references]
            )

    @contextmanager
    def generation(self, cause: str, references: Sequence[str]) -> Iterator[int | None]:
        """Notes what the block does to these objects as a generation, and forgets those that are too old. In a transaction.

        Args:
            cause: What asked for it.
            references: The objects that may change; none: there is no generation.

        Yields:
            Its number, None where there is none.
        """
        if not references:
            yield None
            return
        with self._explained("written"):
            number = self._connection.execute(
                "INSERT INTO generations (time, cause) VALUES (?, ?)", (time.time(), cause)
            ).lastrowid
            self._connection.executemany(
                "INSERT INTO generation_changes (generation, reference, source_before, document_before) "
                "SELECT ?1, ?2, (SELECT source FROM resources WHERE reference = ?2), "
                "(SELECT document FROM resources WHERE reference = ?2)",
                [(number, reference) for reference in references],
            )
        yield number
        with self._explained("written"):
            self._connection.execute(
                "UPDATE generation_changes SET (source_after, document_after) = "
                "(SELECT source, document FROM resources WHERE reference = generation_changes.reference) "
                "WHERE generation = ?",
                (number,),
            )
            self._connection.execute(
                "DELETE FROM generations WHERE number <= ?", ((number or 0) - KEPT_GENERATIONS,)
            )

    def mark_lost(self, why: str) -> None:
        """Notes why the state was lost; empty: it is whole again."""
        with self._explained("written"):
            self._connection.execute("DELETE FROM marks WHERE name = ?", (_LOST,))
            if why:
                self._connection.execute("INSERT INTO marks VALUES (?, ?)", (_LOST, why))

    def watched_folders(self) -> dict[str, str]:
        """What `put_watched_folders` noted."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT name, value FROM marks WHERE name GLOB ?", (f"{_FOLDER}*",)
            )
            return {name.removeprefix(_FOLDER): value for name, value in rows}

    def put_watched_folders(self, folders: Mapping[str, str]) -> None:
        """Notes on which file system watched folders are."""
        with self._explained("written"):
            self._connection.executemany(
                "INSERT OR REPLACE INTO marks VALUES (?, ?)",
                [(f"{_FOLDER}{folder}", where) for folder, where in folders.items()],
            )

    def put_neighbours(self, pairs: set[tuple[str, str]]) -> None:
        """Notes exactly these neighbour entries as made by Hookline."""
        with self._explained("written"):
            self._connection.execute("DELETE FROM neighbours")
            self._connection.executemany("INSERT INTO neighbours VALUES (?, ?)", sorted(pairs))

    def put_rule_numbers(self, gone: Iterable[RuleSource], come: Mapping[RuleSource, int]) -> None:
        """Forgets the numbers of rules that go, and notes those of rules that come or have another now."""
        with self._explained("written"):
            self._connection.executemany(
                "DELETE FROM rule_numbers WHERE policy = ? AND direction = ? AND place = ?",
                [(one.policy, one.direction, one.index) for one in (*gone, *come)],
            )
            self._connection.executemany(
                "INSERT INTO rule_numbers VALUES (?, ?, ?, ?)",
                [(one.policy, one.direction, one.index, number) for one, number in come.items()],
            )

    def put_health(self, changes: Mapping[HealthKey, Health]) -> None:
        """Notes the health of some backends; what is active and well needs no row."""
        with self._explained("written"):
            self._connection.executemany(
                "DELETE FROM health WHERE service = ? AND port = ? AND protocol = ? AND address = ? AND number = ?",
                [_health_row(key) for key, health in changes.items() if health == ACTIVE],
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO health VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(*_health_row(key), *health) for key, health in changes.items() if health != ACTIVE],
            )

    def put_lives(self, lives: Lives, services: Iterable[str]) -> None:
        """Notes exactly these lives of some services."""
        boot = boot_id()
        concerned = [(service,) for service in services]
        with self._explained("written"):
            self._connection.executemany("DELETE FROM health WHERE service = ?", concerned)
            self._connection.executemany("DELETE FROM leaving WHERE service = ?", concerned)
            self._connection.executemany(
                "INSERT INTO health VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (*_health_row(key), *health)
                    for (service,) in concerned
                    for key, health in lives.health.get(service, {}).items()
                ],
            )
            self._connection.executemany(
                "INSERT INTO leaving VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(service, str(key.pool), str(key.address), key.number),
                        *(item.target.weight, item.target.name, item.deadline, item.removed, boot),
                    )
                    for (service,) in concerned
                    for key, item in lives.leaving.get(service, {}).items()
                ],
            )

    @contextmanager
    def _explained(self, deed: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, ValueError) as error:
            if is_damage(error):
                raise StateDamaged(
                    f"the node's state cannot be {deed}: {self.path}",
                    why=f"it is damaged: {error}; the kernel goes on as it is",
                    remedy="hookline state repair keeps the file, takes over what can be read, and goes on",
                ) from error
            raise StateError(
                f"the node's state cannot be {deed}: {self.path}",
                why=_reason(error),
                remedy="check the folder's permissions and free space, or set HOOKLINE_STATE to another folder",
            ) from error


def is_damage(error: Exception) -> bool:
    """Whether an error means that the file does not hold what was written to it."""
    if isinstance(error, sqlite3.OperationalError):
        name = getattr(error, "sqlite_errorname", "")
        return name in ("SQLITE_IOERR_SHORT_READ", "SQLITE_CORRUPT") or str(error).startswith(
            ("no such table", "no such column", "Could not decode", "table ")
        )
    return isinstance(error, sqlite3.Error | ValueError)


def _sealed(reference: str, source: str, text: str) -> str:
    return f"{_seal(reference, source, text)} {text}"


def _seal(reference: str, source: str, text: str) -> str:
    content = "\0".join((reference, source, text)).encode()
    return hashlib.blake2b(content, digest_size=_SEAL_BYTES, person=b"state").hexdigest()


def _unsealed(reference: str, source: str, text: str) -> Any:
    """The document of a row.

    Raises:
        ValueError: It is not what was written.
    """
    if not text.startswith("{"):  # else of a version that sealed nothing
        seal, _, text = text.partition(" ")
        if seal != _seal(reference, source, text):
            raise ValueError(f"{reference} is not what was written")
    return json.loads(text)


@dataclass(frozen=True, slots=True)
class Salvage:
    """What was left of a damaged file.

    Attributes:
        path: Where the file was moved to.
        stored: The objects that are what was written.
        unreadable: References of those that are not, as far as they have any.
    """

    path: Path
    stored: tuple[Stored, ...]
    unreadable: tuple[str, ...]


def salvage(folder: Path) -> Salvage:
    """Moves a damaged file away and reads what can be trusted of it. The node's lock is held, and nobody has the file open.

    A file that was moved away before is replaced.
    """
    path = folder / STATE_FILE
    moved = folder / DAMAGED_FILE
    for suffix in ("", "-wal", "-shm"):
        source, target = path.with_name(path.name + suffix), moved.with_name(moved.name + suffix)
        target.unlink(missing_ok=True)
        if source.exists():
            source.rename(target)
    found: dict[str, Stored] = {}
    unreadable: dict[str, None] = {}
    for reference, source_text, text in _readable_rows(moved):
        try:
            resource = parse(_unsealed(reference, source_text, text))
            if resource.reference != reference:
                raise ValueError(reference)
            found[reference] = Stored(resource, source_text)
        except (ValueError, TypeError, AttributeError, HooklineError):
            unreadable[str(reference)] = None
    return Salvage(moved, tuple(found.values()), tuple(name for name in unreadable if name not in found))


def _readable_rows(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Rows of ``resources``: from the first on up to where it is damaged, and from the last on down to there."""
    for order in ("", " DESC"):
        try:
            connection = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error:
            return
        connection.text_factory = lambda data: data.decode(errors="replace")
        try:
            rows = connection.execute(
                f"SELECT reference, source, document FROM resources ORDER BY rowid{order}"
            )
            while (row := rows.fetchone()) is not None:
                yield row
            return
        except sqlite3.Error:
            continue
        finally:
            connection.close()


@contextmanager
def locked(folder: Path, *, wait_seconds: float = 30.0) -> Iterator[None]:
    """Holds the node's lock: one writer at a time. The kernel frees it when the process ends, however that happens.

    Raises:
        StateError: Another process still has it after ``wait_seconds``, or the file cannot be made.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"the node's lock cannot be taken: {path}",
            why=_reason(error),
            remedy="check the folder's permissions, or set HOOKLINE_STATE to another folder",
        ) from error
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "another process"
                    raise StateError(
                        "another change is under way on this node",
                        why=f"process {owner} has held {path} for over {wait_seconds:g} s",
                        remedy="wait for it, or end it",
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
        owner_text = str(os.getpid()).encode()
        if os.pread(descriptor, 32, 0) != owner_text:  # a file system takes milliseconds for each writing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner_text, 0)
        yield
    finally:
        os.close(descriptor)


def _health_row(key: HealthKey) -> tuple[str, str, str, str, int]:
    return key.service, key.port, key.protocol, str(key.address), key.number


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
