"""The file system behind a URL, by fsspec's plug-ins."""

from __future__ import annotations

from typing import Any

from limbeck.contract.errors import UserError


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url``, and the path there. Nothing is asked of the service yet.

    Raises `UserError` with the install command if the plug-in is missing, if there is none, and if
    it needs more than a URL or cannot reach its service, which some do at once.
    """
    from fsspec.core import url_to_fs  # slow to import, and seldom needed
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        known = known_implementations[protocol]
        package = known["class"].partition(".")[0]
        if package == "fsspec":  # its own code for the service needs another package
            raise UserError(f"{url}: {known.get('err', error)}.") from None
        raise UserError(
            f"{url}: the Python package {package} is not installed; run: pip install {package}"
        ) from None
    except ValueError:
        raise UserError(
            f"{url}: fsspec knows no {protocol}://; use file, s3, gs or az, or install a plug-in."
        ) from None
    except Exception as error:  # each plug-in has errors of its own
        raise UserError(
            f"{url}: fsspec cannot open it ({type(error).__name__}: {str(error)[:200]}); check the "
            "URL and the network, or use file, s3, gs or az."
        ) from None
    return fs, path.rstrip("/")
