"""Prompt templates in Go's language, in which Ollama keeps them, for llama.cpp, which reads Jinja.

- `syntax.py`: the parser, and the tree that it gives.
- `render.py`: a prompt as Ollama renders it.
- `jinja.py`: the same template in Jinja.
- `proof.py`: a translation is used only where both give the same prompts.
"""
