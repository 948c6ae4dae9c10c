"""Models of the hub: in our cache, in the hub client's own, or downloaded."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path

from limbeck.contract.errors import ModelError
from limbeck.contract.sources.places import cache_folder, read_object
from limbeck.contract.sources.weights import check_weights


def hub_snapshot(repository: str, revision: str | None = None) -> Path:
    """Folder of a hub model, downloaded into the cache if it is not there. Raises `ModelError`."""
    found = _cached_snapshot(repository, revision)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cache = _hub_cache()
    try:
        _require_network()
        path = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        name = f"{repository}@{revision}" if revision else repository
        raise ModelError(
            f"{name}: is not in {cache} and cannot be had from the model hub; see to the name, the "
            f"network, or, of a gated model, `hf auth login`: {error}"
        ) from error
    check_weights(Path(path))
    return Path(path)


def hub_tokenizer(repository: str, revision: str) -> Path:
    """Folder with a hub model's tokenizer; no weights are downloaded. Raises `ModelError`."""
    cached = cached_config(repository, revision)
    if cached is not None and (cached / "tokenizer.json").is_file():
        return cached
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cache, patterns = _hub_cache(), ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        _require_network()
        return Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache, allow_patterns=patterns
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{repository}@{revision}: its tokenizer is not in {cache} and cannot be fetched "
            f"({type(error).__name__}). Name a local folder with its tokenizer.json instead."
        ) from error


def hub_config(repository: str, revision: str) -> Path:
    """Folder with a hub model's config.json; only that file is downloaded.

    Raises `ModelError` with the command to run.
    """
    cached = cached_config(repository, revision)
    if cached is not None:
        return cached
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    cache = _hub_cache()
    try:
        _require_network()
        return Path(
            hf_hub_download(repository, "config.json", revision=revision, cache_dir=cache)
        ).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{repository}@{revision}: its config.json is not on this machine and cannot be "
            f"fetched ({type(error).__name__}). Where there is a network, run: "
            f"hf download {repository} config.json "
            f"--revision {revision} --cache-dir {cache} (for a gated model after `hf auth login`)."
        ) from error


def _require_network() -> None:
    """Raise `OSError` if the hub has no address here: its client would try for over a minute.

    Behind a proxy names need no address here, so nothing is checked.
    """
    from huggingface_hub import constants

    if urllib.request.getproxies() or constants.HF_HUB_OFFLINE:
        return
    socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)


def cached_config(repository: str, revision: str | None) -> Path | None:
    """A local hub snapshot with config.json, from our cache or the hub client's own; else None."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for cache in (_hub_cache(), Path(constants.HF_HUB_CACHE)):
        try:
            found = try_to_load_from_cache(
                repository, "config.json", cache_dir=cache, revision=revision
            )
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _cached_snapshot(repository: str, revision: str | None = None) -> Path | None:
    """A snapshot of the hub on this machine with all its weights and a tokenizer."""
    folder = cached_config(repository, revision)
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    index = folder / "model.safetensors.index.json"
    named = read_object(index).get("weight_map") if index.is_file() else None
    wanted = set(map(str, named.values())) if isinstance(named, dict) else {"model.safetensors"}
    return folder if all((folder / name).is_file() for name in wanted) else None


def _hub_cache() -> Path:
    """Cache folder of hub models."""
    return cache_folder() / "hub"
