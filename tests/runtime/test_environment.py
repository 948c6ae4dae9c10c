"""No telemetry, no name look-up, no file outside run and cache folder, in any process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from limbeck.contract.artifact import Artifact
from tests.serve_bench.tell.runs import make_run, recipe

SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "OMP_WAIT_POLICY")
# A name server on loopback that writes down every name it is asked for.
NAMESERVER = """
import socket, subprocess, sys, threading
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
def answer():
    while True:
        query, client = server.recvfrom(2048)
        print("asked", query[12:].split(bytes(1))[0], file=open(sys.argv[1], "a"))
        server.sendto(query[:2] + b"\\x81\\x83" + query[4:6] + bytes(6) + query[12:], client)
threading.Thread(target=answer, daemon=True).start()
sys.exit(subprocess.run(sys.argv[2:]).returncode)
"""


def clean(**more: str) -> dict[str, str]:
    """The environment of a user who has set none of the switches."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "PYTHONPATH", "LIMBECK_CACHE")
    }
    return kept | more


@pytest.mark.parametrize(
    "module", ["limbeck.__main__", "limbeck.runtime.decoder", "compress", "export", "serve_bench"]
)
def test_switches_are_set_before_a_heavy_library_is_loaded(module: str) -> None:
    code = f"""
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "onnxruntime", "huggingface_hub", "numpy", "transformers"):
            assert all(os.environ.get(switch) for switch in {SWITCHES}), name
sys.meta_path.insert(0, Watch())
import {module}
assert all(os.environ.get(switch) for switch in {SWITCHES})
"""
    done = subprocess.run([sys.executable, "-c", code], env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_user_has_set_stays() -> None:
    code = (
        "import os, limbeck; print(os.environ['DO_NOT_TRACK'], os.environ.get('OMP_WAIT_POLICY'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean(DO_NOT_TRACK="0", GOMP_SPINCOUNT="5"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["0", "None"], done.stderr


def test_no_library_loads_native_code_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    libraries = "import bitsandbytes, peft, transformers.utils as found"
    use = f"import limbeck; {libraries}; print(found.is_kernels_available())"
    for code, printed in ((use, "False\n"), ("import kernels", "")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean(PYTHONPATH=f"{tmp_path}:{os.getcwd()}"),
            capture_output=True,
            text=True,
        )
        assert done.stdout == printed, done.stderr
        assert done.stderr == ("" if code == use else "kernels was imported\n")


def test_what_is_measured_waits_as_libgomp_does_by_itself() -> None:
    libgomp = next(Path(find_spec("torch").origin).parent.glob("lib/libgomp*"))  # type: ignore[union-attr,arg-type]
    load = f"import ctypes; ctypes.CDLL({str(libgomp)!r})"
    measured = f"""
import os, sys, limbeck
from limbeck.contract.environment import as_by_default
arguments = [sys.executable, "-c", "import limbeck; " + {load!r}]
os.execve(sys.executable, arguments, as_by_default(os.environ))
"""

    def waiting(code: str, **chosen: str) -> set[str]:
        environment = clean(OMP_DISPLAY_ENV="VERBOSE", **chosen)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        shown = [line.strip() for line in done.stderr.splitlines()]
        return {line for line in shown if line.startswith(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))}

    by_itself = waiting(load)
    assert by_itself == waiting(measured)
    assert by_itself != waiting("import limbeck; " + load)
    active = {"OMP_WAIT_POLICY": "active"}
    assert waiting(load, **active) == waiting(measured, **active) != by_itself


@pytest.fixture
def alone(tmp_path: Path) -> list[str]:
    """A command prefix: a namespace with loopback and our name server as the only network."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "nameserver.py").write_text(NAMESERVER)
    setup = (
        f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && ip link set lo up && exec $0 $@"
    )
    prefix = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", setup]
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs network namespaces (unshare and ip)")
    return [*prefix, sys.executable, str(tmp_path / "nameserver.py"), str(tmp_path / "asked")]


def test_generate_asks_for_no_name_and_writes_no_file(
    served: Artifact, tmp_path: Path, alone: list[str]
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = clean(HOME=str(home), TMPDIR=str(temporary), PYTHONDONTWRITEBYTECODE="1")
    subprocess.run([*alone, "getent", "hosts", "seen.invalid"], env=environment)
    assert "seen" in (tmp_path / "asked").read_text()  # the name server hears a look-up
    (tmp_path / "asked").unlink()
    command = [sys.executable, "-m", "limbeck", "generate", str(served.path), "abc"]
    done = subprocess.run([*alone, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
    assert not [*home.rglob("*"), *temporary.rglob("*")]


# Packets that found no way out of the namespace, of IPv4 and IPv6: a connection to an address.
_LOST = """
rows = [line.split() for line in open("/proc/net/snmp") if line.startswith("Ip:")]
lost = int(dict(zip(*rows))["OutNoRoutes"])
lost += sum(int(l.split()[1]) for l in open("/proc/net/snmp6") if l.startswith("Ip6OutNoRoutes"))
print("lost", lost)
"""
_COMMANDS = """
recipes
validate pico
schema --out recipe.schema.json
doctor --all
plan pico
compress pico --out made
export pico --out made
report run
compare run run
pack made --out packed --zip
sbom made
sign made/onnx --key private.pem
verify made/onnx --key public.pem
generate made abc
init --teacher made/student/model --data text --target-mb 1 --out mine.yaml
eval made --tasks none
"""
# Commands of minutes, on as little as they take.
_LONG_COMMANDS = """
run pico --out whole --set training.tokens=1024 --set bench.minutes=0.05
bench whole --against whole#fp32 --out timed --set bench.minutes=0.05
ablate pico --arms uniform --seeds 1 --out arms --set training.tokens=1024
cache pico --set training.tokens=1024 --set training.teacher_cache=hidden
search pico --out best --set budget.size_mb=0.6 --set budget.tpot_ms=50 SMALL
serve whole --port 8123
"""
_SMALL = (
    "--set training.tokens=2048 --set bench.minutes=0.05 --set search.depths=[1.0,0.5] "
    "--set search.widths=[0.5]"
)
# Serves for a while, answers a request, and is asked to stop.
_SERVE = """
import json, signal, subprocess, sys, time, urllib.request
server = subprocess.Popen(sys.argv[1:])
for attempt in range(60):
    time.sleep(1)
    try:
        urllib.request.urlopen("http://127.0.0.1:8123/health", timeout=5)
        break
    except OSError:
        pass
names = json.load(urllib.request.urlopen("http://127.0.0.1:8123/v1/models"))["data"]
asked = json.dumps({"model": names[0]["id"], "prompt": "abc", "max_tokens": 4}).encode()
request = urllib.request.Request(
    "http://127.0.0.1:8123/v1/completions", asked, {"Content-Type": "application/json"}
)
answer = json.load(urllib.request.urlopen(request, timeout=60))
time.sleep(20)
server.send_signal(signal.SIGTERM)
sys.exit(server.wait() or answer["usage"]["completion_tokens"] != 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("commands", [_COMMANDS, _LONG_COMMANDS], ids=["short", "long"])
def test_no_command_asks_for_a_name_sends_a_packet_or_writes_elsewhere(
    tmp_path: Path, alone: list[str], commands: str
) -> None:
    """Every command but push, which is asked to use the network."""
    folders = {name: tmp_path / name for name in ("home", "tmp", "work")}
    for folder in folders.values():
        folder.mkdir()
    work = folders["work"]
    make_run(work / "run", recipe())
    (work / "text").mkdir()
    (work / "text" / "some.txt").write_text("Some words to read. " * 3000)
    for command in (
        "openssl ecparam -name prime256v1 -genkey -noout -out private.pem",
        "openssl ec -in private.pem -pubout -out public.pem",
    ):
        subprocess.run(command.split(), cwd=work, check=True, capture_output=True)
    (tmp_path / "lost.py").write_text(_LOST)
    (tmp_path / "served.py").write_text(_SERVE)
    script = ""
    for line in commands.strip().splitlines():
        served = f"{sys.executable} {tmp_path}/served.py " if line.startswith("serve") else ""
        asked = f"{served}{sys.executable} -m limbeck {line.replace('SMALL', _SMALL)}"
        script += f"{asked} >> log 2>&1; echo $? {line[:40]}\n"
    (tmp_path / "all.sh").write_text(f"{script}{sys.executable} {tmp_path}/lost.py\n")
    environment = clean(
        HOME=str(folders["home"]), TMPDIR=str(folders["tmp"]), PYTHONDONTWRITEBYTECODE="1",
        LIMBECK_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    done = subprocess.run(
        [*alone, "sh", str(tmp_path / "all.sh")], cwd=work, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[-1] == "lost 0", done
    codes = {line.partition(" ")[2]: line.split()[0] for line in said[:-1]}
    failed = {line for line, code in codes.items() if code != "0" and "eval" not in line}
    assert not failed, (failed, (work / "log").read_text()[-3000:])
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
    assert not [*folders["home"].rglob("*"), *folders["tmp"].rglob("*")]
