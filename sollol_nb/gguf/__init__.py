"""Model files in GGUF format.

- `header.py`: the header of one file.
- `vocabulary.py`: its tokens.
- `facts.py`: what it says about the model: size, blocks, memory of its context.
"""
