"""Write the data of the two tasks beside this file, from texts of your own.

    python examples/lm-eval/make_data.py texts/*.txt
    limbeck eval RUN --tasks facts,last_words --include-path examples/lm-eval

`facts.jsonl` holds the facts of Limbeck's own report. `last_words.jsonl` holds passages of the
texts, each with the word that ends it, after LAMBADA (arXiv 1606.06031).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compress.data.evals import facts

HERE = Path(__file__).parent
WORDS, PASSAGES = 50, 200  # words of a passage, and passages of a text at most


def passages(text: str) -> list[dict[str, str]]:
    """Passages from even distances, each cut before its last word."""
    words = re.findall(r"\S+", text)
    starts = range(0, len(words) - WORDS, max((len(words) - WORDS) // PASSAGES, WORDS))
    rows = []
    for start in list(starts)[:PASSAGES]:
        *before, last = words[start : start + WORDS]
        if word := re.match(r"\w+", last):  # without the punctuation behind it
            rows.append({"prompt": " ".join(before), "answer": f" {word[0]}"})
    return rows


def write(name: str, rows: list[dict[str, str]]) -> None:
    """Write ``rows`` as JSON lines."""
    path = HERE / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python examples/lm-eval/make_data.py TEXT_FILE...")
    write("facts", [{"prompt": prompt, "answer": answer} for prompt, answer in facts()])
    texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    write("last_words", [row for text in texts for row in passages(text)])
