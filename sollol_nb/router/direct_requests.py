"""Requests whose answers are numbers: token counts of messages, and embeddings of texts.

They wait at the gates of Ollama's nodes like other requests, but have no row in the latency log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sollol_nb.chat.option_checks import check_options
from sollol_nb.chat.plain_data import checked_text
from sollol_nb.chat.request import ChatRequest, checked_timeout_s, ollama_keep_alive
from sollol_nb.errors import (
    ConfigError,
    ContextOverflowError,
    CoordinatorLostError,
    OllamaResponseError,
    RequestTimeoutError,
)
from sollol_nb.llama_cpp.answers.protocol import has_media
from sollol_nb.models.files import names_file
from sollol_nb.models.routing import OLLAMA, Route
from sollol_nb.router.active_request import RequestServices, as_read_by, check_route_options, ollama_options
from sollol_nb.router.finder import checked_model
from sollol_nb.runtime.amounts import is_whole_number, shown
from sollol_nb.runtime.priority import checked_priority
from sollol_nb.settings import config
from sollol_nb.text.short_names import short_name

MOST_ATTEMPTS = 3
"""Of a count, over coordinators that end meanwhile."""


async def count_tokens(
    services: RequestServices,
    model: str | Path,
    messages: Sequence[Mapping[str, Any]] | str,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    think: bool | str | None,
    system: str | None,
    backend: str | None,
    priority: int,
    timeout_s: float,
) -> int:
    """As `Router.count_tokens`."""
    request = ChatRequest.checked(
        messages,
        schema=None,
        backend=backend,
        priority=priority,
        timeout_s=timeout_s,
        options={"tools": None if tools is None else list(tools), "think": think},
    )
    saved = await asyncio.to_thread(config.saved_model, str(model))
    request = request.with_defaults({}, saved.system if system is None else system)
    route = await services.routes.find(model, request.backend)
    request, _ = await as_read_by(services.ollama, route, request)
    await check_route_options(request, route)
    if route.backend == OLLAMA:
        return await _count_at_ollama(services, route, request)
    if any(map(has_media, request.messages)):
        raise ConfigError(f"{route.name}: llama.cpp does not count the tokens of images; leave them out")
    request = request.with_modelfile(route.modelfile)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        coordinator, _ = await services.coordinators.get(route)
        if not await coordinator.hold():
            continue
        try:
            async with asyncio.timeout(request.timeout_s):
                return await coordinator.count_tokens(request.messages, request.options)
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"{route.name} did not count the tokens within {request.timeout_s:g} s; give a larger timeout"
            ) from error
        except CoordinatorLostError:
            if attempt == MOST_ATTEMPTS:
                raise
        finally:
            coordinator.free()
    raise CoordinatorLostError(f"{route.name}: its coordinators ended again and again; try again")


async def _count_at_ollama(services: RequestServices, route: Route, request: ChatRequest) -> int:
    """The tokens that Ollama reports with an answer of one token; it has no other way to count them."""
    try:
        answer = await services.ollama.chat(
            route.model,
            request.messages,
            priority=request.priority,
            timeout=request.timeout_s,
            **{**ollama_options(request.options), "max_tokens": 1},
        )
    except ContextOverflowError as error:
        if error.prompt_tokens is None:
            raise
        return error.prompt_tokens
    tokens = answer.get("prompt_eval_count")
    if tokens is None:
        raise OllamaResponseError(f"Ollama did not report the tokens of the prompt for {route.name}; update it")
    return int(tokens)


async def embed(
    services: RequestServices,
    model: str | Path,
    inputs: str | Sequence[str],
    *,
    dimensions: int | None,
    truncate: bool | None,
    keep_alive: float | str | None,
    options: Mapping[str, Any] | None,
    priority: int,
    timeout_s: float,
) -> dict[str, Any]:
    """As `Router.embed`."""
    given = check_options({"options": None if options is None else dict(options), "keep_alive": keep_alive})
    if "keep_alive" in given:
        given["keep_alive"] = ollama_keep_alive(given["keep_alive"])
    if not (dimensions is None or (is_whole_number(dimensions) and dimensions >= 1)):
        raise ConfigError(f"dimensions={shown(dimensions)} must be a whole number of 1 or more")
    if not isinstance(truncate, bool | None):
        raise ConfigError(f"truncate={shown(truncate)} must be True or False")
    given |= {"priority": checked_priority(priority), "timeout": checked_timeout_s(timeout_s)}
    texts, name = _checked_inputs(inputs), checked_model(model)
    route = await _embedding_route(services, name)
    try:
        return await services.ollama.embed(route.model, texts, dimensions=dimensions, truncate=truncate, **given)
    except ContextOverflowError as error:
        raise ContextOverflowError(
            f"a text has more tokens than the context of {short_name(name)}; shorten it, or give truncate=True",
            prompt_tokens=error.prompt_tokens,
            context_tokens=error.context_tokens,
        ) from error


async def _embedding_route(services: RequestServices, model: str) -> Route:
    """The route to Ollama, if it has the model, whatever its size.

    Raises:
        ConfigError: llama.cpp has it.
        ModelNotFoundError: no backend has it.
    """
    if not names_file(model) and await services.ollama.has_model(model):
        return await services.routes.find(model, OLLAMA)
    route = await services.routes.find(model, None)
    if route.backend != OLLAMA:
        raise ConfigError(
            f"{short_name(model)} is routed to llama.cpp, which has no embeddings here; use an embedding model in "
            "Ollama, such as nomic-embed-text"
        )
    return route


def _checked_inputs(inputs: Any) -> str | list[str]:
    if isinstance(inputs, str):
        return checked_text(inputs, "inputs")
    if not isinstance(inputs, list | tuple) or not all(isinstance(text, str) for text in inputs):
        raise ConfigError("inputs must be a text, or a list of texts")
    return [checked_text(text, f"inputs[{position}]") for position, text in enumerate(inputs)]
