"""The client of one engine: token ids in; token ids, log-probabilities and policy versions out.

vLLM's own routes: `/inference/v1/generate` for tokens, the development routes for pauses and weights.

Seeds: vLLM samples choice `i` of a joined request (`num_replies` > 1) of seed `s` with seed `s + i`, so it equals the
reply to a request of its own with that seed, up to what batching does to floating-point sums.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Self, TypeVar

import httpx
import msgspec
from msgspec import Struct, field

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, PalestraError
from palestra.core.records import NO_ROUTES, Reply, Routes, Sampling, Span
from palestra.wire.connections import Connections
from palestra.wire.draft import Draft
from palestra.wire.routes import read_routes

T = TypeVar("T")

_RETRIES = 4
_FIRST_PAUSE_S = 0.1  # doubles with every retry
_KEEPALIVE_S = 3.0  # shorter than the 5 s after which vLLM's server hangs up
_LAST_WORD_S = 1.0
_HEALTH_S, _HEALTH_PAUSE_S = 5.0, 0.2
_GENERATE = "/inference/v1/generate"
ADAPTER = "policy"
_JSON = {"content-type": "application/json"}
_CONNECTING = {"timeout": {"connect": 5.0}}
_SAFE = re.compile(r'^vllm:cache_config_info\{.*kv_cache_max_concurrency="([0-9.]+)"', re.MULTILINE)


class RefusedError(PalestraError):
    """The engine is well and refused the request: the request is wrong, and so would be a second try."""


class EngineError(InfrastructureError):
    """The engine answered that it failed."""


class UnpublishedError(EngineError):
    """The engine samples from weights that nobody published to it: it took the place of one that is gone."""


class UnreachableError(InfrastructureError):
    """No answer from the engine: not started, dead, or cut off."""


class EngineLoad(Struct, frozen=True, kw_only=True):
    """Gauges and counters of one engine. `kv_use` is a share of the cache; three count since the engine's start.

    `safe_requests`: how many requests have room in the cache at their full length; None if the engine does not say.
    """

    running: int
    waiting: int
    kv_use: float
    preemptions: int
    prompt_tokens: int
    sampled_tokens: int
    safe_requests: float | None = None


class EngineClient:
    """One engine. Calls may run side by side; one that ends by its deadline is dropped by the engine too.

    `cache_salt` is for requests: a publish changes it when it pauses the engine, so that a prefix computed under one
    version is never reused under another.
    """

    def __init__(self, url: str, *, call_s: float = 60.0, transport: httpx.AsyncBaseTransport | None = None):
        """`call_s` bounds the calls that take no deadline of their own; `transport` is for tests."""
        self.url = url.rstrip("/")
        self.cache_salt = "unpublished"
        self.serving: int | None = None  # the last version published to it by this client
        self.adapter: str | None = None  # the name under which it has the policy, if that is an adapter to its model
        self._home: str | None = None  # where it reads that adapter
        self.is_asleep = False  # put to sleep by this client, and not all awake
        self._call_s = call_s
        self._connections = transport or Connections(keepalive_s=_KEEPALIVE_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connections.aclose()

    def forget(self) -> None:
        """Another process answers at the address from now on: it has no weights of this run."""
        self.cache_salt, self.serving, self.adapter, self._home = "unpublished", None, None, None
        self.is_asleep = False

    async def generate(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        seed: int | None,
        deadline_s: float,
        num_replies: int = 1,
        cache_salt: str | None = None,
    ) -> list[Reply]:
        """Sample `num_replies` replies to one prompt, in the order of their seeds `seed`, `seed + 1`, ...

        A seeded request is tried again when the connection breaks (its replies would be the same); an unseeded one only
        if it cannot have arrived.
        Errors: RefusedError, EngineError, UnreachableError, DeadlineError.
        """
        body = _GenerateRequest(
            request_id=uuid.uuid4().hex,
            model=self.adapter,
            token_ids=list(token_ids),
            sampling_params=_sampling_params(sampling, seed=seed, num_replies=num_replies),
            cache_salt=cache_salt,
        )
        answer = await self._generate(body, deadline_s=deadline_s, repeatable=seed is not None)
        unrouted = _num_unrouted(token_ids, sampling)
        return [
            _reply(choice, self.url, unrouted) for choice in sorted(answer.choices, key=lambda choice: choice.index)
        ]

    async def stream(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        silence_s: float,
        draft: Draft,
        cache_salt: str | None = None,
        stream_tokens: int = 16,
    ) -> Reply:
        """Sample one reply. Its tokens are in `draft` as they arrive, `stream_tokens` at a time.

        Tried again when the connection breaks before the first token; after it, `draft` has what can be gone on from.
        Errors: RefusedError, EngineError, UnreachableError; DeadlineError, if no token arrives for `silence_s`.
        """
        params = _sampling_params(sampling, seed=seed, num_replies=1) | {"stream_interval": stream_tokens}

        async def exchange() -> Reply:
            body = _GenerateRequest(
                request_id=uuid.uuid4().hex,
                model=self.adapter,
                token_ids=list(token_ids),
                sampling_params=params,
                cache_salt=cache_salt,
                stream=True,
            )
            return await self._stream(body, draft, silence_s, _num_unrouted(token_ids, sampling))

        return await self._attempts(_GENERATE, exchange, repeatable=lambda: not draft.token_ids)

    async def _stream(
        self, body: "_GenerateRequest", draft: Draft, silence_s: float, num_unrouted: int | None
    ) -> Reply:
        waiting_for = f"the next token of a reply from engine {self.url}"
        response = await within(silence_s, self._send("POST", _GENERATE, body), waiting_for=waiting_for)
        try:
            if not response.is_success:
                await within(silence_s, response.aread(), waiting_for=waiting_for)
                self._content(_GENERATE, response)
            events = read_events(response.aiter_bytes())
            while (event := await within(silence_s, anext(events, None), waiting_for=waiting_for)) is not None:
                choice = self._streamed(event)
                if choice is not None and (reply := _extend(draft, choice, self.url, num_unrouted)):
                    await _read_to_end(events)
                    return reply
        finally:
            await response.aclose()
        raise EngineError(f"engine {self.url} ended a stream of {len(draft.token_ids)} tokens without a reason")

    def _streamed(self, event: bytes) -> "_Choice | None":
        try:
            chunk = _decode_chunk(event)
        except msgspec.DecodeError as error:
            raise EngineError(f"engine {self.url} streamed what is not a reply: {error}") from error
        if chunk.error is not None:
            raise EngineError(f"engine {self.url} failed at {_GENERATE}: {chunk.error.message}")
        return chunk.choices[0] if chunk.choices else None

    async def score(self, token_ids: Sequence[int], *, deadline_s: float | None = None) -> list[float]:
        """log p(token t+1 | tokens up to t) at temperature 1 under the weights of now, [T-1]; caches are not used."""
        body = _GenerateRequest(
            request_id=uuid.uuid4().hex,
            model=self.adapter,
            token_ids=list(token_ids),
            sampling_params={"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0, "detokenize": False},
            cache_salt=uuid.uuid4().hex,
        )
        answer = await self._generate(body, deadline_s=deadline_s or self._call_s, repeatable=True)
        if answer.prompt_logprobs is None or len(answer.prompt_logprobs) != len(token_ids):
            raise EngineError(f"engine {self.url} scored no prompt of {len(token_ids)} tokens")
        pairs = zip(token_ids[1:], answer.prompt_logprobs[1:], strict=True)
        return [(entry or {})[str(token_id)].logprob for token_id, entry in pairs]

    async def require_processed_logprobs(self, token_ids: Sequence[int], *, deadline_s: float | None = None) -> None:
        """Sample at temperature 2 and compare with the scores at 1: raw log-probabilities would be the same numbers.

        Errors: EngineError, if the engine reports log-probabilities of a distribution it did not sample from.
        """
        deadline_s = deadline_s or self._call_s
        flat = Sampling(temperature=2.0, max_tokens=16)
        (reply,) = await self.generate(token_ids, flat, seed=0, deadline_s=deadline_s)
        scores = (await self.score([*token_ids, *reply.token_ids], deadline_s=deadline_s))[len(token_ids) - 1 :]
        gap = max(abs(a - b) for a, b in zip(reply.logprobs, scores, strict=True))
        if gap < 1e-3 and min(scores) < -1e-2:  # near 0 both agree whatever the temperature
            raise EngineError(
                f"engine {self.url} reports raw log-probabilities: those of a reply at temperature 2 equal those at 1 "
                f"(largest gap {gap:.1e}); start it with --logprobs-mode processed_logprobs"
            )

    async def wait_healthy(self, deadline_s: float) -> None:
        """Errors: DeadlineError, if the engine does not answer that it is well within `deadline_s`."""
        hint = "look into the engine's log"
        await within(deadline_s, self._healthy(), waiting_for=f"engine {self.url} to become healthy", hint=hint)

    async def pause(self, *, clear_cache: bool, deadline_s: float | None = None) -> None:
        """Freeze running requests where they are. With `clear_cache` they are prefilled again after the resume."""
        params = {"mode": "keep", "clear_cache": "true" if clear_cache else "false"}
        await self._call("/pause", params=params, deadline_s=deadline_s, repeatable=True)

    async def resume(self, *, deadline_s: float | None = None) -> None:
        await self._call("/resume", deadline_s=deadline_s, repeatable=True)

    async def sleep(self, *, keeps_weights: bool, deadline_s: float | None = None) -> None:
        """Leave the device: running requests are aborted, the KV cache is gone, and so are the weights, unless they are
        kept in host memory. Requests that come meanwhile wait."""
        params = {"level": "1" if keeps_weights else "2", "mode": "abort"}
        self.is_asleep = True
        await self._call("/sleep", params=params, deadline_s=deadline_s)

    async def wake_weights(self, *, deadline_s: float | None = None) -> None:
        """Memory for weights is there again, with nothing in it unless they were kept."""
        await self._call("/wake_up", params={"tags": "weights"}, deadline_s=deadline_s)

    async def wake_cache(self, *, deadline_s: float | None = None) -> None:
        """The last part: from here on it samples."""
        await self._call("/wake_up", params={"tags": "kv_cache"}, deadline_s=deadline_s)
        self.is_asleep = False

    async def update_adapter(self, directory: str, version: int, *, deadline_s: float | None = None) -> None:
        """`update` for an adapter: the version goes to the directory from which the engine reads its adapter.

        One that has none yet gets a directory beside `directory`, and reads it by `load_adapter`.
        """
        if self._home is None:
            answer = await self._call("/v1/models", method="GET", deadline_s=deadline_s, repeatable=True)
            homes = {model["id"]: model["root"] for model in msgspec.json.decode(answer)["data"]}
            if ADAPTER in homes:  # whoever was the client before has loaded it
                self._home, self.adapter = homes[ADAPTER], ADAPTER
        home = self._home or f"{directory.rpartition('/')[0]}/adapter-{self.url.rpartition(':')[2]}"
        body = {"update_info": {"directory": directory, "version": version, "home": home}}
        await self._call("/update_weights", body, deadline_s=deadline_s)
        self._home = home

    async def load_adapter(self, *, deadline_s: float | None = None) -> None:
        """Requests ask for the adapter from here on. After the first update is finished, which brought it."""
        if self.adapter is None:
            body = {"lora_name": ADAPTER, "lora_path": self._home}
            await self._call("/v1/load_lora_adapter", body, deadline_s=deadline_s)
            self.adapter = ADAPTER

    async def start_update(self, *, deadline_s: float | None = None) -> None:
        await self._call("/start_weight_update", deadline_s=deadline_s)

    async def update(self, directory: str, version: int, *, local: str = "", deadline_s: float | None = None) -> None:
        """Load the version staged in `directory`; `local` is where the engine's machine keeps copies, if it does.

        Errors: EngineError naming the tensor or module that is wrong.
        """
        where = {"directory": directory, "local": local} if local else {"directory": directory}
        body = {"update_info": {**where, "version": version}}
        await self._call("/update_weights", body, deadline_s=deadline_s)

    async def init_transfer(self, info: dict[str, Any], *, deadline_s: float | None = None) -> None:
        """Meet whoever sends versions, as `info` says; ends when both have met."""
        await self._call("/init_weight_transfer_engine", {"init_info": info}, deadline_s=deadline_s)

    async def update_by_transfer(self, info: dict[str, Any], *, deadline_s: float | None = None) -> None:
        """Receive the version that is sent meanwhile. Errors: EngineError naming what is wrong."""
        await self._call("/update_weights", {"update_info": info}, deadline_s=deadline_s)

    async def abandon_update(self, *, deadline_s: float | None = None) -> None:
        """End an update that somebody began and did not finish: a load that fails ends its update. Pause it first, and
        publish a version before it goes on; until then the engine holds a mixture."""
        try:
            await self.update("", -1, deadline_s=deadline_s)
        except EngineError:
            pass  # as it must

    async def finish(self, version: int, *, deadline_s: float | None = None) -> None:
        """End the update; from here on tokens are labelled `version`."""
        await self._call("/finish_weight_update", {"weight_version": str(version)}, deadline_s=deadline_s)
        self.serving = version

    async def label(self, version: int, *, deadline_s: float | None = None) -> None:
        """Tokens are labelled `version` from here on: the weights it was started with are those of that version."""
        await self._call("/update_weight_version", {"new_version": str(version)}, deadline_s=deadline_s)
        self.serving = version

    async def version(self, *, deadline_s: float | None = None) -> int | None:
        """The label of the tokens sampled now; None before the first publish."""
        answer = await self._call("/weight_info", method="GET", deadline_s=deadline_s, repeatable=True)
        label = msgspec.json.decode(answer)["weight_version"]
        return int(label) if label.isdigit() else None

    async def load(self, *, deadline_s: float | None = None) -> EngineLoad:
        answer = await self._call("/metrics", method="GET", deadline_s=deadline_s, repeatable=True)
        return parse_metrics(answer.decode())

    async def is_healthy(self) -> bool:
        """Whether it says now that it is."""
        try:
            asked = self._exchange("GET", "/health")
            response = await within(_HEALTH_S, asked, waiting_for=f"/health of engine {self.url}")
            return response.status_code == 200
        except (httpx.HTTPError, DeadlineError):
            return False

    async def _healthy(self) -> None:
        """A server that is not listening yet has no other way to tell than to be asked again."""
        while True:
            if await self.is_healthy():
                return
            await asyncio.sleep(_HEALTH_PAUSE_S)

    async def _generate(self, body: "_GenerateRequest", *, deadline_s: float, repeatable: bool) -> "_GenerateAnswer":
        answer = await self._call(_GENERATE, body, deadline_s=deadline_s, repeatable=repeatable)
        try:
            return _decode_answer(answer)
        except msgspec.DecodeError as error:
            raise EngineError(f"engine {self.url} answered what is not a reply: {error}") from error

    async def _call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        params: dict[str, str] | None = None,
        deadline_s: float | None = None,
        repeatable: bool = False,
    ) -> bytes:
        """One exchange, tried again after broken connections and busy answers where a second try does no harm."""

        async def exchange() -> bytes:
            return self._content(path, await self._exchange(method, path, body, params))

        seconds = deadline_s or self._call_s
        attempts = self._attempts(path, exchange, repeatable=lambda: repeatable)
        return await within(seconds, attempts, waiting_for=f"{path} of engine {self.url}")

    async def _exchange(
        self, method: str, path: str, body: Any = None, params: dict[str, str] | None = None
    ) -> httpx.Response:
        """With the whole answer read."""
        response = await self._send(method, path, body, params)
        try:
            await response.aread()
        finally:
            await response.aclose()
        return response

    async def _send(
        self, method: str, path: str, body: Any = None, params: dict[str, str] | None = None
    ) -> httpx.Response:
        """Past httpx' client, whose redirects, cookies and merged addresses cost a quarter of the orchestrator's time
        and are for nothing here."""
        request = httpx.Request(
            method,
            _url(self.url, path),
            params=params,
            headers={} if body is None else _JSON,
            content=b"" if body is None else msgspec.json.encode(body),
            extensions=_CONNECTING,
        )
        return await self._connections.handle_async_request(request)

    async def _attempts(self, path: str, exchange: Callable[[], Awaitable[T]], *, repeatable: Callable[[], bool]) -> T:
        attempt = 0
        while True:
            try:
                return await exchange()
            except (httpx.TransportError, _BusyError) as error:
                harmless = repeatable() or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | _BusyError)
                if attempt == _RETRIES or not harmless:
                    raise UnreachableError(
                        f"{path} of engine {self.url} failed after {attempt + 1} tries: {type(error).__name__} {error}"
                    ) from error
            await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
            attempt += 1

    def _content(self, path: str, response: httpx.Response) -> bytes:
        if response.is_success:
            return response.content
        said = _message(response)
        if response.status_code == 503:
            raise _BusyError(said)
        if response.status_code == 404 and self.adapter is not None and f"`{self.adapter}`" in said:
            raise UnpublishedError(
                f"engine {self.url} has no adapter {self.adapter}: it took the place of one that had"
            )
        if response.is_client_error:
            raise RefusedError(f"engine {self.url} refused {path} ({response.status_code}): {said}")
        raise EngineError(f"engine {self.url} failed at {path} ({response.status_code}): {said}")


@lru_cache(256)
def _url(server: str, path: str) -> httpx.URL:
    return httpx.URL(server + path)


def parse_metrics(text: str) -> EngineLoad:
    """From Prometheus' text format; engines of one server are summed, their cache use averaged."""
    samples: dict[str, list[float]] = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            series, _, value = line.rpartition(" ")
            samples.setdefault(series.partition("{")[0], []).append(float(value))

    def total(name: str) -> int:
        return int(sum(samples.get(f"vllm:{name}", [0.0])))

    kv_use = samples.get("vllm:kv_cache_usage_perc", [0.0])
    return EngineLoad(
        running=total("num_requests_running"),
        waiting=total("num_requests_waiting"),
        kv_use=sum(kv_use) / len(kv_use),
        preemptions=total("num_preemptions_total"),
        prompt_tokens=total("prompt_tokens_total"),
        sampled_tokens=total("generation_tokens_total"),
        safe_requests=sum(map(float, safe)) if (safe := _SAFE.findall(text)) else None,
    )


class _BusyError(Exception):
    """503: not now."""


class _GenerateRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    request_id: str
    model: str | None = None
    token_ids: list[int]
    sampling_params: dict[str, Any]
    cache_salt: str | None = None
    stream: bool = False


class _Logprob(Struct, frozen=True):
    logprob: float


class _Logprobs(Struct, frozen=True):
    content: list[_Logprob] | None = None


class _VersionSpan(Struct, frozen=True):
    version: str
    start: int
    end: int


class _Choice(Struct, frozen=True, kw_only=True):
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[_VersionSpan] | None = None
    routed_experts: str | None = None


class _GenerateAnswer(Struct, frozen=True, kw_only=True):
    choices: list[_Choice]
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Error(Struct, frozen=True):
    message: str = ""


class _Chunk(Struct, frozen=True, kw_only=True):
    """One event of a streamed answer."""

    choices: list[_Choice] = field(default_factory=list)
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_answer = msgspec.json.Decoder(_GenerateAnswer).decode


def _sampling_params(sampling: Sampling, *, seed: int | None, num_replies: int) -> dict[str, Any]:
    params: dict[str, Any] = {
        "n": num_replies,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "logprobs": 0,  # the sampled token's only
        "detokenize": False,
    }
    if sampling.ignores_stop:
        params["ignore_eos"] = True
    elif sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.routes_from is not None:
        params["routed_experts_prompt_start"] = sampling.routes_from
    return params if seed is None else {**params, "seed": seed}


async def read_events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, but for the one that says that there are no more."""
    held = b""
    async for part in parts:
        *events, held = (held + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data != b"[DONE]":
                yield data


async def _read_to_end(events: AsyncIterator[bytes]) -> None:
    """Nothing counts after the last chunk; but a connection whose answer was read to its end is used again."""
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            async for _ in events:
                pass
    except (httpx.TransportError, TimeoutError):
        pass  # closed instead


def _num_unrouted(token_ids: Sequence[int], sampling: Sampling) -> int | None:
    """Tokens of the prompt whose routes are asked for; None: none are, nor those of the reply."""
    return None if sampling.routes_from is None else len(token_ids) - sampling.routes_from


def _extend(draft: Draft, choice: _Choice, url: str, num_unrouted: int | None) -> Reply | None:
    """Add what a chunk brings; the whole reply, if it was the last."""
    draft.add(choice.token_ids, _logprobs(choice))
    if choice.finish_reason is None:
        return None
    return _whole(draft.token_ids, draft.logprobs, choice, url, num_unrouted)


def _logprobs(choice: _Choice) -> list[float]:
    return [entry.logprob for entry in (choice.logprobs and choice.logprobs.content) or []]


def _reply(choice: _Choice, url: str, num_unrouted: int | None) -> Reply:
    return _whole(choice.token_ids, _logprobs(choice), choice, url, num_unrouted)


def _whole(token_ids: list[int], logprobs: list[float], choice: _Choice, url: str, num_unrouted: int | None) -> Reply:
    """The reply that `choice` ends."""
    spans = tuple(Span(_version(span, url), span.start, span.end) for span in choice.weight_versions or [])
    covered = sum(span.end - span.start for span in spans)
    if not len(token_ids) == len(logprobs) == covered:
        raise EngineError(
            f"engine {url} returned {len(token_ids)} tokens with {len(logprobs)} log-probabilities, "
            f"{covered} of them with a version"
        )
    finish_reason = choice.finish_reason or "abort"
    routes = NO_ROUTES
    if num_unrouted is not None and finish_reason != "abort":
        routes = _routes(choice, url, num_unrouted + len(token_ids) - 1)
    return Reply(token_ids=token_ids, logprobs=logprobs, spans=spans, finish_reason=finish_reason, routes=routes)


def _routes(choice: _Choice, url: str, num_tokens: int) -> Routes:
    """Of the prompt's tokens that were asked for and of the reply's, but for the last: it was never computed with."""
    if choice.routed_experts is None:
        raise EngineError(
            f"engine {url} returned no routed experts; start it with --enable-return-routed-experts, or set "
            "train.router_replay=false"
        )
    try:
        return read_routes(choice.routed_experts, num_tokens=num_tokens)
    except ValueError as error:
        raise EngineError(f"engine {url} returned routed experts that cannot be used: {error}") from error


def _version(span: _VersionSpan, url: str) -> int:
    if not span.version.isdigit():
        raise UnpublishedError(f"engine {url} labels its tokens {span.version!r}: nothing was published to it yet")
    return int(span.version)


def _message(response: httpx.Response) -> str:
    """What vLLM says about a failure, without the wrapping."""
    try:
        parsed = msgspec.json.decode(response.content)
        error = parsed["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return response.text[:500]
