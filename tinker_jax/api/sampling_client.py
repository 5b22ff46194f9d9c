"""`SamplingClient`: draws from fixed weights."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn

from tinker_jax.api.client_future import BackcompatClientFuture
from tinker_jax.api.deprecation import final_twin, future_twin
from tinker_jax.api.door import base_model_name, tokenizer_of
from tinker_jax.api.futures import APIFuture, Derived, DerivedAPIFuture
from tinker_jax.types import ModelInput, SampleRequest, SampleResponse, SamplingParams, TensorData, _check
from tinker_jax.types.errors import BadRequestError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinker_jax.api.session import Session
    from tinker_jax.engine.engine import Engine, ModelInfo


class SamplingClient:
    """Samples from a base model, a checkpoint, or the weights of a training client. They never change, except where a training
    client made this one with `kind="inflight"`.

    Made by `ServiceClient.create_sampling_client`, `TrainingClient.save_weights_and_get_sampling_client` and
    `TrainingClient.create_sampling_client`. Any number of calls, from any threads and event loops, are batched together.
    """

    def __init__(
        self, session: Session, engine: Engine, info: ModelInfo, sampler_id: str, model_path: str | None = None
    ) -> None:
        self._session, self._engine, self._info = session, engine, info
        self._sampler_id, self._model_path = sampler_id, model_path
        self._requests = itertools.count()
        session.samplers[sampler_id] = self
        session.adopt(self, engine.release, sampler_id)

    def __repr__(self) -> str:
        weights = "" if self._model_path is None else f", weights {self._model_path!r}"
        what = f"{self._info.name!r}{weights}, sampler_id {self._sampler_id!r}, {self._session.state}"
        return f"<tinker_jax.SamplingClient of {what}>"

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """Draws `num_samples` continuations of one prompt, which is read only once.

        Args:
            prompt: at least one token, and within the model's context.
            num_samples: >= 1.
            sampling_params: `SamplingParams(max_tokens, seed, stop, temperature, top_k, top_p)`; without `max_tokens` it
                goes on to a stop or the end of the context or the engine's cache.
            include_prompt_logprobs: also score the prompt.
            topk_prompt_logprobs: report the k likeliest tokens at each prompt position.
            topk_sample_logprobs: report the k likeliest tokens at each drawn position.
            target_prompt_logprobs: int64 `[len(prompt) - 1, K]`: score these ids at position i + 1; -1 skips.
            prompt_alt_tokens_k: draw k tokens at each prompt position after the first.
            prompt_logprobs_last_n: score only the last n prompt tokens.

        Returns:
            A future of a `SampleResponse`; of what was not asked for the fields are None:

            sequences: `num_samples` of `SampledSequence`:
                stop_reason: `"stop"` or `"length"`.
                sequence_id: unique within the process.
                tokens, tokens_np: ids, int32 [n], those that stopped it included.
                logprobs, logprobs_np: float32 [n], of these tokens at the temperature, over the whole vocabulary, in nats.
                topk_logprobs, topk_logprobs_np: likeliest tokens at each position: lists of (id, logprob); [n, k].
            prompt_logprobs, prompt_logprobs_np: float32 [len(prompt)] at temperature 1; None and NaN at the first token.
            topk_prompt_logprobs, topk_prompt_logprobs_np: likeliest tokens at each prompt position, in the same form.
            target_prompt_logprobs: float32, laid out as the argument; 0 where it said -1.
            prompt_cache_hit_tokens: prompt tokens that were not computed again.
            prompt_alt_tokens: `tokens` int64 and `logprobs` float32, each [len(prompt) - 1, k].

        Raises:
            BadRequestError: at the call, naming the argument; once the model is loaded this goes for its limits too.
            UnsupportedError: image or audio chunks.
            StateError: the service client is closed.
        """
        self._session.require_open()
        request = SampleRequest(
            num_samples=num_samples,
            prompt=prompt,
            sampling_params=sampling_params,
            sampling_session_id=self._sampler_id,
            seq_id=next(self._requests),
            prompt_logprobs=_check.boolean(include_prompt_logprobs, "include_prompt_logprobs"),
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        future = self._session.track(self._engine.sample(self._sampler_id, request), self)
        return DerivedAPIFuture(lambda response: response, future)

    sample_async = final_twin(sample)

    def compute_logprobs(self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None) -> APIFuture[list[float | None]]:
        """Log-probability of each prompt token given those before it; None for the first."""
        self._session.require_open()
        request = SampleRequest(
            prompt=prompt,
            sampling_params=SamplingParams(max_tokens=1),
            sampling_session_id=self._sampler_id,
            seq_id=next(self._requests),
            prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        future = self._session.track(self._engine.sample(self._sampler_id, request), self)
        return DerivedAPIFuture(lambda response: response.prompt_logprobs, future)

    compute_logprobs_async = final_twin(compute_logprobs)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return tokenizer_of(self._info.directory)

    def get_base_model(self) -> str:
        """Name of the base model."""
        return self._info.name

    get_base_model_async = future_twin(get_base_model)

    def get_sampler_handle(self) -> NoReturn:
        """Refused: see `__reduce__`."""
        raise UnsupportedError(_WEIGHTS_LIVE_HERE)

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> NoReturn:
        """Refused: see `__reduce__`."""
        raise UnsupportedError(_WEIGHTS_LIVE_HERE)

    def get_telemetry(self) -> None:
        """Nothing is ever sent anywhere."""
        return None

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(_WEIGHTS_LIVE_HERE)


def warm_up(client: SamplingClient, adapters: int = 1) -> APIFuture[int]:
    """Compiles what sampling can need, whatever the lengths, stops, temperatures and numbers of samples to come.

    Without it each program compiles at its first use. Top-k log-probabilities, targets, alternatives, adapters of another rank
    and, with `EngineConfig(deterministic=True)`, the programs of training that compute what is reported still do.

    Args:
        client: that will be sampled from, or one like it.
        adapters: of the client's rank, at most, that will be sampled from at the same moment.

    Returns:
        Number of compiled programs.

    Raises:
        BadRequestError: `client` is no SamplingClient, or `adapters` no positive integer.
    """
    if isinstance(client, BackcompatSamplingClientFuture):
        client = client.result()
    if not isinstance(client, SamplingClient):
        raise _check.refuse("client", "a SamplingClient", client)
    client._session.require_open()
    adapters = _check.integer(adapters, "adapters", minimum=1)
    future = client._session.track(client._engine.warm_up(client._sampler_id, adapters), client)
    return DerivedAPIFuture(lambda programs: programs, future)


_WEIGHTS_LIVE_HERE = (
    "a SamplingClient's weights live in this process, so it cannot be pickled or handed to another one; "
    "use threads or asyncio here, or save_weights_for_sampler() and create_sampling_client(model_path=...) there"
)


class BackcompatSamplingClientFuture(BackcompatClientFuture[SamplingClient], SamplingClient):
    """A `SamplingClient` that is not ready yet."""

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(_WEIGHTS_LIVE_HERE)


def open_sampling_client(session: Session, model_path: str | None, base_model: str | None) -> BackcompatSamplingClientFuture:
    """A client of a stored checkpoint, or of a bare base model."""
    session.require_open()
    if model_path is None and base_model is None:
        raise BadRequestError("create_sampling_client needs model_path, base_model or both")
    if model_path is not None:
        record = session.store.get(_check.name(model_path, "model_path"))
        base_model = record.base_model if base_model is None else base_model
    sampler_id = session.next_sampler_id()
    engine = session.engine(base_model_name(base_model), sampler_id)
    return sampling_client_of(session, engine, sampler_id, engine.load_sampler(sampler_id, model_path), model_path)


def sampling_client_of(
    session: Session, engine: Engine, sampler_id: str, ready: Future[Any], model_path: str | None = None
) -> BackcompatSamplingClientFuture:
    """The client of sampler `sampler_id`, once `ready`."""
    session.track(ready, engine)
    client = Derived(lambda info, _: SamplingClient(session, engine, info, sampler_id, model_path), engine.info(), ready)
    session.give_up(client, engine.release, sampler_id)
    return BackcompatSamplingClientFuture(client)
