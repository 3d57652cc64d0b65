"""A small inference engine: chat completions from a torch model in this process, in vLLM's form.

It is for models that fit a laptop's CPU. Requests gather while a batch is generated. New weights go live between two
tokens, and the answers under way are continued with them. What these have read so far is then computed again, so that
each token's log-probability is that of one version: no token is sampled from old keys and values with new weights
(AReaL does the same when it interrupts answers: Fu et al., arXiv:2505.24298, section 4.1).
"""

import asyncio
import math
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from millstream.pipeline.models.policy import (
    copy_weights,
    digest,
    left_pad,
    load_model,
    load_tokenizer,
    one_thread,
    parameters,
)
from millstream.pipeline.protocols.model_version import of_tokens
from millstream.producers.supervisor import supervisor
from millstream.schemas.spans.text import safe_repr, utf8
from millstream.schemas.wire.versions import Versions

READ = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "logprobs"} | {
    "return_token_ids",
    "request_id",
}
GREEDY = 1e-5  # temperatures below it count as 0, as in vLLM: dividing by them overflows
IGNORED = {"user", "metadata", "store"}  # without effect on the answer
# What the engine does not support, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "tools": ([],),
    "top_p": (1,),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """How much one engine takes."""

    waiting: int = 1000  # requests that wait for a batch; a proxy sends 512 at a time
    stops: int = 16  # texts of a request: each is looked for after each token; OpenAI takes 4
    shown: int = 200  # characters of a wrong value in its error


@dataclass(frozen=True, slots=True)
class Completion:
    """With status 200 ``body`` is an OpenAI chat completion; if ``return_token_ids`` was asked for, in vLLM's form:
    ``prompt_token_ids`` at the top, ``token_ids`` in each choice."""

    status: int
    body: dict[str, Any]
    versions: Versions = ()  # of the weights that made the answer's tokens

    @property
    def model_version(self) -> str | None:
        """The only version, or `mixed`; None without an answer."""
        return of_tokens(self.versions)


class EngineClosed(Exception):
    """The engine answers no more requests."""


class TooManyWaiting(Exception):
    """More requests wait than an engine takes."""


class Unsupported(Exception):
    """A request that this engine can't answer because of the field ``param``."""

    def __init__(self, message: str, param: str | None, code: str = "unsupported_parameter") -> None:
        super().__init__(utf8(message))
        self.body = {"error": {"message": utf8(message), "type": "invalid_request_error", "param": param, "code": code}}


@dataclass(slots=True)
class _Job:
    request_id: str
    model: str
    prompt: list[int]
    limit: int
    temperature: float
    stop: tuple[str, ...]
    random: torch.Generator | None  # of a request with a seed
    logprobs: bool
    return_token_ids: bool
    future: "Future[Completion]" = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, str]] = field(default_factory=list)  # (index of the first token, version)
    text: str = ""
    finish_reason: str | None = None


class Engine:
    """Serves the model of a Hugging Face folder. All methods may be called from any thread."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        version: str = "0",
        max_batch: int = 64,
        seed: int = 0,
        deterministic: bool = False,
        policy: EnginePolicy = EnginePolicy(),
    ) -> None:
        """``deterministic``: each answer is computed alone, so that one with a seed is always the same, in each bit of
        its log-probabilities. In a batch, the number and the lengths of the other rows change their last bits, since
        matrix products and sums are computed in other orders. New weights then go live between two answers. Raises
        `ConfigError` if the folder holds no model or no chat template."""
        self._policy = policy
        self.name = Path(model_dir).resolve().name
        self.max_batch = 1 if deterministic else max_batch
        self._deterministic = deterministic
        self._model = load_model(model_dir).eval()
        self._tokenizer = load_tokenizer(model_dir)
        self._context: int = self._model.config.max_position_embeddings
        eos = self._model.config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else [eos])
        self._random = torch.Generator().manual_seed(seed)
        self._version = version
        self._loads = 0
        self._turn = threading.Lock()  # held while waiting for the weights, so that a load waits for one token at most
        self._weights = threading.Lock()
        self._asking = threading.Lock()  # no job is queued behind the None that closes
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = supervisor().thread("millstream-engine", self._work)

    @property
    def version(self) -> str:
        """The version of the weights that make the next token."""
        return self._version

    def load(self, weights: Mapping[str, Tensor], version: str) -> None:
        """Copies new weights in, between two tokens. Raises `ConfigError` and keeps the old ones if they don't fit."""
        with self._held():
            copy_weights(self._model, weights)
            self._version = version
            self._loads += 1

    def digest(self) -> tuple[str, str]:
        """The version and the digest of the weights that are served, read between two tokens."""
        with self._held():
            return self._version, digest(parameters(self._model))

    async def update(self, weights: Mapping[str, Tensor], version: str) -> None:
        """`load`, without blocking the event loop while a token is computed."""
        await asyncio.to_thread(self.load, weights, version)

    async def chat(self, request: Mapping[str, Any]) -> Completion:
        """Answers a chat completion request; status 400 with OpenAI's error body for what this engine can't do.

        The log-probability of a token is the model's own, before temperature (vLLM's default). Raises
        `EngineClosed` if the engine has been closed, and `TooManyWaiting` beyond the policy's limit.
        """
        try:
            job = self._job(request)
        except Unsupported as error:
            return Completion(400, error.body)
        with self._asking:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self._jobs.qsize() >= self._policy.waiting:
                raise TooManyWaiting(
                    f"{self._policy.waiting:,} requests are waiting, the most that this engine takes: retry, or send "
                    "fewer at a time"
                )
            self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    async def close(self) -> None:
        """Answers the requests so far, refuses further ones, stops the thread."""
        with self._asking:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    # Requests

    def _job(self, given: Mapping[str, Any]) -> _Job:
        request = {key: value for key, value in given.items() if value is not None}
        for key, value in request.items():
            if key not in READ | IGNORED and value not in NEUTRAL.get(key, ()):
                raise Unsupported(f"this engine does not support {key}={self._shown(value)}", utf8(key))
        prompt = self.render(request.get("messages"))
        room = self._context - len(prompt)
        limit = self._number(
            request, "max_completion_tokens", self._number(request, "max_tokens", max(room, 1), int, 1), int, 1
        )
        if limit > room:
            raise Unsupported(
                f"the prompt has {len(prompt)} tokens and max_tokens is {limit}, "
                f"but the model's context holds {self._context}",
                "messages",
                "context_length_exceeded",
            )
        stop = request.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        most = self._policy.stops
        if not isinstance(stop, list) or len(stop) > most or not all(isinstance(text, str) and text for text in stop):
            raise Unsupported(f"stop must be a text or a list of at most {most} texts", "stop", "invalid_value")
        random = None
        if "seed" in request:
            random = torch.Generator().manual_seed(self._number(request, "seed", 0, int, -(1 << 63), (1 << 64) - 1))
        temperature = self._number(request, "temperature", 1.0, float, 0.0, 1e6)
        return _Job(
            request_id=str(request.get("request_id") or uuid.uuid4().hex),
            model=self._typed(request, "model", str, "") or self.name,
            prompt=prompt,
            limit=limit,
            temperature=0.0 if temperature < GREEDY else float(temperature),
            stop=tuple(stop),
            random=random,
            logprobs=self._typed(request, "logprobs", bool, False),
            return_token_ids=self._typed(request, "return_token_ids", bool, False),
        )

    def _typed(self, request: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
        value = request.get(key, default)
        if not isinstance(value, kind):
            name = {bool: "true or false", str: "a text"}[kind]
            raise Unsupported(f"{key} must be {name}, not {self._shown(value)}", key, "invalid_value")
        return value

    def _number(
        self,
        request: Mapping[str, Any],
        key: str,
        default: Any,
        kind: type[int] | type[float],
        least: float,
        most: float = math.inf,
    ) -> Any:
        value = request.get(key, default)
        if not isinstance(value, (int, kind)) or isinstance(value, bool) or not least <= value <= most:
            limit = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            message = f"{key} must be {'an integer' if kind is int else 'a number'} {limit}, not {self._shown(value)}"
            raise Unsupported(message, key, "invalid_value")
        return value

    def _shown(self, value: Any) -> str:
        text = safe_repr(value)
        return text if len(text) <= self._policy.shown else f"{text[: self._policy.shown]}…"

    def render(self, messages: Any) -> list[int]:
        """The token ids of a prompt. Raises `Unsupported`."""
        if not isinstance(messages, list) or not messages:
            raise Unsupported("messages must be a list of at least one message", "messages", "invalid_value")
        plain = []
        for i, message in enumerate(messages):
            text = _text(message.get("content")) if isinstance(message, dict) else None
            if text is None or not isinstance(message.get("role"), str) or message.get("tool_calls"):
                raise Unsupported(f"messages[{i}] needs a role, and text as its content", "messages", "invalid_value")
            plain.append({"role": utf8(message["role"]), "content": utf8(text)})  # tokenizers refuse half characters
        try:
            ids = self._tokenizer.apply_chat_template(
                plain, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:  # such as roles in an order that the model does not know
            message = f"the model's chat template refuses the messages: {error}"
            raise Unsupported(message, "messages", "invalid_value") from error
        return list(ids)

    # The worker thread

    def _work(self) -> None:
        one_thread()
        while (first := self._jobs.get()) is not None:
            jobs = [job for job in self._batch(first) if not job.future.cancelled()]
            if not jobs:
                continue
            try:
                with self._held() if self._deterministic else nullcontext(), torch.inference_mode():
                    self._generate(jobs)
            except Exception as error:
                for job in jobs:
                    _settle(job, error)
            else:
                for job in jobs:
                    _settle(job, Completion(200, self._body(job), tuple(job.versions)))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Exclusive access to the weights."""
        with self._turn:
            self._weights.acquire()
        try:
            yield
        finally:
            self._weights.release()

    def _batch(self, first: _Job) -> list[_Job]:
        jobs = [first]
        with suppress(queue.Empty):
            while len(jobs) < self.max_batch:
                job = self._jobs.get_nowait()
                if job is None:
                    self._jobs.put(None)  # for `_work`, after this batch
                    break
                jobs.append(job)
        return jobs

    def _generate(self, jobs: Sequence[_Job]) -> None:
        """Samples until every job of the batch is finished; finished rows are computed and ignored."""
        inputs = left_pad([job.prompt for job in jobs])
        longest = max(job.limit for job in jobs)
        cache, loads = None, self._loads
        while True:
            with nullcontext() if self._deterministic else self._held():
                if loads != self._loads:  # what was computed so far is of other weights
                    inputs, cache, loads = left_pad([job.prompt + job.tokens for job in jobs]), None, self._loads
                version = self._version
                out = self._model(**inputs, past_key_values=cache, use_cache=longest > 1, logits_to_keep=1)
            cache = out.past_key_values
            tokens = self._sample(jobs, out.logits[:, -1], version)
            if all(job.finish_reason for job in jobs):
                return
            one = torch.ones_like(inputs["attention_mask"][:, :1])
            inputs = {
                "input_ids": tokens[:, None],
                "attention_mask": torch.cat([inputs["attention_mask"], one], dim=1),
                "position_ids": inputs["position_ids"][:, -1:] + 1,
            }

    def _sample(self, jobs: Sequence[_Job], logits: Tensor, version: str) -> Tensor:
        """One token per row, by the Gumbel-max trick: argmax(logits / temperature + noise) is a draw from the softmax.
        ``logits`` is (rows, vocabulary), the result (rows,)."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        noise = torch.empty_like(logprobs).exponential_(generator=self._random)
        for i, job in enumerate(jobs):
            if job.random is not None:
                noise[i].exponential_(generator=job.random)
            if job.temperature == 0:
                noise[i] = 1.0  # its logarithm is 0
        temperatures = torch.tensor([job.temperature or 1.0 for job in jobs])
        scores = logprobs / temperatures[:, None] - noise.clamp(min=1e-30).log()
        tokens = scores.argmax(dim=-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        for job, token, logprob in zip(jobs, tokens.tolist(), chosen, strict=True):
            if not job.finish_reason:
                self._append(job, token, logprob, version)
        return tokens

    def _append(self, job: _Job, token: int, logprob: float, version: str) -> None:
        if not job.versions or job.versions[-1][1] != version:
            job.versions.append((len(job.tokens), version))
        job.tokens.append(token)
        job.token_logprobs.append(logprob)
        job.text = self._tokenizer.decode(job.tokens, skip_special_tokens=True)
        ends = [at for text in job.stop if (at := job.text.find(text)) >= 0]
        if ends:
            job.text = job.text[: min(ends)]
        if ends or token in self._eos:
            job.finish_reason = "stop"
        elif len(job.tokens) >= job.limit:
            job.finish_reason = "length"

    def _body(self, job: _Job) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": job.text},
            "logprobs": None,
            "finish_reason": job.finish_reason,
        }
        if job.logprobs:
            words = self._tokenizer.convert_ids_to_tokens(job.tokens)
            choice["logprobs"] = {
                "content": [
                    {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}
                    for word, logprob in zip(words, job.token_logprobs, strict=True)
                ]
            }
        body: dict[str, Any] = {
            "id": f"chatcmpl-{job.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": job.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(job.prompt),
                "completion_tokens": len(job.tokens),
                "total_tokens": len(job.prompt) + len(job.tokens),
            },
        }
        if job.return_token_ids:
            body["prompt_token_ids"] = job.prompt
            choice["token_ids"] = job.tokens
        return body


def _text(content: Any) -> str | None:
    """A message's content, given as text or in text parts. None if it is anything else."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if len(found) == len(texts) else None


def _settle(job: _Job, result: Completion | Exception) -> None:
    """Hands the result over, unless the request was cancelled."""
    if job.future.set_running_or_notify_cancel():
        if isinstance(result, Completion):
            job.future.set_result(result)
        else:
            job.future.set_exception(result)
