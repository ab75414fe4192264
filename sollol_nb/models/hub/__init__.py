"""Models from the Hugging Face Hub, for llama.cpp.

- `files.py`: which files of a repository make up a model.
- `pull.py`: a model is downloaded and gets a short name.
- `repository.py`: one repository, and its folder in the cache.
- `failures.py`: what went wrong, and what to do.
"""
