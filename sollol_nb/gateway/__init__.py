"""The gateway: a process that owns a cluster and speaks the APIs of Ollama, OpenAI and Anthropic (an extra).

In reading order:

* `__main__.py`, `command.py`: its arguments; `python -m sollol_nb.gateway` and `sollol-nb gateway`.
* `server.py`: the process: it listens, serves, and ends without losing an answer.
* `connections.py`: HTTP and its limits. `access_log.py`: a line for each request.
* `gateway.py`: what the routes of one gateway share. `app.py`: the routes, and the shape of their errors.
* `access.py`, `keys.py`, `limits.py`: who may ask how much.
* `bodies.py`, `calls.py`: what a request says, bounded and checked.
* `answers.py`: how an answer is sent, whatever the API.
* `failures.py`: every error as a status and a kind, which each API writes in its shape.
* `ollama_api.py`, `openai_api.py`, `responses_api.py`, `anthropic_api.py`: translation from and to each API;
  `openai_completions.py`, `openai_embeddings.py`: more of OpenAI's; `ollama_models.py`, `openai_models.py`,
  `anthropic_models.py`: theirs about models; `ollama_parts.py`, `openai_parts.py`: what their paths have in
  common; `responses_parts.py`, `anthropic_parts.py`, `anthropic_messages.py`: what their bodies say.
* `notebook_api.py`: what kernels that use this gateway call.
* `health.py`, `metrics.py`, `cluster_view.py`, `status_page.py`: what shows the gateway's state.
* `openapi.py`: all routes as an OpenAPI document.
* `server_proxy.py`: the tile in JupyterLab's launcher.

Starlette and uvicorn are used because they add little between a request and the router (no validation layer, no
dependency injection), and run on the I/O loop that the router uses.
"""
