"""Limbeck: several teacher language models and one recipe in; one small, measured student out.

Importing this package is cheap. It prepares the environment before any heavy library is loaded.
"""

import signal
import sys

# While Python imports the command there is nothing to clean up: Ctrl-C ends it in silence. A
# program that imports this package keeps its own way.
_IS_COMMAND = sys.argv[0].endswith("limbeck") or (sys.argv[0], sys.orig_argv[1:3]) == (
    "-m",
    ["-m", "limbeck"],
)
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from limbeck.contract.environment import prepare  # noqa: E402

__version__ = "0.1.0"

prepare()
