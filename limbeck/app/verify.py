"""`limbeck verify` and `limbeck compare`: check a run, and compare two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from limbeck.app.exports import PLAIN, SECOND, SHIPPED
from limbeck.app.run import FOLDERS
from limbeck.app.trust.pack import CERTIFICATE
from limbeck.contract.artifact import MANIFEST, RECOVERED, Artifact, open_artifact
from limbeck.contract.errors import ArtifactError, LimbeckError, QualityError
from limbeck.contract.progress import say


def verify(path: Path, *, quality: bool = True, speed: bool = True, signed: bool = False) -> int:
    """Check every artifact at ``path`` (an artifact or a run), print tables, return the exit code.

    The certificate of a run is replayed; ``quality`` and ``speed`` choose the figures to measure
    again. Without the bench that it was computed from, it needs a signature that holds
    (``signed``). Returns 0 if all holds; 1 if a graph no longer computes what the student computed,
    or a promise of the certificate is broken; 2 if a file is changed, missing or extra, or an
    artifact was made from another one than the one beside it. Raises `ArtifactError` without any
    artifact.
    """
    folders = [path] if (path / MANIFEST).exists() else [path / name for name in FOLDERS.values()]
    if folders != [path]:
        shipped = (path / SHIPPED).resolve()
        beside = (path / name for name in (RECOVERED, PLAIN, SECOND))
        others = [f for f in beside if (f / MANIFEST).exists() and f.resolve() != shipped]
        folders[1:1] = others  # before what was made from them
    if not any((folder / MANIFEST).exists() for folder in folders):
        raise ArtifactError(
            f"{path}: no complete artifact here; expected an artifact or a run folder."
        )
    artifacts: list[Artifact] = []
    complaints: list[LimbeckError] = []
    rows = [["artifact", "kind", "files", "result"]]
    for folder in folders:
        if not (folder / MANIFEST).exists():
            rows.append([folder.name, "", "", "not made yet"])
            continue
        try:
            artifact = open_artifact(folder)
            _require_parents(artifact, artifacts)
        except ArtifactError as error:
            complaints.append(error)
            rows.append([folder.name, "", "", "BROKEN"])
        else:
            artifacts.append(artifact)
            rows.append(
                [folder.name, artifact.kind, str(len(artifact.manifest["files"])), "unchanged"]
            )
    _print_table(rows)
    for artifact in artifacts:
        if artifact.kind == "onnx" and not artifact.result.get("packed"):
            complaints += _verify_graphs(artifact)
    if {"onnx", "bench"} <= {artifact.kind for artifact in artifacts}:
        complaints += _replay(path, quality=quality, speed=speed)
    elif folders != [path] and (path / CERTIFICATE).exists() and not (signed or complaints):
        complaints.append(
            ArtifactError(
                f"{path}: {CERTIFICATE} promises figures that nothing here can show: onnx or bench "
                "is missing. Run that stage, check a signature with --key, or move the file away."
            )
        )
    for complaint in complaints:
        print(f"\n{complaint}")
    code = max((complaint.exit_code for complaint in complaints), default=0)
    print("\nNOT verified" if code else "\nverified")
    return code


def _require_parents(artifact: Artifact, beside: Sequence[Artifact]) -> None:
    for role, digest in artifact.manifest["parents"].items():
        same = [other for other in beside if other.kind == role]
        if same and all(other.digest != digest for other in same):
            raise ArtifactError(
                f"{artifact.path}: was made from another {role} than the one in "
                f"{same[-1].path}; run its stage again."
            )


def _verify_graphs(artifact: Artifact) -> list[LimbeckError]:
    """Measure parity again, print it, and return the errors."""
    import export

    say(f"   running the graphs of {artifact.path.name} again on this machine")
    try:
        measured = export.verify_parity(artifact.path)
    except LimbeckError as error:
        return [error]
    rows = [["form", "positions", "largest logit difference", "KL, nats", "same first choice"]]
    if artifact.result.get("task", "causal-lm") != "causal-lm":
        rows = [["form", "examples", "largest difference", "alike"]]
    for form, parity in measured.items():
        if artifact.result.get("task", "causal-lm") != "causal-lm":
            rows.append(
                [form, str(parity["rows"]), f"{parity['max_abs']:.3g}", f"{parity['alike']:.1%}"]
            )
            continue
        figures = f"{parity['max_abs']:.3g}", f"{parity['kl']:.3g}", f"{parity['top1']:.1%}"
        rows.append([form, str(parity["positions"]), *figures])
    print()
    _print_table(rows)
    return []


def _replay(run: Path, *, quality: bool, speed: bool) -> list[LimbeckError]:
    """Measure the promises of the certificate, print the findings, and return the errors."""
    import serve_bench

    if not (run / CERTIFICATE).exists():
        return [
            ArtifactError(
                f"{run}: {CERTIFICATE} is missing; `limbeck report {run}` writes it again."
            )
        ]
    try:
        findings = serve_bench.replay(run=run, quality=quality, speed=speed)
    except LimbeckError as error:
        return [error]
    rows = [["figure", "certificate", "now", ""]]
    rows += [[found.figure, found.promised, found.found, found.says] for found in findings]
    print()
    _print_table(rows)
    return [
        QualityError(f"certificate: {found.figure} {found.says}.")
        for found in findings
        if not found.holds
    ]


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def compare(
    before: Path,
    after: Path,
    *,
    tolerances: Mapping[str, float],
    across_machines: bool,
    as_json: bool = False,
) -> int:
    """Print the differences of two runs as Markdown or JSON.

    Returns 0 without a regression, 1 with one, 3 if undecided.
    """
    from serve_bench import compare_runs
    from serve_bench.tell.comparison import as_json as to_json
    from serve_bench.tell.comparison import markdown

    found = compare_runs(before, after, tolerances=tolerances, across_machines=across_machines)
    print(json.dumps(to_json(found), indent=1) if as_json else markdown(found), flush=True)
    return found.exit_code
