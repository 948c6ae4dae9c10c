"""The export of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from export.build.backend import Built, build_graphs
from export.check import parity
from export.check.greedy import Answer, answer_greedily, first_differences
from export.check.prompts import require_same_products
from export.folder import adapters
from export.folder.card import Card, in_torch, markdown_table, plain
from export.folder.clients import DTYPES, optimum_loads
from export.folder.ends import end_tokens, first_tokens
from export.gguf.make import card_section, make_ggufs, require_writable
from export.graphs import Graphs, form_files
from export.heldout import heldout_losses, per_token, relative_rise
from export.round.calibrate import calibration_rows
from export.round.matrices import matrices_of
from export.round.mixed import choose_bits, same_bits
from export.round.origin import origins, rounding_of
from export.round.scheme import Scheme, scheme_for
from export.tasks.base import AnyForm, Calibrate, Checked
from limbeck.contract.artifact import Artifact
from limbeck.contract.data.heldout import HELDOUT, load_heldout, mean_nll
from limbeck.contract.errors import ArtifactError
from limbeck.contract.progress import say
from limbeck.contract.recipe import AnyRecipe, MixedByRule, Provider, Recipe, StaticShapes
from limbeck.contract.results.onnx import ExportedForm, GgufFile, KeptAdapter, OnnxResult
from limbeck.runtime.decoder import GraphDecoder

_APART = """\
## The adapter

The graphs hold the base model. What the student learnt is in `{file}` ({bytes} bytes);
`limbeck generate` and the `Adapters` of onnxruntime-genai load it with them. A client without
adapters, such as transformers.js, runs the base alone. `limbeck generate . --adapter FILE` takes
the adapter of any other student of the same base (number {base})."""
_BATCHES = "Batches may be padded on either side."
_STATIC = """\
Elsewhere it runs in plain onnxruntime, one token a run. Clients that read a prompt at once do not
fit its one shape."""


class Language:
    """A causal LM: a graph of the last logits and one of all logits, sharing one weights file."""

    def __init__(
        self, recipe: AnyRecipe, student: Artifact, folder: Path, metadata: Mapping[str, str]
    ) -> None:
        self.recipe, self.student, self.folder = cast(Recipe, recipe), student, folder
        self.metadata = metadata
        self.model = student.path / "model"
        asked = self.recipe.export
        self.provider = asked.provider
        self.keeps_weights = asked.recover is not None or asked.adapters == "separate"
        # The graph is made of the merged student, or of the base that its adapter sits on.
        self.base = _base(student) if asked.adapters == "separate" else None
        self.adapter: Path | None = None
        self._kept: KeptAdapter | None = None
        self._texts: dict[str, npt.NDArray[np.int64]] = {}
        self.cases: dict[str, dict[str, parity.Case]] = {}  # by the file that keeps them
        self._answers: dict[str, Answer] = {}  # of fp32

    def files(self, form: str) -> Graphs:
        """Where the graphs of ``form`` lie."""
        prompt = self.provider == "cpu" and not isinstance(self.recipe.export.shapes, StaticShapes)
        return form_files(self.folder, form, prompt=prompt)

    def build(self) -> Built:
        """Build with the recipe's backend; an adapter that is kept apart becomes inputs of the
        graph.

        Raises `ModelError` as `export.build.backend.build_graphs`.
        """
        asked = self.recipe.export
        if asked.ggufs:  # before minutes of other work
            require_writable(self.model)
        built = build_graphs(
            self.base or self.model,
            self.folder,
            {**self.metadata, "limbeck.form": "fp32"},
            backend=asked.backend,
            provider=asked.provider,
            opset=asked.opset,
            static=asked.shapes if isinstance(asked.shapes, StaticShapes) else None,
        )
        if self.base is not None:
            say("export: keeping the adapter apart from its base")
            number = adapters.base_number(built.graphs)
            updates = adapters.read_updates(self.base, self.student.path / "adapter")
            values = adapters.add_adapter_inputs(built.graphs, updates, base=number)
            self.adapter = self.folder / adapters.ADAPTER
            adapters.write_adapter(self.adapter, values, base=number)
            self._kept = KeptAdapter(adapters.ADAPTER, number, self.adapter.stat().st_size)
        return built

    def answer(self, built: Built) -> None:
        """Torch's answers to held-out text, fed as clients feed a graph."""
        rows = _heldout_rows(self.student.path)
        self._texts = {name: texts[0] for name, texts in rows.items()}
        more = [text for texts in rows.values() for text in texts[1:]]
        cases = parity.make_cases(
            list(self._texts.values()),
            context=built.context,
            more=more,
            first=first_tokens(self.model),
        )
        if self.base is None:
            self.cases = {parity.PARITY: parity.answer(cases, self.model)}
        else:
            adapter = self.student.path / "adapter"
            self.cases = {
                parity.PARITY: parity.answer(cases, self.base, adapter=adapter),
                parity.PARITY_BASE: parity.answer(cases, self.base),
            }
        for name, answered in self.cases.items():
            parity.save_cases(self.folder / name, parity.thin(answered))

    def scheme(
        self, form: AnyForm, built: Built, calibrate: Calibrate
    ) -> tuple[Scheme | None, dict[str, Any] | None]:
        """As the form says; `export.mixed` may choose the bits of int4-weight by matrix."""
        scheme, asked = scheme_for(form, built.width), self.recipe.export
        if form.kind != "int4-weight" or scheme is None or isinstance(asked.mixed, MixedByRule):
            return scheme, None
        if learnt := self.student.result.get("recovery", {}).get("mixed"):
            return same_bits(scheme, learnt)
        return choose_bits(
            asked.mixed,
            self.recipe.gates,
            scheme=scheme,
            graphs=built.graphs,
            model=self.model,
            rows=calibration_rows(self.student.path, form, "set export.mixed: rule"),
            heldout=load_heldout(self.student.path / HELDOUT),
            calibrate=calibrate,
        )

    def check(self, form: str, graphs: Graphs, provider: Provider) -> Checked:
        """Parity with torch, and the first token at which greedy answers differ from fp32's."""
        measured = {}
        for name, cases in self.cases.items():
            adapter = self.adapter if name == parity.PARITY else None
            measured[name] = parity.measure_parity(
                form, graphs, cases, provider=provider, adapter=adapter
            )
            parity.require_parity(form, measured[name])
        require_same_products(form, graphs, list(self._texts.values()))
        decoder = GraphDecoder(graphs.last, provider=provider, adapter=self.adapter)
        if form == "fp32":
            ends = set(end_tokens(self.model))
            self._answers = answer_greedily(decoder, self._texts, stop_ids=ends)
        greedy = first_differences(decoder, self._answers)
        return Checked(measured[parity.PARITY], measured.get(parity.PARITY_BASE), greedy)

    def ggufs(self) -> tuple[dict[str, GgufFile], dict[str, str]]:
        """The merged student as GGUF files, read back and scored."""
        return make_ggufs(
            self.recipe, self.student, self.folder, self.cases[parity.PARITY], self.metadata
        )

    def finish(self, result: OnnxResult, built: Built, scheme: Scheme | None) -> OnnxResult:
        """The adapter; with `export.recover` held-out losses of the shipped form and of fp32."""
        result = replace(result, adapter=self._kept)
        if self.recipe.export.recover is None or scheme is None:
            return result
        heldout, shipped = load_heldout(self.student.path / HELDOUT), result.shipped
        blocks = {f: heldout_losses(self.files(f).all, heldout) for f in ("fp32", shipped)}
        losses = {name: per_token(nats, heldout) for name, nats in blocks.items()}
        recovery = self.student.result.get("recovery")
        # The cost of rounding is measured from the student that was distilled: recovery moves the
        # fp32 weights too.
        distilled = recovery["before"]["fp32"] if recovery else losses["fp32"]
        bound = self.recipe.gates.max_quantization_loss
        assert bound is not None
        rise = relative_rise(losses[shipped], distilled)
        say(f"export: rounding costs {shipped} {rise:+.2%} of held-out loss; limit {bound:.2%}")
        matrices = matrices_of(built.graphs, scheme)
        parameters = rounding_of(matrices, origins(matrices, built.graphs, self.model))
        if recovery:
            before, after = mean_nll(recovery["before"]["form"]), mean_nll(losses[shipped])
            say(
                f"export: recovery took the held-out loss of {shipped} "
                f"from {before:.4f} to {after:.4f} nats a token"
            )
            recovery = {
                **recovery,
                "after": {"fp32": losses["fp32"], "form": losses[shipped]},
                "blocks": {"distilled": recovery["distilled"], "shipped": blocks[shipped]},
                "ships": after < before,
            }
        return replace(
            result,
            heldout=losses,
            blocks=blocks,
            rise=rise,
            needs_recovery=rise > bound,
            parameters=parameters,
            recovery=recovery,
        )

    def card(self, result: OnnxResult) -> Card:
        """Parity, greedy answers, held-out loss, and how to run it."""
        nll: Mapping[str, float] = self.student.result.get("nll", {})
        shipped = result.shipped
        measured = result.heldout[shipped] if result.heldout else None
        whose = shipped if measured else in_torch(shipped)
        sections = [*_parity_section(result), *_greedy_section(result), *card_section(result.ggufs)]
        if nll:
            teachers = self.student.result.get("teachers", {})
            sections += _loss_section(nll, teachers, shipped, measured)
        where = _STATIC
        if not isinstance(self.recipe.export.shapes, StaticShapes):
            clients = _clients(result, self.folder)
            where = f"The same folder loads in {clients} and plain onnxruntime. {_BATCHES}"
        sections += [
            "## How to run it",
            f'```sh\nlimbeck generate . "Once upon a time"\n```\n\n{where}',
        ]
        if result.adapter:
            sections.append(_APART.format(**vars(result.adapter)))
        return Card(
            pipeline="text-generation",
            made=f"distilled, exported to ONNX ({result.backend.name}) and shipped as `{shipped}`.",
            measured={name: {"nll": (measured or nll)[name]} for name in nll},
            metrics={"nll": f"nats a token, of {whose}"},
            sections=sections,
        )

    @classmethod
    def verify(cls, folder: Path, result: OnnxResult) -> dict[str, Any]:
        """Parity again, on the artifact's positions; of the base too with separate adapters."""
        files: dict[str, Path | None] = {parity.PARITY: None}
        if result.adapter:
            files = {parity.PARITY: folder / result.adapter.file, parity.PARITY_BASE: None}
        measured: dict[str, Any] = {}
        for name, form in result.forms.items():
            for file, adapter in files.items():
                graphs = Graphs(
                    folder / form.graph,
                    folder / form.all_logits_graph,
                    (folder / form.graph).with_suffix(".onnx_data"),
                    folder / form.prompt_graph if form.prompt_graph else None,
                )
                found = parity.measure_parity(
                    name,
                    graphs,
                    parity.load_cases(folder / file),
                    provider=parity.provider_here(cast(Provider, form.provider)),
                    adapter=adapter,
                )
                parity.require_parity(name, found)
                measured.setdefault(name, found)
        return measured


def _base(student: Artifact) -> Path:
    """The base that the adapter of a LoRA ``student`` sits on."""
    base = student.result.get("base")
    if not base or not (student.path / "adapter").is_dir():
        raise ArtifactError(
            f"{student.path}: found no adapter, which export.adapters: separate keeps; "
            "only LoRA students have one. Set export.adapters: merged."
        )
    if not (Path(base) / "config.json").is_file():
        raise ArtifactError(
            f"{base}: the base of the adapter in {student.path} is gone; run the compress stage "
            "again, or set export.adapters: merged."
        )
    return Path(base)


def _heldout_rows(student: Path) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Rows of held-out tokens by domain, the longest first."""
    if not (student / HELDOUT).is_file():
        raise ArtifactError(
            f"{student}: {HELDOUT} is missing; parity is measured on held-out text. "
            "Run the compress stage again."
        )
    return {
        name: [
            blocks.input_ids[row, : blocks.lengths[row]].astype("int64")
            for row in (-blocks.lengths).argsort(kind="stable")
        ]
        for name, blocks in load_heldout(student / HELDOUT).items()
    }


# The card ----------------------------------------------------------------------------------------


def _parity_section(result: OnnxResult) -> list[str]:
    columns = ["form", "MB", "max logit difference", "KL, nats", "same first choice", "NLL change"]
    rows = [
        [
            f"`{name}`",
            f"{form.bytes / 1e6:.1f}",
            f"{form.parity['max_abs']:.2g}",
            f"{form.parity['kl']:.2g}",
            f"{100 * form.parity['top1']:.1f} %",
            _nll_change(form),
        ]
        for name, form in result.forms.items()
    ]
    positions = result.forms[result.shipped].parity["positions"]
    return [
        "## The graphs against the torch student",
        markdown_table(columns, rows),
        f"On {positions} positions of held-out text, fed as clients feed a graph. The change of "
        "NLL is over one short piece of each domain: enough to see a mistake, too little to say "
        "what rounding costs.",
    ]


def _nll_change(form: ExportedForm) -> str:
    torch = form.parity.get("nll_torch")
    return f"{100 * (form.parity['nll'] / torch - 1):+.2f} %" if torch else ""


def _greedy_section(result: OnnxResult) -> list[str]:
    def cell(answer: Mapping[str, Any]) -> str:
        if answer["lead"] is None:
            return f"all {answer['tokens']}"
        return f"{answer['same']} of {answer['tokens']}, then {answer['lead']:.2g}"

    rows = [
        [f"`{name}`", *map(cell, form.greedy)]
        for name, form in result.forms.items()
        if name != "fp32"
    ]
    if not rows:
        return []
    columns = ["form", *(plain(answer["text"]) for answer in result.forms["fp32"].greedy)]
    return [
        "## Greedy answers against fp32",
        "Tokens in common before the first difference, and by how many logits fp32 preferred its "
        "own token there.",
        markdown_table(columns, rows),
    ]


def _loss_section(
    nll: Mapping[str, float],
    teachers: Mapping[str, Any],
    shipped: str,
    measured: Mapping[str, float] | None,
) -> list[str]:
    arms = {f"`{shipped}`": measured} if measured else {}
    arms |= {"student": nll, **{plain(name): found["nll"] for name, found in teachers.items()}}
    rows = [[plain(name), *(f"{losses[name]:.3f}" for losses in arms.values())] for name in nll]
    note = f"`{shipped}` is what ships; student and teachers are in torch."
    if not measured:
        others = ", and its teachers" if teachers else ""
        note = f"Of {in_torch(shipped)}{others}. What ships is measured by `limbeck bench`."
    return ["## Held-out loss, nats a token", markdown_table(["text", *arms], rows), note]


def in_genai(shipped: str, folder: Path) -> str:
    """How the folder's model runs in GenAI, whose tokenizer puts no token before a text unless it
    is asked to."""
    option = 'tokenizer.update_options(add_special_tokens="true")'
    begins = f", after `{option}` for texts without a chat template" if first_tokens(folder) else ""
    return f"onnxruntime-genai (`{shipped}`{begins})"


def _clients(result: OnnxResult, folder: Path) -> str:
    graph = result.forms[result.shipped].graph
    dtype = DTYPES.get(Path(graph).stem)
    clients = [f"transformers.js (`dtype: {dtype}`)" if dtype else "transformers.js"]
    if result.backend.name == "genai":
        clients.insert(0, in_genai(result.shipped, folder))
    if optimum_loads(folder, folder / graph):
        clients.append("optimum-onnx")
    return ", ".join(clients)
