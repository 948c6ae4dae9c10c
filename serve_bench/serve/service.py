"""From a request's body to an answer: tokens in, the engine asked, events or one body out."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from limbeck.contract.errors import (
    ClosedError,
    ContextError,
    DataError,
    EnvironmentalError,
    QueueFullError,
)
from limbeck.contract.limits import Limits
from limbeck.runtime.grammar import Grammar, GrammarError, json_rule
from limbeck.runtime.sampling import TokenLogprobs
from serve_bench.serve.answers import (
    ChatCompletion,
    Choice,
    Completion,
    Shape,
    TokenText,
    Usage,
    first_of,
)
from serve_bench.serve.delivery import (
    Answer,
    EventStream,
    Numbered,
    Offer,
    Parts,
    Post,
    late,
    unless_gone,
)
from serve_bench.serve.engine import Engine, Piece, Request, Stream
from serve_bench.serve.gate import ApiError, Visit, bearer, wrong
from serve_bench.serve.metrics import Metrics
from serve_bench.serve.wire import CHOICES, ChatBody, Common, CompletionBody

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
# Threads that turn text into tokens. Each one costs memory: tokenizers caches 10,000 words for it.
_READERS = 2
T = TypeVar("T")


class Service:
    """The work of the endpoints."""

    def __init__(
        self, engine: Engine, metrics: Metrics, *, model: str, fingerprint: str, limits: Limits
    ) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.model, self.fingerprint = model, fingerprint
        self._post: Post | None = None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="limbeck-text")
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="limbeck-grammar")
        self._scorers = ThreadPoolExecutor(1, thread_name_prefix="limbeck-score")
        self._busy = Counter[ThreadPoolExecutor]()  # requests that wait for a thread

    def post(self) -> Post:
        """The way from the engine to the loop that serves."""
        if self._post is None:
            self._post = Post(asyncio.get_running_loop())
        return self._post

    def submit(self, request: Request, put: Callable[[Piece], None]) -> Stream:
        """Hand a request to the engine; its refusals become answers."""
        try:
            stream = self.engine.submit(request, put)
        except ContextError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except DataError as error:
            raise ApiError(400, str(error)) from None
        except QueueFullError as error:
            raise _busy(str(error)) from None
        except ClosedError as error:
            raise ApiError(
                503, str(error), code="shutting_down", headers={"Retry-After": "5"}
            ) from None
        self.metrics.prompt.inc(len(request.ids))
        return stream

    # Prompts --------------------------------------------------------------------------------------

    async def complete(self, http: HttpRequest, body: CompletionBody) -> Response:
        """`/v1/completions`."""
        self._check(body)
        if (count := len(body.prompts) * body.choices) > CHOICES:
            more = f"found {len(body.prompts)} prompts with {body.choices} answers each"
            raise wrong("prompt", f"{more}, {count} in all; at most {CHOICES} are allowed")
        for prompt in body.prompts:
            if isinstance(prompt, str):
                self._fits(prompt)
        try:
            prompts = await self._work(http, self._readers, self._read_prompts, body.prompts)
        except DataError as error:
            raise ApiError(400, str(error), param="prompt") from None
        most = body.max_tokens
        if most is None:
            most = min(self._room(ids, _COMPLETION_TOKENS) for ids in prompts)
        elif most == 0 and not body.echo and body.prompt_logprobs is None:
            raise ApiError(
                400,
                "max_tokens: found 0; Input should be greater than or equal to 1, "
                "unless echo or prompt_logprobs is asked for.",
                param="max_tokens",
            )
        wanted = body.logprobs is not None
        shape = Completion(self.model, self.fingerprint, self._token_text(body), wanted)
        grammar = None
        if body.schema_of_answer is not None:
            lark = f"start: {json_rule(body.schema_of_answer)}"
            grammar = await self._grammar(http, lark, "response_format")
        return await self._answer(http, body, prompts, most, shape, grammar=grammar)

    def _read_prompts(self, prompts: list[str | list[int]]) -> list[list[int]]:
        encode = self.engine.text.encode
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def chat(self, http: HttpRequest, body: ChatBody) -> Response:
        """`/v1/chat/completions`."""
        self._check(body)
        template = self.engine.text.template_for(body.offered)
        if template is None:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions.", param="messages"
            )
        for index, message in enumerate(body.messages):
            if message.tool_calls and "tool_calls" not in template:
                raise _no_place(f"messages.{index}.tool_calls", "tool calls")
            if message.role == "tool" and "tool" not in template:
                raise _no_place(f"messages.{index}.role", "messages of role 'tool'")
        offer = Offer.of(body, self.engine.text)
        messages = [message.plain() for message in body.messages]
        tools = [tool.plain() for tool in body.offered]
        try:
            ids = await self._work(http, self._readers, self._read_chat, body, messages, tools)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        most = body.max_completion_tokens or body.max_tokens
        most = most or self._room(ids, self.limits.max_tokens)
        wanted = bool(body.logprobs)
        shape = ChatCompletion(self.model, self.fingerprint, self._token_text(body), wanted)
        grammar = None
        if (lark := offer.grammar(body)) is not None:
            grammar = await self._grammar(http, lark, "tools" if tools else "response_format")
        return await self._answer(http, body, [ids], most, shape, grammar=grammar, offer=offer)

    def _read_chat(
        self, body: ChatBody, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> list[int]:
        """The tokens of a conversation; of one that cannot fit, only the text is made."""
        text = self.engine.text.rendered(messages, tools, body.variables)
        self._fits(text)
        return self.engine.text.encode_rendered(text)

    async def _grammar(self, http: HttpRequest, lark: str, field: str) -> Grammar:
        """Compile a grammar off the loop. Raises `ApiError` for what cannot be expressed."""
        try:
            return await self._work(http, self._compilers, self.engine.grammars.compile, lark)
        except GrammarError as error:
            raise wrong(field, f"this server cannot follow it: {error}") from None
        except EnvironmentalError as error:
            raise wrong(field, str(error).rstrip(".")) from None

    def _check(self, body: Common) -> None:
        """Raise `ApiError` for fields that do not go together or exceed a limit."""
        limits = self.limits
        if body.model != self.model:
            raise ApiError(
                404,
                f"found model {body.model!r}; this server has {self.model!r}.",
                code="model_not_found",
                param="model",
            )
        if body.stream_options and not body.stream:
            raise wrong("stream_options", "only a stream has any; set stream to true")
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            count = getattr(body, name, None)
            if count is not None and count > limits.max_logprobs:
                most = f"at most {limits.max_logprobs} are allowed here"
                raise wrong(name, f"found {count}; {most}")
        if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
            raise wrong("top_logprobs", "only with logprobs; set logprobs to true")
        for name in ("prompt_logprobs", "echo"):
            if body.stream and getattr(body, name, None) not in (None, False):
                raise wrong(name, "a stream has no prompt; leave it out, or leave out stream")

    def _fits(self, text: str) -> None:
        """Refuse by its bytes a text that cannot fit the context, before it is tokenised."""
        tokenizer, longest = self.engine.text.tokenizer, self.engine.text.longest_token
        most = self.engine.longest * longest * (1 if tokenizer.normalizer is None else 4)
        if len(text) > most or len(text.encode()) > most:
            raise ApiError(
                400,
                f"found a prompt of {len(text.encode())} bytes; the context here is "
                f"{self.engine.longest} tokens, {most} bytes at most. Shorten the prompt.",
                code="context_length_exceeded",
            )

    async def _work(
        self, http: HttpRequest, pool: ThreadPoolExecutor, task: Callable[..., T], *given: Any
    ) -> T:
        """Run ``task`` in a thread of ``pool``, so that the loop goes on.

        A request whose client has left, or whose time is over, gives up its place in the queue.
        Raises `ApiError`, and `ClientGone`.
        """
        if self._busy[pool] > self.engine.max_queue + self.engine.max_batch:
            raise _busy("too many requests wait to be read; try again later.")
        visit: Visit = http.scope["limbeck.visit"]
        self._busy[pool] += 1
        try:
            working = asyncio.get_running_loop().run_in_executor(pool, task, *given)
            left = max(visit.arrived + self.limits.request_timeout - time.monotonic(), 1e-3)
            return await asyncio.wait_for(unless_gone(http, working), left)
        except TimeoutError:
            raise late(self.limits) from None
        finally:
            self._busy[pool] -= 1

    def _token_text(self, body: Common) -> TokenText:
        if body.return_tokens_as_token_ids:
            return lambda token: f"token_id:{token}"
        decode = self.engine.text.tokenizer.decode
        return lambda token: str(decode([token], skip_special_tokens=False))

    def _room(self, ids: list[int], most: int) -> int:
        """Tokens to generate by default: ``most``, or what there is room for."""
        room = min(most, self.limits.max_tokens, self.engine.longest - len(ids))
        return max(room, 1)  # the engine refuses a prompt that is too long

    # Answers --------------------------------------------------------------------------------------

    async def _answer(
        self,
        http: HttpRequest,
        body: Common,
        prompts: list[list[int]],
        most: int,
        shape: Shape,
        *,
        grammar: Grammar | None = None,
        offer: Offer | None = None,
    ) -> Response:
        visit: Visit = http.scope["limbeck.visit"]
        arrived = visit.arrived
        limits, text = self.limits, self.engine.text
        if most > limits.max_tokens:
            raise wrong("max_tokens", f"found {most}; at most {limits.max_tokens} are allowed here")
        if body.min_tokens and body.min_tokens > most:
            raise wrong("min_tokens", f"found {body.min_tokens}; at most max_tokens, {most}")
        timeout = max(limits.request_timeout - (time.monotonic() - arrived), 1e-3)
        stop_ids = frozenset() if body.ignore_eos else text.stop_ids
        request = Request(
            ids=(),
            max_new_tokens=max(most, 1),
            sampling=body.sampling,
            stop_ids=stop_ids | frozenset(body.stop_token_ids or ()),
            stop=body.stops,
            timeout=timeout,
            logprobs=body.wanted_logprobs,
            owner=json.dumps([bearer(http.headers), body.cache_salt]),
            grammar=grammar,
        )
        asked = [replace(request, ids=tuple(ids)) for ids in prompts]
        echoed = [
            replace(choice, index=body.choices * place + choice.index)
            for place, one in enumerate(asked)
            for choice in await self._echo(http, one, body, most)
        ]
        if most == 0:
            for choice in echoed:
                choice.finish = "length"
            visit.usage = lambda: Usage(sum(map(len, prompts)), 0, 0)
            return JSONResponse(shape.whole(echoed, visit.usage()))
        requests = [each for one in asked for each in self._numbered(one, body)]
        answer = Answer(
            self.submit, requests, arrived, self.post(), self.metrics, limits, each=body.choices
        )
        visit.usage = lambda: answer.usage
        parts = Parts(offer)
        try:
            if body.stream:  # an error until the first piece still has a status of its own
                first = await unless_gone(http, answer.next())
                return EventStream(self._events(answer, first, shape, body, parts), answer)
            return await unless_gone(http, self._whole(answer, shape, echoed, parts))
        except BaseException:
            answer.leave()
            raise

    @staticmethod
    def _numbered(request: Request, body: Common) -> list[Request]:
        """One request a choice; each has a seed of its own, the first of a prompt the body's."""
        first, count = body.seed, body.choices
        seeds = [None if first is None else (first + at) % 2**64 for at in range(count)]
        return [replace(request, seed=seed) for seed in seeds]

    async def _echo(
        self, http: HttpRequest, request: Request, body: Common, most: int
    ) -> list[Choice]:
        """Choices that begin with the prompt and its log-probabilities, where wanted."""
        choices = [Choice(index) for index in range(body.choices)]
        echo = isinstance(body, CompletionBody) and bool(body.echo)
        if not echo and body.prompt_logprobs is None:
            return choices
        try:
            self.engine.check(request)
        except ContextError as error:
            if most:  # without an answer the prompt may fill the context
                raise ApiError(400, str(error), code="context_length_exceeded") from None
        except DataError as error:
            raise ApiError(400, str(error)) from None
        found: list[TokenLogprobs] = []
        if body.prompt_logprobs is not None or request.logprobs is not None:
            count = max(body.prompt_logprobs or 0, request.logprobs or 0)
            deadline = time.monotonic() + (request.timeout or 0)
            score = partial(self.engine.scorer.score, request.ids, count, deadline=deadline)
            try:
                found = await self._work(http, self._scorers, score)
            except DataError as error:
                raise ApiError(400, str(error), code="context_length_exceeded") from None
        for choice in choices:
            if body.prompt_logprobs is not None:
                choice.prompt_logprobs = [None, *found]
            if echo:
                choice.text = self.engine.text.tokenizer.decode(list(request.ids))
                if request.logprobs is not None:
                    choice.logprobs = [first_of(request.ids[0]), *found]
        return choices

    async def _whole(
        self, answer: Answer, shape: Shape, choices: list[Choice], parts: Parts
    ) -> Response:
        while not answer.ended:
            part = parts.of(*await answer.next())
            choice = choices[part.index]
            choice.text += part.text
            choice.finish = part.finish
            choice.logprobs += part.logprobs
            choice.calls += part.calls
        return JSONResponse(shape.whole(choices, answer.usage))

    async def _events(
        self, answer: Answer, first: Numbered, shape: Shape, body: Common, parts: Parts
    ) -> AsyncIterator[str]:
        """One event a token, so that clients can time tokens; then the end and the counts."""
        options = body.stream_options
        wants_usage = bool(options and options.include_usage)
        continuous = wants_usage and bool(options and options.continuous_usage_stats)
        begun: set[int] = set()
        events, numbered = list[str](), first
        try:
            while True:
                part = parts.of(*numbered)
                chunk = shape.chunk(part, first=part.index not in begun, end=bool(part.finish))
                begun.add(part.index)
                if wants_usage:
                    chunk["usage"] = answer.usage.body() if continuous else None
                events.append(_event(chunk))
                if answer.ended:
                    break
                if not answer.more:  # events that lie ready go out in one write
                    yield "".join(events)
                    events.clear()
                numbered = await answer.next()
            if wants_usage:
                events.append(_event(shape.usage(answer.usage)))
            events.append("data: [DONE]\n\n")
        except ApiError as error:
            self.metrics.errors.labels(str(error.body["error"]["code"])).inc()
            events.append(_event(error.body))
        yield "".join(events)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _no_place(field: str, what: str) -> ApiError:
    return ApiError(
        400, f"{field}: this model's chat template has no place for {what}.", param="messages"
    )


def _busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
