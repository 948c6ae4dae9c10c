"""The files of `examples/`: they parse, and the commands, extras and versions in them exist.

hadolint and KubeRay's whole schema are no packages for a test. The Dockerfiles and the RayJob were
checked with them by hand.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from limbeck.app.cli import app

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())
EXAMPLES.append(ROOT / "examples" / "lm-eval" / "make_data.py")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_command_of_ours_exists_with_its_options(path: Path) -> None:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    found = 0
    for line in lines:
        written = re.search(r"(?<![\w/:.-])limbeck ([a-z]+ .*|doctor)$", line)
        if written is None or line.startswith("FROM"):
            continue
        words = shlex.split(re.sub(r"\$\(.*?\)", "x", written[1]).replace("$SLURM_NNODES", "2"))
        COMMANDS[words[0]].make_context(words[0], words[1:])
        found += 1
    assert found


def test_the_script_for_slurm_is_shell() -> None:
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    wanted = re.search(r"#SBATCH --gpus-per-node=(\d+)", script.read_text())
    assert wanted is not None
    assert set(re.findall(r"(?:--gpus|--nproc_per_node) (\d+)", script.read_text())) == {wanted[1]}


def test_the_job_for_kuberay_has_what_its_schema_requires() -> None:
    job = yaml.safe_load((ROOT / "examples" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    assert {"groupName", "maxReplicas", "minReplicas", "template"} <= set(workers)
    assert f"--workers {workers['maxReplicas']} " in job["spec"]["entrypoint"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_service_for_kuberay_has_what_its_schemas_require() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed")
    service = yaml.safe_load((ROOT / "examples" / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema.model_validate(served).applications
    module, _, name = application.import_path.partition(":")
    deploy = importlib.import_module(module)
    deployment = getattr(deploy, name)(application.args)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    assert {"groupName", "maxReplicas", "minReplicas", "template"} <= set(workers)
    replicas = (workers["minReplicas"], workers["maxReplicas"])
    assert replicas == (scaling.min_replicas, scaling.max_replicas)
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert deploy.PROXY.items() <= variables.items()
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    # A pod has the cores of one replica.
    cores = deployment.ray_actor_options["num_cpus"]
    assert int(container["resources"]["requests"]["cpu"]) == cores


def test_the_task_for_skypilot_names_fields_of_a_task() -> None:
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        used = set(re.findall(r"\$\{?([A-Z][A-Z_]*)", script)) - {"PWD", "PATH", "CACHE"}
        assert {name for name in used if not name.startswith("SKYPILOT_")} <= set(task["envs"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_extras_exist(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"'\.\[([a-z,]+)\]'", path.read_text()):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
