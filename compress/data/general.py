"""Text of many kinds, which a form is calibrated on beside the recipe's own.

A rounding that is fitted to the recipe's text alone loses more on text of another kind
(docs/experiments/forms.md). The text is general.txt, and the documentation and library of Python.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

_ROWS = 24
_CHARACTERS = 8_000  # of Python's documentation, and as many of its library
# The short evaluations read the start of the documentation, so this text begins behind it.
_BEHIND = 100_000


def general_rows(
    tokenizer: PreTrainedTokenizerFast, *, width: int, vocabulary: int
) -> list[npt.NDArray[np.int32]]:
    """At most 24 rows of ``width`` tokens, evenly from the whole text.

    Rows with an id of ``vocabulary`` or more are left out.
    """
    own = files("compress.data").joinpath("general.txt").read_text(encoding="utf-8")
    prose = "\n".join(pydoc_data.topics.topics.values())[_BEHIND:][:_CHARACTERS]
    code = Path(json.__file__).with_name("decoder.py").read_text("utf-8")[:_CHARACTERS]
    ids = tokenizer("\n".join((own, prose, code)), add_special_tokens=False)["input_ids"]
    rows = [
        np.array(ids[at : at + width], np.int32)
        for at in range(0, max(len(ids) - width, 0) + 1, width)
    ]
    known = [row for row in rows if row.max() < vocabulary]
    places = np.linspace(0, len(known) - 1, min(_ROWS, len(known)), dtype=int)
    return [known[place] for place in places]
