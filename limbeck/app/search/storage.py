"""Where the searches that work together keep their state: one Optuna storage.

A student in training, and the turn to do what only one worker may do, are Optuna trials. A worker
signs the trials that it holds with its process, and writes to them every `BEAT` seconds. A trial is
given to another worker when its process has ended, or, on another machine, when nothing new was
written to it for `GRACE` seconds. Every worker measures these with its own clock. Optuna's own
heartbeats need `Study.optimize` and a database, and a journal has none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.contract.errors import EnvironmentalError, UserError
from limbeck.contract.files import (
    read_json,
    require_place,
    unwritable_is_a_user_error,
    write_atomically,
)
from limbeck.contract.lock import locked
from limbeck.contract.progress import say, say_once

if TYPE_CHECKING:
    import optuna

STATE = "search.db"
BEAT, GRACE = 15.0, 90.0  # seconds
WAIT = 2.0  # seconds between looks at other workers
_SAME_START = 10.0  # seconds by which two readings of a process's start may differ
_URLS = "expected postgresql://USER@HOST/DATABASE or journal:///FOLDER/FILE.log"


class Shared:
    """The state of one search in its storage, seen by one worker."""

    def __init__(self, study: optuna.Study, turns: optuna.Study) -> None:
        self.study, self._turns = study, turns
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}  # what was written, and when seen

    @contextmanager
    def holding(self, trial: optuna.Trial) -> Iterator[None]:
        """Keep a trial that is signed while the block lasts; if the block raises, give it back."""
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(trial, ended), daemon=True)
        beats.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the block's own error is the one to report
                give_back(trial.study, trial.number)
            raise
        finally:
            ended.set()
            beats.join()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one worker at a time into the block: the one whose trial has the lowest number."""
        mine = ask(self._turns)
        with self.holding(mine):
            while ahead := [t for t in self.running(self._turns) if t.number < mine.number]:
                say_once(f"waiting for another search ({_name(ahead[0])})")
                time.sleep(WAIT)
            yield
        give_back(self._turns, mine.number)

    def running(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """Trials that living workers hold. Those of dead ones are given back."""
        import optuna

        held = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        for trial in held:
            if not self._lives(study, trial):
                say(f"   {_name(trial)} has ended in the middle of its work, which is done again")
                give_back(study, trial.number)
        return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))

    def _lives(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        worker, now = trial.user_attrs.get("worker"), time.monotonic()
        if worker is not None and worker["system"] == _me()["system"]:
            return _runs(worker)
        key, written = (study.study_name, trial.number), (worker, trial.user_attrs.get("beat"))
        before, since = self._seen.get(key, (None, now))
        if before != written:
            since = now
        self._seen[key] = written, since
        return now - since < GRACE

    def fetch(self, path: Path) -> bool:
        """Write a JSON file as the storage has it; False if it is in neither."""
        kept = self.study.user_attrs.get(path.name)
        if kept is not None:
            write_atomically(path, json.dumps(kept, indent=1))
        return path.exists()

    def publish(self, path: Path) -> None:
        """Copy a JSON file to the storage, if there is one."""
        if path.exists():
            self.study.set_user_attr(path.name, read_json(path))


@contextmanager
def opened(url: str | None, folder: Path, *, name: str, seed: int) -> Iterator[Shared]:
    """The state of the search ``name`` in the storage at ``url``.

    Without a URL that is a SQLite file in ``folder``.
    Raises as `masked`, `UserError` if the database's driver is not installed, and
    `EnvironmentalError` for a storage that cannot be used. No message has a password.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    storage = None
    try:
        with locked(folder, wait=True):
            storage = _storage(url, folder)
        study, turns = (
            optuna.create_study(
                study_name=each,
                storage=storage,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=seed),
            )
            for each in (name, f"{name}-turns")
        )
        yield Shared(study, turns)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _unusable(url, error) from None
    finally:
        if isinstance(storage, optuna.storages.RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def masked(url: str) -> str:
    """A storage's URL without its password. Raises `UserError` for a URL of another kind."""
    if url.startswith("journal:///"):
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(f"--storage: this is no URL; {_URLS}.") from None
    if "password" in found.query:
        found = found.update_query_dict({"password": "***"})
    hidden = found.render_as_string(hide_password=True)
    if found.get_backend_name() != "postgresql" or found.database is None:
        raise UserError(f"--storage {hidden}: {_URLS}.")
    return hidden


def _storage(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    if url is None:
        place = (folder / STATE).resolve()
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
        storage = optuna.storages.RDBStorage(f"sqlite:///{place}", engine_kwargs=options)
        _lock_at_begin(storage.engine)
        return storage
    if url.startswith("journal:///"):
        path = Path(url.removeprefix("journal://"))
        with unwritable_is_a_user_error(path.parent, remedy="name another with --storage"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_journal(path)
            return JournalStorage(JournalFileBackend(str(path)))
    return _postgresql(url)


def _lock_at_begin(engine: Any) -> None:
    """Make every transaction of a SQLite engine take the lock of the file when it begins.

    Optuna reads the state of a trial and then writes it. SQLite has no locks of rows, so two
    workers could take the same trial from the queue. The recipe is that of SQLAlchemy's manual.
    """
    from sqlalchemy import event

    engine.dispose()  # connections that were made before

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _require_journal(path: Path) -> None:
    """Raise `EnvironmentalError` for anything but a journal: Optuna would append to it."""
    require_place(path)
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        try:
            json.loads(file.readline())["op_code"]
        except (ValueError, KeyError, TypeError):
            raise EnvironmentalError(
                f"--storage: {path} is no journal of Optuna; name a file that does not exist yet."
            ) from None


def _postgresql(url: str) -> optuna.storages.RDBStorage:
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    given = make_url(url)
    if given.drivername == "postgresql":  # SQLAlchemy 2.0 would take psycopg2
        given = given.set(drivername="postgresql+psycopg")
    tries = 3
    while True:
        tries -= 1
        try:
            return optuna.storages.RDBStorage(
                given.render_as_string(hide_password=False),
                engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
            )
        except ImportError:
            driver = given.get_driver_name()
            package = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}
            raise UserError(
                f"--storage {masked(url)}: the driver {driver} is not installed; run: pip install "
                f"{package.get(driver, driver)}."
            ) from None
        except (IntegrityError, ProgrammingError):  # another worker makes the same tables now
            if not tries:
                raise
            time.sleep(1)


def _unusable(url: str | None, error: Exception) -> EnvironmentalError:
    """The message of a database error, which may have the URL's password in it."""
    cause = error.__cause__ or error
    said = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
    if url is None:
        return EnvironmentalError(f"{STATE}: cannot be used ({said}).")
    from sqlalchemy.engine import make_url

    given = make_url(url)
    for secret in (given.password, given.query.get("password")):
        if secret:
            said = said.replace(str(secret), "***")
    return EnvironmentalError(f"--storage {masked(url)}: cannot be used ({said}).")


# Workers ------------------------------------------------------------------------------------------


def _beat(trial: optuna.Trial, ended: threading.Event) -> None:
    """Write a number to a trial every `BEAT` seconds, until it is over."""
    import optuna

    beats = 0
    while not ended.wait(BEAT):
        beats += 1
        try:
            trial.set_user_attr("beat", beats)
        except optuna.exceptions.UpdateFinishedTrialError:  # it was given to another worker
            return
        except Exception as error:
            say(f"   the storage did not answer ({type(error).__name__}); trying again")


def ask(study: optuna.Study) -> optuna.Trial:
    """The next trial of the queue, signed by this worker; a new one where the queue is empty."""
    import optuna

    while True:
        trial = study.ask()
        try:
            trial.set_user_attr("worker", _me())
            return trial
        except optuna.exceptions.UpdateFinishedTrialError:
            continue  # this process was asleep before it could sign: another gave the trial back


def give_back(study: optuna.Study, number: int) -> None:
    """Let another worker have a trial again; do nothing for one that has ended."""
    import optuna

    # Two workers that see the same dead one may both give its trial back.
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _me() -> dict[str, Any]:
    """This process, as other processes can find it."""
    import psutil

    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    return {"host": platform.node(), "system": _system(), "pid": pid, "started": started}


@functools.cache
def _system() -> str:
    """The start of this system and its table of processes: pids mean the same where it is equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        import psutil

        return f"{platform.node()} {psutil.boot_time():.0f}"


def _runs(worker: dict[str, Any]) -> bool:
    """Whether a process of this system is still that worker."""
    import psutil

    try:
        process = psutil.Process(worker["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() - worker["started"]) < _SAME_START)
    except psutil.NoSuchProcess:
        return False


def _name(trial: optuna.trial.FrozenTrial) -> str:
    worker = trial.user_attrs.get("worker")
    return f"process {worker['pid']} on {worker['host']}" if worker else "a process"
