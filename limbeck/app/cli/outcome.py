"""Commands on the results of a run: report, verify, compare, eval, pack, push."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from limbeck.app.cli.base import command, names_in
from limbeck.app.cli.options import (
    ExportedArgument,
    FormOption,
    JsonOption,
    MadeArgument,
    RunArgument,
    ThreadsOption,
)
from limbeck.contract.errors import UserError


@command("report")
def report(run: RunArgument) -> None:
    """Draw report.html and report.json of a finished run again, from the samples it kept.

    The exit code is the verdict's, as that of `limbeck run`.

    \b
    Example:
      limbeck report runs/pico-1a2b3c4d
    """
    from limbeck.app import run as pipeline
    from limbeck.contract.reading import reading

    with reading(run):
        code = pipeline.report(run).exit_code
    raise typer.Exit(code)


@command("verify")
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An artifact or a whole run folder.")
    ],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality", help="Score the shipped form on the held-out text again."
        ),
    ] = True,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time the shipped form again, shortly.")
    ] = True,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="Public key: the signatures of `limbeck sign` must hold too.",
        ),
    ] = None,
) -> None:
    """Check what a run made: the hash of every file, that the graphs still compute what the student
    does, the certificate.

    The certificate of a run folder is replayed: quality to the digit where processor flags,
    provider and libraries are the same, speed within its interval or with what differs. Exit code 0
    when all holds, 1 when a graph computes something else or a promise is broken without a reason,
    2 when a file is changed, missing or extra, or a signature does not hold.

    \b
    Examples:
      limbeck verify runs/pico-1a2b3c4d
      limbeck verify runs/pico-1a2b3c4d --key public.pem
      limbeck verify runs/pico-1a2b3c4d --no-speed
      limbeck verify runs/pico-1a2b3c4d/onnx
    """
    from limbeck.app.given import require_made
    from limbeck.app.verify import verify as check
    from limbeck.contract.reading import reading

    require_made(path, command="verify")
    with reading(path):
        if key is not None:
            from limbeck.app.trust.signing import require_signed

            for signature in require_signed(path, key):
                print(f"{signature}: holds")
        code = check(path, quality=quality, speed=speed, signed=key is not None)
    raise typer.Exit(code)


@command("compare")
def compare(
    before: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="Run folder or bench to compare with.")
    ],
    after: Annotated[Path, typer.Argument(metavar="RUN_B", help="Run folder or bench to judge.")],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="WHAT=SHARE",
            help="Relative change allowed, of speed (default 0.05), quality (0.01), size (0.01) "
            "or memory (0.05). Repeatable.",
        ),
    ] = None,
    across_machines: Annotated[
        bool,
        typer.Option(
            "--across-machines", help="Compare runs of different machines, with a warning."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Did the shipped form get slower, larger or worse from RUN_A to RUN_B? A Markdown table for a
    pull request.

    Batches, cold starts and a server under load are compared where both runs measured them; a
    server's latencies at a rate that both tried, for which the recipe's scenario needs a
    first_rate.

    Exit code 0 when nothing is worse by more than its tolerance, 1 when something is, 3 when an
    interval still reaches past the tolerance, 2 when the runs cannot be compared.

    \b
    Examples:
      limbeck compare runs/main runs/branch
      limbeck compare runs/main runs/branch --tolerance speed=0.1 --tolerance size=0
    """
    from limbeck.app.verify import compare as compare_runs
    from limbeck.contract.reading import reading

    tolerances = _tolerances(tolerance or ())
    with reading(after, before):
        code = compare_runs(
            before, after, tolerances=tolerances, across_machines=across_machines, as_json=as_json
        )
    raise typer.Exit(code)


def _tolerances(given: Sequence[str]) -> dict[str, float]:
    known, found = ("speed", "quality", "size", "memory"), {}
    for entry in given:
        what, _, share = entry.partition("=")
        try:
            found[what] = float(share)
        except ValueError:
            found[what] = -1.0
        if what not in known or not 0 <= found[what] < 10:
            raise UserError(
                f"--tolerance {entry}: expected one of {', '.join(known)} and a share of 0 or "
                "more, such as speed=0.05 for 5 %."
            )
    return found


@command("eval")
def evaluate(
    artifact: ExportedArgument,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks of lm-eval, separated by commas.")],
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="A folder with task files of your own."),
    ] = None,
    form: FormOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Most samples a task. Default: all.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="Examples before each question. Default: the task's."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness on the exported student, on local data, with what is
    deployed.

    Needs the extra [eval]; nothing is fetched, so a task's data must be on this machine.

    \b
    Example:
      limbeck eval runs/pico-1a2b3c4d --tasks facts --include-path examples/lm-eval
    """
    from limbeck.app.given import exported_folder
    from serve_bench.lm_eval import evaluate as run_tasks
    from serve_bench.lm_eval import markdown

    names = names_in(tasks)
    if not names:
        raise UserError("--tasks: found none; name at least one, such as --tasks facts.")
    found = run_tasks(
        exported_folder(artifact, command="eval"),
        tasks=names,
        include_path=include_path,
        form=form,
        limit=limit,
        shots=shots,
        threads=threads,
    )
    print(json.dumps(found, indent=1) if as_json else markdown(found))


@command("pack")
def pack(
    run: MadeArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write; must not be there.")
    ],
    form: Annotated[
        str | None,
        typer.Option("--form", help="Form to pack, such as fp32. Default: the shipped one."),
    ] = None,
    as_zip: Annotated[
        bool, typer.Option("--zip", help="Write DIR.zip beside the folder too.")
    ] = False,
    layout: Annotated[
        Literal["folder", "triton"],
        typer.Option("--layout", help="`triton`: a model repository for Triton Inference Server."),
    ] = "folder",
) -> None:
    """Put together only what ships: one form, tokenizer and configurations, card, licences,
    certificate.

    The folder loads in onnxruntime, onnxruntime-genai, optimum and transformers.js as the exported
    one does.

    \b
    Examples:
      limbeck pack runs/pico-1a2b3c4d --out pico-int8 --zip
      limbeck pack runs/pico-1a2b3c4d --out models --layout triton
    """
    from limbeck.app.trust.pack import pack as pack_run

    packed = pack_run(run, out=out, form=form, as_zip=as_zip, triton=layout == "triton")
    print(f"{packed.folder}: {packed.form}, {packed.files} files, {packed.megabytes:.1f} MB")
    if packed.archive:
        print(f"{packed.archive}: {packed.archive.stat().st_size / 1e6:.1f} MB")


@command("push")
def push(
    run: MadeArgument,
    repository: Annotated[
        str,
        typer.Argument(
            metavar="NAMESPACE/NAME",
            help="Repository on the Hugging Face hub; it is made when it is missing.",
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option("--form", help="Form to push, such as fp32. Default: the shipped one."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload what `limbeck pack` puts together to the Hugging Face hub, in one commit.

    Uses the token of `hf auth login` or of the environment variable HF_TOKEN.

    \b
    Example:
      limbeck push runs/pico-1a2b3c4d my-name/pico
    """
    from limbeck.app.trust.pack import push as push_run

    print(push_run(run, repository, form=form, private=private))


@command("sbom")
def sbom(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="File to write. Default: sbom.cdx.json in the run folder."
        ),
    ] = None,
) -> None:
    """Write a bill of materials (CycloneDX ML-BOM): the model, what went into it, its figures.

    Base, teachers, texts and libraries have digests and licences, as far as each source states one.
    The measured figures have their intervals. Needs cyclonedx-python-lib, of the extra `trust`.

    \b
    Example:
      limbeck sbom runs/pico-1a2b3c4d
    """
    from limbeck.app.trust.sbom import write_sbom

    print(write_sbom(run, out))


@command("sign")
def sign(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run folder, or an exported or packed folder.")
    ],
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="Private elliptic-curve key, PEM.")
    ],
) -> None:
    """Sign what ships, offline, with your key (OpenSSF model signing).

    Signs the exported folder, and the certificate of a run. The signatures lie beside them;
    `limbeck verify --key` checks them with the public key. Needs model-signing, of the extra
    `trust`.

    \b
    Example:
      limbeck sign runs/pico-1a2b3c4d --key private.pem
    """
    from limbeck.app.trust.signing import sign as sign_what_ships

    for signature in sign_what_ships(path, key):
        print(signature)
