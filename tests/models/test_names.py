"""A model's name, taken apart as Ollama does."""

from __future__ import annotations

import pytest

from sollol_nb.models.names import ModelName


@pytest.mark.parametrize(
    ("text", "parts", "short"),
    [
        ("llama3.2", ("registry.ollama.ai", "library", "llama3.2", "latest"), "llama3.2:latest"),
        ("llama3.1:70b", ("registry.ollama.ai", "library", "llama3.1", "70b"), "llama3.1:70b"),
        ("user/model:tag", ("registry.ollama.ai", "user", "model", "tag"), "user/model:tag"),
        ("hf.co/u/r-GGUF:Q4_K_M", ("hf.co", "u", "r-GGUF", "Q4_K_M"), "hf.co/u/r-GGUF:Q4_K_M"),
        ("host:5000/u/m", ("host:5000", "u", "m", "latest"), "host:5000/u/m:latest"),
        ("http://host:5000/u/m:1", ("host:5000", "u", "m", "1"), "host:5000/u/m:1"),
    ],
)
def test_a_name_has_four_parts(text: str, parts: tuple[str, str, str, str], short: str) -> None:
    name = ModelName.parse(text)
    assert (name.host, name.namespace, name.model, name.tag) == parts
    assert str(name) == short
    assert ModelName.parse(short) == name
