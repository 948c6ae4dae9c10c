"""A causal LM as the loss sees it: hidden states and a head.

Shapes: R rows, L positions, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.head import Head
from limbeck.contract.errors import ModelError


@dataclass
class Body:
    """A causal LM seen as hidden states and a head."""

    model: Any  # transformers PreTrainedModel, or PeftModel around one
    adapter: str | None = None
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        self.head = head_of(causal_lm(self.model))

    @property
    def width(self) -> int:
        """d, of the states that enter the head."""
        return int(self.head.weight_Vd.shape[1])

    @property
    def layers(self) -> int:
        """Hidden layers."""
        return int(causal_lm(self.model).config.get_text_config().num_hidden_layers)

    def states(
        self, input_ids_RL: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Last hidden states [R, L, d] and those after each of ``layers`` (counted from 1), in the caller's grad mode.

        Right padding needs no mask: attention is causal, so label positions never see it.
        """
        lm = causal_lm(self.model)
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        body = getattr(lm, lm.base_model_prefix)
        output = body(input_ids=input_ids_RL, use_cache=False, output_hidden_states=bool(layers))
        return output.last_hidden_state, {i: output.hidden_states[i] for i in layers}


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any) -> Head:
    """The head of a causal LM, with the logit scale and soft-capping of the architectures that have them."""
    config, output = model.config.get_text_config(), model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings; only causal language models can be distilled."
        )
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(
        output.weight,
        getattr(output, "bias", None),
        scale,
        getattr(config, "final_logit_softcapping", None),
    )
