"""The gateway: a process that owns a cluster and serves the APIs of Ollama, OpenAI and Anthropic (an extra).

In reading order:

* `__main__.py`, `command.py`: its arguments; `python -m sollol_nb.gateway` and `sollol-nb gateway`.
* `server.py`: the process: it listens, serves, and lets running answers finish before it ends.
* `connections.py`: HTTP and its limits. `access_log.py`: a line for each request.
* `gateway.py`: what the routes of one gateway share. `app.py`: the routes, and the shape of their errors.
* `access.py`, `keys.py`, `limits.py`: which requests are allowed, and how many.
* `bodies.py`, `calls.py`: the body and headers of a request, bounded and checked.
* `answers.py`: how an answer is sent, whatever the API.
* `failures.py`: every error as a status and a kind, which each API writes in its shape.
* `ollama_api.py`, `openai_api.py`, `responses_api.py`, `anthropic_api.py`: translation from and to each API;
  `openai_completions.py`, `openai_embeddings.py`: other paths of OpenAI's; `ollama_models.py`, `openai_models.py`,
  `anthropic_models.py`: their lists of models; `ollama_parts.py`, `openai_parts.py`: shared by their paths;
  `responses_parts.py`, `anthropic_parts.py`, `anthropic_messages.py`: translation of their bodies.
* `notebook_api.py`: what kernels that use this gateway call.
* `health.py`, `metrics.py`, `cluster_view.py`, `status_page.py`: the gateway's state.
* `openapi.py`: all routes as an OpenAPI document.
* `server_proxy.py`: the tile in JupyterLab's launcher.

Starlette and uvicorn are used because they add little between a request and the router (no validation layer, no
dependency injection), and run on the I/O loop that the router uses.
"""
