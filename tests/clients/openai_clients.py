"""LangChain and LiteLLM against a running server: what they read, as one line of JSON.

Argument: the server's address up to /v1. Runs in an environment of its own (`make test-clients`).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL, KEY = sys.argv[1], "pico", "none"
COLOUR = {
    "title": "colour",
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
ASKED = [SystemMessage("Be brief."), HumanMessage("Who are you?", name="me")]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


def langchain() -> dict[str, Any]:
    common: dict[str, Any] = {"base_url": URL, "api_key": KEY, "model": MODEL, "temperature": 0}
    chat = ChatOpenAI(**common, max_completion_tokens=12, max_retries=0)
    logged = chat.bind(logprobs=True, top_logprobs=2).invoke(ASKED)
    chosen = ChatOpenAI(**common, max_completion_tokens=60, max_retries=0)
    structured = chosen.with_structured_output(COLOUR, method="json_schema", strict=True)
    turn = chat.invoke([*ASKED, AIMessage("Nobody."), HumanMessage("Really?")])
    return {
        "chat": chat.invoke(ASKED).content,
        "stream": "".join(str(chunk.content) for chunk in chat.stream(ASKED)),
        "structured": structured.invoke(ASKED),
        "logprobs": len(logged.response_metadata["logprobs"]["content"]),
        "usage": turn.usage_metadata["output_tokens"] if turn.usage_metadata else None,
        "text": OpenAI(**common, max_tokens=12, max_retries=0).invoke("Who are you?"),
        "batch": OpenAI(**common, max_tokens=12, n=2, best_of=1, max_retries=0)
        .generate(["Who are you?"])
        .generations[0][1]
        .text,
    }


def lite() -> dict[str, Any]:
    common: dict[str, Any] = {"api_base": URL, "api_key": KEY, "temperature": 0, "max_tokens": 12}
    model, text = f"openai/{MODEL}", f"text-completion-openai/{MODEL}"
    events = litellm.completion(
        model, MESSAGES, stream=True, stream_options={"include_usage": True}, **common
    )
    schema = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR}}
    structured = litellm.completion(
        model, MESSAGES, response_format=schema, **common | {"max_tokens": 60}
    )
    return {
        "structured": json.loads(structured.choices[0].message.content),
        "chat": litellm.completion(model, MESSAGES, **common).choices[0].message.content,
        "stream": "".join(e.choices[0].delta.content or "" for e in events if e.choices),
        "text": litellm.text_completion(model=text, prompt="Who are you?", **common)
        .choices[0]
        .text,
    }


print(json.dumps({"langchain": langchain(), "litellm": lite()}))
