"""Fields of other servers that clients send to any server, at values that change nothing."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

# Samplers and the like of vLLM, SGLang, llama.cpp, KoboldCpp and text-generation-webui, at the
# value at which each does nothing.
OFF: dict[str, Any] = {
    **dict.fromkeys(
        ("top_a", "epsilon_cutoff", "eta_cutoff", "dry_multiplier", "xtc_probability",
         "dynatemp_range", "smoothing_factor", "no_repeat_ngram_size", "mirostat", "mirostat_mode",
         "penalty_alpha", "n_probs", "n_keep", "num_keep", "min_keep", "n_indent",
         "t_max_predict_ms", "prompt_lookup_num_tokens", "max_tokens_second", "min_new_tokens",
         "top_n_tokens", "top_logprobs_num"), 0),
    **dict.fromkeys(("tfs", "tfs_z", "typical", "typical_p", "num_beams", "guidance_scale",
                     "best_of", "length_penalty", "repeat_penalty"), 1),
    **dict.fromkeys(("n_predict", "id_slot", "slot_id", "truncate_prompt_tokens",
                     "logprob_start_len"), -1),
    **dict.fromkeys(("ban_eos_token", "temperature_last", "return_hidden_states", "no_stop_trim",
                     "safe_prompt", "raw", "post_sampling_probs", "return_progress",
                     "use_beam_search", "include_stop_str_in_output", "return_token_ids",
                     "timings_per_token", "echo", "dynamic_temperature", "auto_max_new_tokens",
                     "backend_sampling", "watermark", "return_full_text", "decoder_input_details",
                     "return_logprob", "deferred"), False),
    **dict.fromkeys(("add_bos_token", "do_sample", "early_stopping", "skip_special_tokens",
                     "spaces_between_special_tokens", "detokenize"), True),
}  # fmt: skip
# Names under which clients keep account, and settings of samplers above that are off.
_KEPT = frozenset({
    "cache_prompt", "chat_id", "conversation_id", "dry_allowed_length", "dry_base",
    "dry_penalty_last_n", "dynatemp_exponent", "keep_alive", "litellm_call_id", "message_id",
    "mirostat_eta", "mirostat_tau", "penalty_last_n", "prompt_cache_retention",
    "repeat_last_n", "rid", "session_id", "smoothing_curve", "tags", "trace_id", "xtc_threshold",
})  # fmt: skip


def is_nothing(name: str, value: Any) -> bool:
    """Whether a field that no request has changes nothing at this value."""
    if name in _KEPT or value is None or value in ("", [], {}):
        return True
    return name in OFF and type(value) in (int, float, bool) and value == OFF[name]


def without_empty(given: Any, needed: Set[str]) -> Any:
    """A body without fields that are empty lists, but for those ``needed``.

    PHP writes an empty object as an empty list.
    """
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in given.items() if name in needed or value != []}


def text_part(given: Any, number: int) -> Any:
    """A part of a message as OpenAI writes it. Raises `ValueError` if it is no text."""
    part = {"text": given} if isinstance(given, str) else given
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text"):
        raise ValueError(f"part {number} is of type {kind}; this server takes 'text' alone")
    return part | {"type": "text"}
