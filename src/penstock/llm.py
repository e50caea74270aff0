"""The offline API: batches of prompts in one process, with vLLM's shape of results.

    from penstock import LLM, SamplingParams
    llm = LLM("toy")
    for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(out.outputs[0].text)

It is the service without HTTP: the same cores, the engine in a thread, the memory transport between
them. Scheduling, prefix cache and recovery are therefore what the server has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from penstock.checkpoint import resolve
from penstock.cli import vllm_flags
from penstock.cli.parser import nearest
from penstock.engine.config import DTYPE_ALIASES, EngineConfig, WorkerConfig
from penstock.engine.instance import EngineThread
from penstock.protocol.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    from_info,
)
from penstock.protocol.tokens import TokenLogprobs
from penstock.sampling_params import SamplingParams
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.driver import ServiceDriver
from penstock.service.generation import GenerationSpec, TokenDelta
from penstock.service.text.events import ContentDelta
from penstock.service.text.pipeline import OutputOptions, OutputPipeline
from penstock.service.text.texts import Texts

T = TypeVar("T")
#: Text, token ids, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}.
Prompt = str | list[int] | dict[str, Any]

_numbers = itertools.count()
#: Sequences with the engine at once; the rest waits here, where it costs nothing.
_IN_FLIGHT = 1024


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


class LLM:
    """A model, loaded into this process. `close()` (or `with`) frees it.

    Raises `StartupError`s with one-line reasons when the model cannot be loaded. The keyword
    arguments are those of `EngineConfig`, and vLLM's `enforce_eager`, `kv_cache_memory_bytes` and
    `num_gpu_blocks_override` for `graph_mode`, `kv_cache_bytes` and `num_blocks`. None stands for
    the default of each.
    """

    def __init__(
        self,
        model: str,
        *,
        chat_template: str | None = None,
        **engine: Any,
    ) -> None:
        config = engine_config(model, engine)
        checkpoint = resolve(config.model, revision=config.revision)
        self._texts = Texts.from_checkpoint(checkpoint, chat_template=chat_template)
        number = next(_numbers)
        address = f"memory://llm-{number}"
        self._engine = EngineThread(WorkerConfig(config, address))
        # A loop in a thread of its own: generate() may be called where one runs already (Jupyter).
        self._loop = asyncio.new_event_loop()
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="penstock-llm", daemon=True
        )
        self._thread.start()
        self._driver = self._on_loop(self._attach(address))
        card = self._driver.card
        assert card is not None, "it is attached"
        self._max_model_len = card.max_model_len

    async def _attach(self, address: str) -> ServiceDriver:
        attached = asyncio.Event()
        core = ServiceCore(ServiceCoreConfig(name="llm", max_queue=2**62))
        driver = ServiceDriver(core, on_active=lambda _: attached.set())
        driver.connect("engine-0", address)
        await attached.wait()
        return driver

    # --- what users call -----------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids); results stand in the prompts' order.

        Raises `InvalidRequest` before anything runs if a prompt or a parameter cannot be served.
        """
        batch = _as_batch(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(batch)
        else:
            params = list(sampling_params)
            if len(params) != len(batch):
                raise InvalidRequest(
                    f"{len(batch)} prompts and {len(params)} sampling params: give one for all, "
                    "or one for each"
                )
        jobs = [self._job(p, s) for p, s in zip(batch, params, strict=True)]
        with _Progress(len(jobs), shown=use_tqdm) as progress:
            return self._on_loop(self._run_all(jobs, progress.advance))

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Render one conversation (or several) with the checkpoint's template and complete it."""
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if single else list(messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self._texts.template.render(conversation, tools=tools)
            prompts.append(self._texts.tokenizer.encode(text, add_special_tokens=False))
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def get_tokenizer(self) -> Any:
        return self._texts.tokenizer

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            detached = asyncio.run_coroutine_threadsafe(self._detach(), self._loop)
        detached.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- on the loop ---------------------------------------------------------------------------

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        with self._closing:
            if self._closed:
                work.close()
                raise EngineUnavailable("this LLM has been closed: make another one")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: streams are cancelled with their task
            raise

    async def _detach(self) -> None:
        """Calls of other threads end with an error, and have it before the loop stops."""
        self._driver.refuse_new()
        self._driver.close(EngineUnavailable("the LLM was closed"))
        if self._calls:
            await asyncio.wait(self._calls)

    async def _run_all(
        self, jobs: list[_Job], advance: Callable[[int], None]
    ) -> list[RequestOutput]:
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        room = _Room(_IN_FLIGHT)

        async def run(job: _Job) -> RequestOutput:
            async with room.for_sequences(job.spec.n):
                output = await self._run(job)
            advance(sum(len(o.token_ids) for o in output.outputs))
            return output

        tasks = [asyncio.create_task(run(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # one has failed, or the caller gave up: the rest is not wanted
                task.cancel()

    async def _run(self, job: _Job) -> RequestOutput:
        stream = self._driver.submit(job.spec)
        collectors = [_Collector(self._texts, job, c) for c in range(job.spec.n)]
        output = RequestOutput(
            job.spec.request_id, job.text, job.spec.prompt_ids, [c.output for c in collectors]
        )
        if job.params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        try:
            while deltas := await stream.next():
                for delta in deltas:
                    collector = collectors[delta.choice]
                    if collector.output.finish_reason is not None:
                        continue
                    if delta.choice == 0:
                        output.num_cached_tokens = delta.cached_tokens
                        self._add_prompt_logprobs(output, delta)
                    if collector.take(delta):
                        stream.cancel(delta.choice)
        finally:
            stream.cancel()
        return output

    def _add_prompt_logprobs(self, output: RequestOutput, delta: TokenDelta) -> None:
        if output.prompt_logprobs is not None:
            for entry in delta.prompt_logprobs or ():
                output.prompt_logprobs.append(_logprob_dict(self._texts, entry))

    def _job(self, prompt: Prompt, params: SamplingParams) -> _Job:
        if isinstance(prompt, dict):
            prompt = _from_dict(prompt)
        text = prompt if isinstance(prompt, str) else None
        ids = self._texts.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        card = self._driver.card
        assert card is not None
        if not ids:
            raise InvalidRequest("a prompt has no tokens: give at least one")
        for name, wanted in (("prompt token ids", ids), ("logit_bias keys", params.logit_bias)):
            if not all(0 <= i < card.vocab_size for i in wanted):
                raise InvalidRequest(f"{name} must be in [0, {card.vocab_size})")
        if len(ids) >= card.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens and the context {card.max_model_len}: "
                "shorten the prompt"
            )
        spec = GenerationSpec(
            request_id=f"llm-{next(_numbers)}",
            prompt_ids=ids,
            sampling=params.on_wire(card.max_model_len - len(ids)),
            n=params.n,
            constraint=params.constraint,
        )
        return _Job(text, params, spec)


#: vLLM's names of settings that are called otherwise here.
_VLLM_NAMES = {"kv_cache_memory_bytes": "kv_cache_bytes", "num_gpu_blocks_override": "num_blocks"}


def engine_config(model: str, keywords: dict[str, Any]) -> EngineConfig:
    """What `LLM` was told. Raises `ConfigError` for what is unknown, twice there or no value."""
    own = [name for name in EngineConfig.__dataclass_fields__ if name != "model"]
    known = [*own, *_VLLM_NAMES, "enforce_eager", "chat_template"]
    for name in keywords:
        if name not in known:
            raise ConfigError(_unknown(name, known))
    said = {name: value for name, value in keywords.items() if value is not None}
    for theirs, ours in _VLLM_NAMES.items():
        if theirs in said:
            if ours in said:
                raise ConfigError(f"LLM: {theirs} and {ours} are the same: give one of them")
            said[ours] = said.pop(theirs)
    match said.pop("enforce_eager", False):
        case True:
            if said.setdefault("graph_mode", "eager") != "eager":
                raise ConfigError(f"LLM: enforce_eager does not go with {said['graph_mode']!r}")
        case value if value is not False:
            raise ConfigError(f"LLM: enforce_eager must be True or False, not {value!r}")
    if "dtype" in said:  # torch.bfloat16 is a dtype as well
        name = str(said["dtype"]).removeprefix("torch.")
        said["dtype"] = DTYPE_ALIASES.get(name, name)
    return EngineConfig(model, **said)


def _unknown(name: str, known: list[str]) -> str:
    text = f"LLM has no argument {name!r}"
    found = vllm_flags.find("--" + name.replace("_", "-"))
    if found is not None and found.standing != "same":
        return f"{text}, which vLLM has: {found.explain()}"
    return text + nearest(name, known)


@dataclass(frozen=True, slots=True)
class _Job:
    text: str | None
    params: SamplingParams
    spec: GenerationSpec


class _Room:
    """A semaphore that is taken several places at a time, first come, first served."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._semaphore = asyncio.Semaphore(places)
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def for_sequences(self, count: int) -> AsyncIterator[None]:
        count = min(count, self._places)
        async with self._turn:  # two who take place by place would block each other
            for _ in range(count):
                await self._semaphore.acquire()
        try:
            yield
        finally:
            for _ in range(count):
                self._semaphore.release()


class _Collector:
    """One choice: deltas in, a `CompletionOutput` out."""

    def __init__(self, texts: Texts, job: _Job, choice: int) -> None:
        params = job.params
        self._texts = texts
        options = OutputOptions(
            stops=params.stops,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        self._pipeline = OutputPipeline(texts.tokenizer, job.spec.prompt_ids, options)
        self.output = CompletionOutput(choice)
        if params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0

    def take(self, delta: TokenDelta) -> bool:
        """True when a stop string was hit: the engine need not go on."""
        if delta.error is not None:
            raise from_info(delta.error)
        out = self.output
        out.token_ids += delta.ids
        for entry in delta.logprobs or ():
            assert out.logprobs is not None and out.cumulative_logprob is not None
            out.logprobs.append(_logprob_dict(self._texts, entry))
            out.cumulative_logprob += entry.logprob
        events = self._pipeline.push(delta.ids, delta.stop_token)
        if delta.finish is not None or self._pipeline.stop_string is not None:
            events += self._pipeline.finish()
            out.finish_reason, out.stop_reason = delta.finish, delta.stop_token
        if self._pipeline.stop_string is not None:
            out.finish_reason, out.stop_reason = "stop", self._pipeline.stop_string
        out.text += "".join(e.text for e in events if isinstance(e, ContentDelta))
        return self._pipeline.stop_string is not None and delta.finish is None


def _logprob_dict(texts: Texts, entry: TokenLogprobs) -> dict[int, Logprob]:
    text = texts.tokenizer.token_text
    found = {
        i: Logprob(p, rank + 1, text(i))
        for rank, (i, p) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True))
    }
    found[entry.token_id] = Logprob(entry.logprob, entry.rank, text(entry.token_id))
    return found


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(i, int) for i in items) else items


def _from_dict(prompt: dict[str, Any]) -> str | list[int]:
    match prompt:
        case {"prompt_token_ids": list(ids)} if all(isinstance(i, int) for i in ids):
            return ids
        case {"prompt": str(text)}:
            return text
    raise InvalidRequest(
        'a prompt is text, token ids, {"prompt": text} or {"prompt_token_ids": ids}'
    )


class _Progress:
    """A bar over finished prompts with output tokens a second; nothing when not shown."""

    def __init__(self, total: int, *, shown: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "{task.fields[rate]}",
            disable=not shown,
            transient=False,
        )
        self._task = self._bar.add_task("prompts", total=total, rate="")
        self._tokens = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        elapsed_s = self._bar.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed_s:,.0f} tok/s" if elapsed_s > 0 else ""
        self._bar.update(self._task, advance=1, rate=rate)
