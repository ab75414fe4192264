"""The Ollama backend: all Ollama nodes as one.

- `pool.py`: the pool: chat, generate, embed, pull and the rest.
- `generated.py`: continuations of raw prompts, as chunks of a chat.
- `serving.py`: how a request passes through the nodes: choose, wait, read, fail over.
- `fitting.py`: chats whose oldest turns are dropped to fit the context.
- `choice.py`: which node a request goes to.
- `nodes.py`: one node: its state, its models, its speed.
- `pool_request.py`: one request in the pool, and what has happened to it so far.
- `exchange.py`: one request to one node, with its silences watched.
- `requests.py`: requests and answers as plain data.
- `messages.py`: messages in OpenAI's shapes, as Ollama takes them.
- `answers.py`: what nodes send, checked.
"""
