"""OpenAI's list of models: those of Ollama's nodes and storage, and those that llama.cpp runs here.

Anthropic's clients use the same paths, with the header `anthropic-version`.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from sollol_nb.gateway import anthropic_models
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import gateway_of
from sollol_nb.models.listing import ListedModel
from sollol_nb.models.names import key_of
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.short_names import is_file_name


async def available_models(request: Request) -> list[ListedModel]:
    """The models that the gateway can answer with: the running ones first, then the others by name."""
    models = await gateway_of(request).router.listed_models()
    return [model for model in models if (model.where or model.running) and not is_file_name(model.model)]


async def named_model(request: Request) -> ListedModel:
    """The model that the path names, as its parameter `model`.

    Raises:
        ApiError: no model has this name.
    """
    name = request.path_params["model"]
    key = key_of(name)
    for model in await available_models(request):
        if name == model.model or (key is not None and key == key_of(model.model)):
            return model
    raise ApiError(404, "not_found", f"there is no model {shown(name)}; see /v1/models", parameter="model")


async def _list(request: Request) -> Response:
    models = await available_models(request)
    if anthropic_models.asks(request):
        return JSONResponse(anthropic_models.page(models, request.query_params))
    return JSONResponse({"object": "list", "data": [_shape(model) for model in models]})


async def _show(request: Request) -> Response:
    shape = anthropic_models.shape if anthropic_models.asks(request) else _shape
    return JSONResponse(shape(await named_model(request)))


def _shape(model: ListedModel) -> dict[str, Any]:
    return {"id": model.model, "object": "model", "created": 0, "owned_by": model.where or model.running}


ROUTES: list[BaseRoute] = [
    Route("/v1/models", _list, methods=["GET"]),
    Route("/v1/models/{model:path}", _show, methods=["GET"]),
]
