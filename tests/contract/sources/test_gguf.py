"""The quick reader of GGUF files is held to the gguf package's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from limbeck.contract.sources.gguf import quick_gguf, quick_reader


def test_the_quick_reader_reads_what_the_package_reads(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_token_list(["<s>", "é", "word"])
    writer.add_token_scores([0.0, -1.5, -2.0])
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor(
        "b", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(file)
    with quick_gguf():
        ours = gguf.GGUFReader(file)
    assert type(ours) is quick_reader()
    assert type(gguf.GGUFReader(file)) is not quick_reader()
    assert {n: f.contents() for n, f in ours.fields.items()} == {
        name: field.contents() for name, field in theirs.fields.items()
    }
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert type(mine.data) is np.ndarray
        assert (mine.name, mine.tensor_type) == (other.name, other.tensor_type)
        np.testing.assert_array_equal(mine.data, other.data)
