"""Limbeck: several teacher language models and one recipe in; one small, measured student out.

Importing this package is cheap. It prepares the environment before any heavy library is loaded.
"""

from limbeck.contract.environment import prepare

__version__ = "0.1.0"

prepare()
