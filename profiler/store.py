"""Costs on disk, so that an operation is measured once per machine."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from actckpt.data.profile import Cost
from actckpt.errors import PlanError
from actckpt.profiler.roofline import Machine

_LOG = logging.getLogger(__name__)
_FILE = "costs-2.sqlite"  # the number changes with the meaning of a row
_TABLES = """
CREATE TABLE IF NOT EXISTS costs (
    environment TEXT, signature TEXT, time_s REAL, workspace_bytes INTEGER, source TEXT,
    PRIMARY KEY (environment, signature)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS machines (environment TEXT PRIMARY KEY, data TEXT) WITHOUT ROWID;
"""


def cache_folder() -> Path:
    """``$ACTCKPT_CACHE``, or where this system keeps caches: on Linux ``~/.cache/actckpt``."""
    set_by_user = os.environ.get("ACTCKPT_CACHE")
    return Path(set_by_user) if set_by_user else user_cache_path("actckpt", appauthor=False)


class CostStore:
    """Costs and machine rates by environment, in one SQLite file that processes share.

    A file that cannot be read is put aside and begun anew; a folder that cannot be written is
    done without. Either logs one warning.
    """

    def __init__(self, folder: Path, environment: str) -> None:
        """
        Args:
            environment: all that costs depend on beside the signature, such as device and versions.
        """
        self.path = folder / _FILE
        self._environment = environment

    def costs(self, signatures: Iterable[str]) -> dict[str, Cost]:
        """The known ones among ``signatures``."""
        wanted = set(signatures)
        rows = self._run(
            "SELECT signature, time_s, workspace_bytes, source FROM costs WHERE environment = ?",
            [(self._environment,)],
        )
        found = {}
        for signature, time_s, workspace_bytes, source in rows:
            if signature in wanted:
                try:
                    found[signature] = Cost(time_s, workspace_bytes, source)
                except (PlanError, TypeError):
                    _LOG.warning("ignored a bad cost in %s", self.path)
        return found

    def put(self, costs: Mapping[str, Cost]) -> None:
        """Keeps these costs, all or none."""
        if not costs:
            return
        self._run(
            "INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?, ?)",
            [
                (self._environment, s, c.time_s, c.workspace_bytes, c.source)
                for s, c in costs.items()
            ],
        )

    def machine(self) -> Machine | None:
        """The rates of this environment's device, if they are known."""
        rows = self._run("SELECT data FROM machines WHERE environment = ?", [(self._environment,)])
        try:
            return Machine.from_json(json.loads(rows[0][0])) if rows else None
        except (TypeError, ValueError):
            _LOG.warning("ignored bad machine rates in %s", self.path)
            return None

    def put_machine(self, machine: Machine) -> None:
        """Keeps the rates of this environment's device."""
        self._run(
            "INSERT OR REPLACE INTO machines VALUES (?, ?)",
            [(self._environment, json.dumps(machine.to_json()))],
        )

    def _run(self, statement: str, rows: list[tuple[object, ...]]) -> list[Any]:
        for retry in (True, False):
            try:
                return self._attempt(statement, rows)
            except sqlite3.OperationalError as error:  # locked, read-only, full
                _LOG.warning("profile cache %s is not usable (%s)", self.path, error)
                return []
            except sqlite3.DatabaseError as error:
                _LOG.warning("profile cache %s is corrupted (%s): begun anew", self.path, error)
                if not retry:
                    return []
                self._put_aside()
            except OSError as error:
                _LOG.warning("profile cache %s is not usable (%s)", self.path, error)
                return []
        return []

    def _attempt(self, statement: str, rows: list[tuple[object, ...]]) -> list[Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.executescript(_TABLES)
            if statement.startswith("SELECT"):
                return database.execute(statement, rows[0]).fetchall()
            database.executemany(statement, rows)
        return []

    def _put_aside(self) -> None:
        with suppress(FileNotFoundError):  # another process was first
            os.replace(self.path, self.path.with_suffix(".corrupted"))
