"""Recipes and files of text for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from limbeck.contract.recipe import Recipe, parse_recipe


def recipe_of(folder: Path, *paths: str, text: dict[str, Any] | None = None, **data: Any) -> Recipe:
    recipe = parse_recipe(
        {
            "name": "t",
            "data": {
                "domains": [
                    {"name": "d", "text": {"kind": "files", "paths": list(paths), **(text or {})}}
                ],
                **{"block": 16, **data},
            },
            "student": {"kind": "lora", "base": {"kind": "random", "config": {}}},
            "training": {"tokens": 640, "batch_tokens": data.get("block", 16)},
        }
    )
    recipe._folder = folder
    return recipe


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as the file's name says: Parquet, JSON lines, a JSON array, or an Arrow stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
