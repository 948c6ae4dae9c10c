"""The file system behind a URL, by fsspec's plug-ins."""

from __future__ import annotations

from typing import Any

from limbeck.contract.errors import UserError


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url``, and the path there. Nothing is asked of the service yet.

    Raises `UserError` with the install command if the plug-in is missing, or if there is none.
    """
    from fsspec.core import url_to_fs  # slow to import, and seldom needed
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise UserError(
            f"{url}: the Python package {package} is not installed; run: pip install {package}"
        ) from None
    except ValueError:
        raise UserError(
            f"{url}: fsspec knows no {protocol}://; use file, s3, gs or az, or install a plug-in."
        ) from None
    return fs, path.rstrip("/")
