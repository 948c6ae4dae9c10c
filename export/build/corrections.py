"""What ONNX Runtime GenAI's builder gets wrong of some architectures, put right.

Knows the builder 0.18, which was written for the configurations of transformers 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from export.build.choice import KNOWN


def correct_configuration(config: Any) -> None:
    """Change a transformers configuration to what the builder has to read, in place."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type in KNOWN:
        # The class that transformers loads; a file may name another one, or none.
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    match config.model_type:
        case "gemma3_text":
            config.attn_logit_softcapping = None  # transformers reads it and uses it nowhere
        case "phi3" if config.rope_parameters["rope_type"] != "longrope":
            # The builder takes two different lengths for longrope, whatever the type says.
            config.original_max_position_embeddings = config.max_position_embeddings
        case "smollm3":
            # Its class of SmolLM3 gives rope, as an operator of its own, to the layers that have
            # none; that of a llama fuses it. `drop_rope` takes it from these layers.
            config.architectures = ["LlamaForCausalLM"]


@contextlib.contextmanager
def corrected_builder() -> Iterator[None]:
    """Within it, the builder's classes of Gemma read both ropes and the embedding's exact scale."""
    from onnxruntime_genai.models.builder import Gemma3Model, GemmaModel

    plain, third = GemmaModel.__init__, Gemma3Model.__init__

    def with_exact_scale(self: Any, config: Any, *rest: Any) -> None:
        plain(self, config, *rest)
        self.embed_attrs["scale"] = config.hidden_size**0.5  # rounded to two digits there

    def with_both_ropes(self: Any, config: Any, *rest: Any) -> None:
        ropes = config.rope_parameters
        config.rope_parameters = ropes["full_attention"]
        config.rope_theta = ropes["full_attention"]["rope_theta"]
        config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        third(self, config, *rest)

    GemmaModel.__init__, Gemma3Model.__init__ = with_exact_scale, with_both_ropes
    try:
        yield
    finally:
        GemmaModel.__init__, Gemma3Model.__init__ = plain, third
