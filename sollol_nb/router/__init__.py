"""The router: which backend answers a request, the life of the request, and its record.

- `router.py`: `Router`, the API of all this.
- `requests.py`: its methods that ask a model.
- `tool_loop.py`: answers that call Python functions.
- `own_engines.py`: what it works with: workers, coordinators, Ollama nodes.
- `remote/`: the same, where a gateway has them.
- `settings.py`: the arguments of a router, checked.
- `finder.py`: from a model's name to a route.
- `active_request.py`: the life of one request.
- `direct_requests.py`: tokens counted, texts embedded.
- `failover.py`: an answer that is continued when its coordinator is lost.
- `journaled.py`: what requests write into the journal of answers.
- `continuing.py`: an answer continued from its text.
- `resumption.py`: an answer of the journal continued.
- `record.py`: the times of one request, its `_routing` and its latency row.
- `cluster_control.py`: workers and coordinators, shown and changed.
"""
