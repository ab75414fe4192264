"""Model files in GGUF format.

- `header.py`: the header of one file.
- `facts.py`: what it says about the model: size, blocks, memory of its context.
"""
