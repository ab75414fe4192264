"""Models: their names, files and profiles, and where a model may run.

- `names.py`: a model's name, taken apart.
- `files.py`: from a name to a GGUF file: the demo model, a path, Ollama's storage.
- `found_files.py`: files of LM Studio, llama.cpp and the Hugging Face Hub, and of folders that the user names.
- `hub/`: models that are pulled from the Hugging Face Hub.
- `modelfile.py`: what Ollama's Modelfile adds to the weights.
- `profiles.py`: the size of a model, and whether it needs sharding.
- `routing.py`: which backend a model runs on, and why.
- `draft_models.py`: models that can draft tokens for a larger one.
- `listing.py`: all known models as a frame.

`demo.gguf` is the demo model.
"""
