"""One search by several workers: on one machine or several, in a journal or in PostgreSQL."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import compress
from limbeck.app import search as module
from limbeck.app.cli import app
from limbeck.app.search import finals, language, on_ray, rounds, search, state, storage
from limbeck.app.search.candidates import Candidate, Search
from limbeck.app.search.outcome import Found
from limbeck.contract.errors import EnvironmentalError, UserError
from tests.app.search.candidates import LOSSES, pico

SPACE: dict[str, Any] = {
    "budget": {"size_mb": 0.6},
    "search.rungs": [512, 1024],
    "search.finalists": 1,
    "search.depths": [1.0, 0.5, 0.25],
    "search.widths": [0.5, 0.25],
    "search.forms": ["int8-weight"],
    "training.tokens": 2048,
    "training.threads": 1,
}


def measure(_: Search, finalist: Candidate, __: Path) -> None:
    """Stands in for a finalist's whole job."""
    finalist.verdict, finalist.out = "pass", None
    finalist.measured = {"size": 5e5, "tpot_ms": 2.0, "ttft_ms": 9.0, "nll": finalist.nll or 9.0}
    finalist.measured |= {"best_teacher": 3.0}


def worker(folder: str, url: str | None = None, slow: str = "0") -> None:
    """One worker, in a process of its own: real students, of which it prints what it trains."""
    storage.BEAT, storage.GRACE, storage.WAIT, rounds.WAIT = 0.5, 5.0, 0.1, 0.1
    finals._measure, heal = measure, language.heal

    def told(recipe: Any, name: str, *rest: Any) -> Any:
        print(f"begins {name} {rest[-2]}", flush=True)
        found = heal(recipe, name, *rest)
        time.sleep(float(slow))
        print(f"ends {name} {rest[-2]}", flush=True)
        return found

    language.heal = told
    search(pico(**SPACE), out=Path(folder), storage=url)


def result_of(folder: Path) -> list[dict[str, Any]]:
    """Candidates as a search left them, without where a finalist's run lies."""
    return [
        c | {"run": None} for c in json.loads((folder / module.RESULT).read_text())["candidates"]
    ]


# A worker that has ended --------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name, seconds in (
        (storage, "BEAT", 0.05),
        (storage, "GRACE", 0.4),
        (storage, "WAIT", 0.01),
        (rounds, "WAIT", 0.01),
    ):
        monkeypatch.setattr(place, name, seconds)


@pytest.fixture(params=["sqlite", "journal"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    url = f"journal://{tmp_path}/search.log" if request.param == "journal" else None
    return lambda: storage.opened(url, tmp_path, name="students", seed=0)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as on another machine."""
    monkeypatch.setattr(storage, "_system", lambda: "another")


def test_a_worker_of_another_machine_keeps_its_student_while_it_lives(
    place: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place() as theirs, place() as ours:
        rounds._enqueue(theirs.study, [], [("a", 0)], float("inf"))
        trial = storage.ask(theirs.study)
        with theirs.holding(trial):
            elsewhere(monkeypatch)
            until = time.monotonic() + 1.0  # more than twice the grace
            while time.monotonic() < until:
                assert [t.number for t in ours.running(ours.study)] == [trial.number]
                time.sleep(0.05)
        began = time.monotonic()  # its machine was switched off
        while ours.running(ours.study):
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        again = rounds._next(ours, rounds=1, finalists=1, until=float("inf"))
        assert again is not None
        assert (again.number > trial.number, again.user_attrs["student"]) == (True, "a")
        # It was only asleep, and comes back: its student is another's now.
        rounds._tell(theirs.study, trial, (3.0, {}), why="", until=float("inf"))
        assert rounds._losses(ours.study.get_trials(), 0) == {}


def test_two_workers_that_queue_the_same_students_train_each_once(place: Any, quick: None) -> None:
    with place() as one, place() as two:
        pairs = [(name, 0) for name in LOSSES]
        for each in (one, two):  # neither has seen what the other queues
            rounds._enqueue(each.study, [], pairs, float("inf"))
        taken = []
        for each in (one, two) * 2:
            trial = rounds._next(each, rounds=1, finalists=1, until=float("inf"))
            assert trial is not None
            trial.set_user_attr("worker", storage._me())
            taken.append(trial.user_attrs["student"])
            rounds._tell(each.study, trial, (3.0, {}), why="", until=float("inf"))
        assert taken == list(LOSSES)
        assert rounds._next(one, rounds=1, finalists=1, until=float("inf")) is None


def test_a_worker_that_slept_before_it_signed_asks_again(
    place: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place() as other, place() as mine:
        sign, slept = storage._me, []

        def sleep() -> Any:
            if not slept:
                slept.append(other.study.trials[0].number)
                storage.give_back(other.study, slept[0])
            return sign()

        monkeypatch.setattr(storage, "_me", sleep)
        assert storage.ask(mine.study).number == 1
        assert slept == [0]


def test_workers_that_ask_at_the_same_time_get_different_students(place: Any, quick: None) -> None:
    with place() as shared:
        rounds._enqueue(shared.study, [], [(f"s{n}", 0) for n in range(40)], float("inf"))
    taken: list[str] = []
    begin = threading.Barrier(3)

    def work() -> None:
        with place() as mine:
            begin.wait(10)
            while "student" in (trial := storage.ask(mine.study)).user_attrs:
                taken.append(trial.user_attrs["student"])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(taken) == sorted(f"s{n}" for n in range(40))


def test_turns_exclude_each_other_and_those_of_the_dead_end(place: Any, quick: None) -> None:
    inside, most = [0], [0]

    def work() -> None:
        with place() as shared, shared.turn():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            inside[0] -= 1

    with place() as shared:  # a worker that was killed with its turn
        shared._turns.ask().set_user_attr("worker", storage._me() | {"started": 0.0})
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == ([0], [1])


# Machines -----------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, quick: None) -> list[str]:
    """Names of students that were trained; no model is."""
    healed: list[str] = []

    def heal(recipe: Any, name: str, *_: Any) -> tuple[float, dict[str, float]]:
        healed.append(name)
        return 3.0 + len(name) / 100, {}

    monkeypatch.setattr(language, "heal", heal)
    monkeypatch.setattr(compress, "cache_teachers", lambda **_: None)
    monkeypatch.setattr(finals, "_measure", measure)
    return healed


def find(out: Path, url: str) -> Found:
    return search(pico(**SPACE), out=out, storage=url)


def test_another_machine_finds_the_outcome_and_writes_it_to_its_own_folder(
    tmp_path: Path, made_up: list[str]
) -> None:
    url = f"journal://{tmp_path}/shared/search.log"
    first = find(tmp_path / "first", url)
    trained = list(made_up)
    assert len(trained) == len(set(trained)) + len(set(trained)) // 2 > 1  # two rounds
    second = find(tmp_path / "second", url)
    assert made_up == trained
    assert first.exit_code == second.exit_code == 0
    assert second.sentence == first.sentence.replace(str(first.folder), str(second.folder))
    for name in (module.CHOSEN, module.RESULT, module.TABLE, "search.svg", state.MACHINE):
        assert (second.folder / name).exists()
    assert result_of(first.folder) == result_of(second.folder)


def test_a_machine_of_another_kind_is_refused_and_the_result_names_the_kind(
    tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"journal://{tmp_path}/search.log"
    real = module.host()["processor"]
    assert f"All times were taken on {real}." in find(tmp_path / "first", url).sentence
    assert json.loads((tmp_path / "first" / module.RESULT).read_text())["processor"] == real
    (tmp_path / "first" / module.RESULT).unlink()
    with storage.opened(url, tmp_path, name=_name(), seed=0) as shared:
        shared.study.set_user_attr(module.RESULT, None)  # as if the search still went on
    monkeypatch.setattr(module, "host", lambda: {"processor": "Another CPU"})
    for folder in ("first", "second"):
        with pytest.raises(EnvironmentalError) as refused:
            find(tmp_path / folder, url)
        assert f"times on {real}, and this machine has Another CPU" in str(refused.value)


def _name() -> str:
    return f"pico-{state.digest_of(pico(**SPACE))[:16]}"


# Messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("postgresql://me:s3cret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://host/db?user=me&password=s3cret", "postgresql://host/db?password=%2A%2A%2A"),
        ("postgresql+psycopg://me@host/db", "postgresql+psycopg://me@host/db"),
        ("journal:///shared/search.log", "journal:///shared/search.log"),
    ],
)
def test_a_password_is_never_shown(url: str, hidden: str) -> None:
    assert storage.masked(url).startswith(hidden)
    error = RuntimeError("no user me with s3cret")
    if "s3cret" in url:
        assert "s3cret" not in str(storage._unusable(url, error))


@pytest.mark.parametrize(
    "url", ["somewhere", "redis://me:s3cret@host/0", "journal://host/a", "postgresql://me:s3cret@h"]
)
def test_another_storage_is_refused_before_anything_is_written(url: str, tmp_path: Path) -> None:
    given = ["search", "pico", "--set", "budget.size_mb=1", "--out", str(tmp_path / "out")]
    for more in ([], ["--ray", "local"]):
        done = CliRunner().invoke(app, [*given, "--storage", url, *more])
        assert done.exit_code == 2
        assert (
            "expected postgresql://USER@HOST/DATABASE or journal:///FOLDER/FILE.log" in done.stderr
        )
        assert "s3cret" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_storage_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = "postgresql://me:s3cret@127.0.0.1:1/db"
    with pytest.raises(EnvironmentalError, match=r"me:\*\*\*@127\.0\.0\.1:1/db: cannot be used"):
        find(tmp_path / "out", url)


@pytest.mark.parametrize(
    ("driver", "missing", "install"),
    [
        ("", "psycopg", r"'psycopg\[binary\]'"),
        ("+psycopg2", "psycopg2", "psycopg2-binary"),
        ("+pg8000", "pg8000", "pg8000"),
    ],
)
def test_a_driver_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, missing: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing} is not installed; run: pip install {install}"):
        find(tmp_path / "out", f"postgresql{driver}://me@127.0.0.1:1/db")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_tables_that_another_worker_makes_now_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """The second of two workers that make the same tables fails, and finds them a second later."""
    from sqlalchemy.exc import ProgrammingError

    slept, left = list[float](), [ProgrammingError("", {}, Exception("exists"))] * failures

    def made(url: str, **_: Any) -> str:
        if left:
            raise left.pop()
        return url

    monkeypatch.setattr("optuna.storages.RDBStorage", made)
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=slept.append))
    if failures == 3:
        with pytest.raises(ProgrammingError, match="exists"):
            storage._postgresql("postgresql://me@host/db")
    else:
        found: Any = storage._postgresql("postgresql://me@host/db")
        assert found == "postgresql+psycopg://me@host/db"
    assert slept == [1] * min(failures, 2)


def test_a_file_of_the_search_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / storage.STATE).write_text("of mine\n" * 1000)
    with pytest.raises(
        EnvironmentalError, match=rf"^{storage.STATE}: cannot be used \(file is not a database\)\.$"
    ):
        with storage.opened(None, tmp_path / "out", name="students", seed=0):
            pass


def test_a_process_that_ended_and_was_not_waited_for_does_no_work() -> None:
    import psutil

    process = subprocess.Popen(["sleep", "60"])
    worker = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    assert storage._runs(worker)
    process.kill()
    until = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
    assert not storage._runs(worker)
    process.wait()
    assert not storage._runs(worker)


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of mine\n")
    (tmp_path / "other.json").write_text("{}\n")
    for name in ("notes.txt", "other.json"):
        with pytest.raises(EnvironmentalError, match="is no journal of Optuna"):
            find(tmp_path / "out", f"journal://{tmp_path / name}")
    with pytest.raises(EnvironmentalError, match="/dev/null: a folder, pipe or device; name a fil"):
        find(tmp_path / "out", "journal:///dev/null")
    with pytest.raises(EnvironmentalError, match=f"{tmp_path}: a folder, pipe or device; name a"):
        find(tmp_path / "out", f"journal://{tmp_path}")
    assert (tmp_path / "notes.txt").read_text() == "of mine\n"


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster answers there"), ("nowhere", "this is no address")],
)
def test_a_cluster_that_does_not_answer_is_named(address: str, said: str, tmp_path: Path) -> None:
    given = ["search", "pico", "--set", "budget.size_mb=1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*given, "--ray", address])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_workers_of_ray_share_a_journal_in_the_folder_of_the_search(
    tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is stood in for by calls in this process; the slow test below has the real one."""
    started: list[tuple[Any, ...]] = []

    class Here:
        def remote(self, **_: Any) -> Callable[[Any], Any]:
            return lambda work: SimpleNamespace(remote=lambda *given: (work, given))

        def get(self, jobs: list[Any]) -> None:
            for work, given in jobs:
                started.append(given)
                work(*given)

    @contextlib.contextmanager
    def connected(address: str, *, cores: int, **_: Any) -> Iterator[Here]:
        assert (address, cores) == ("local", 2)
        yield Here()

    monkeypatch.setattr(on_ray, "connected", connected)
    found = on_ray.search_on_ray(
        pico(**SPACE), out=tmp_path / "out", storage=None, address="local", workers=2
    )
    assert found.exit_code == 0
    assert len(started) == 2
    assert {given[-1] for given in started} == {f"journal://{tmp_path}/out/journal.log"}
    assert (tmp_path / "out" / "journal.log").exists()
    assert (found.folder / module.CHOSEN).exists()
    assert len(made_up) == len(set(made_up)) + len(set(made_up)) // 2  # nothing twice in a round


# Whole searches -----------------------------------------------------------------------------------


def started(folder: Path, url: str | None, slow: float = 0.0) -> subprocess.Popen[str]:
    code = "import sys; from tests.app.search import test_storage as t; t.worker(*sys.argv[1:])"
    arguments = [str(folder), *([url, str(slow)] if url else [])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


def begun_and_ended(output: str) -> tuple[list[str], list[str]]:
    lines = output.splitlines()
    return tuple(
        [line.removeprefix(word) for line in lines if line.startswith(word)]
        for word in ("begins ", "ends ")
    )  # type: ignore[return-value]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """Candidates of a search by one worker, and the rounds it trained."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        process = started(folder / "out", None)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return result_of(folder / "out"), sorted(begun_and_ended(output)[1])


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server that runs while these tests do. It refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or (os.getuid() == 0 and shutil.which("runuser") is None):
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    folder = Path(tempfile.mkdtemp(prefix="limbeck-postgresql-", dir="/tmp"))
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    (folder / "password").write_text("s3cret\n")
    if os.getuid() == 0:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        as_user = ["runuser", "-u", user, "--"] if os.getuid() == 0 else []
        subprocess.run(
            [*as_user, str(programs[-1] / program), *arguments],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )

    data = str(folder / "data")
    run(
        "initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder}/password", "-N"
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://me:s3cret@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return f"journal://{tmp_path}/search.log"
    found: str = request.getfixturevalue("postgresql")
    return found


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_end_as_one_worker_does(
    alone: tuple[list[dict[str, Any]], list[str]],
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folders are two, as on two machines; the cache of teachers is one."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    victim = started(tmp_path / "victim", url, slow=5.0)  # so it is killed with a student in hand
    other = started(tmp_path / "other", url, slow=0.5)
    assert victim.stdout is not None
    said = ""
    with contextlib.closing(victim.stdout):
        for line in victim.stdout:
            said += line
            if said.count("ends ") == 1 and line.startswith("begins "):
                break
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        said += victim.stdout.read()
    output, _ = other.communicate(timeout=600)
    assert other.returncode == 0
    candidates, trained = alone
    begun, ended = begun_and_ended(said)
    killed_at = begun[-1]
    theirs_begun, theirs = begun_and_ended(output)
    assert len(ended) == 1
    assert killed_at not in ended
    # Each round once, and the one that was in work when its worker was killed once more.
    assert sorted([*ended, *theirs]) == trained
    assert sorted([*begun, *theirs_begun]) == sorted([*trained, killed_at])
    assert [_untimed(c) for c in result_of(tmp_path / "other")] == [_untimed(c) for c in candidates]
    # A third worker on a third machine finds all of it done.
    third = started(tmp_path / "third", url)
    assert third.communicate(timeout=600)[0] == ""
    assert result_of(tmp_path / "third") == result_of(tmp_path / "other")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.suffix == ".log" or b"s3cret" not in path.read_bytes()


def _untimed(candidate: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in candidate.items() if key not in ("predicted", "timed")}


@pytest.mark.slow
def test_a_wrong_password_is_not_repeated(postgresql: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentalError, match="password authentication failed") as refused:
        find(tmp_path / "out", postgresql.replace("s3cret", "wr0ng"))
    assert "wr0ng" not in str(refused.value)


@pytest.mark.slow
def test_workers_on_ray_end_as_one_worker_does(
    alone: tuple[list[dict[str, Any]], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    bench = {"bench.minutes": 0.02, "bench.min_blocks": 3, "training.tokens": 1024}
    found = on_ray.search_on_ray(
        pico(**{**SPACE, **bench}), out=tmp_path / "out", storage=None, address="local", workers=2
    )
    assert found.exit_code in (0, 3), found.sentence
    losses = {c["student"]: (c["nll"], c["tokens"]) for c in result_of(tmp_path / "out")}
    assert losses == {c["student"]: (c["nll"], c["tokens"]) for c in alone[0]}
    assert (tmp_path / "out" / "journal.log").exists()
