"""Names of models as people read them."""

from __future__ import annotations

import pytest

from sollol_nb.text.short_names import fitted_name, short_name, short_names

DIGEST = "0123456789ab" + "c" * 52


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama3.1:70b", "llama3.1:70b"),
        ("hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M"),
        ("/home/me/models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("model.gguf", "model"),
        ("Model.GGUF", "Model"),
        ("/m/big-00001-of-00003.gguf", "big"),
        (r"C:\models\small.gguf", "small"),
        (f"/ollama/blobs/sha256-{DIGEST}", "sha256-0123456789ab"),
        ("~/models/file-without-suffix", "file-without-suffix"),
        ("./here/model.bin", "model.bin"),
        ("/m/.gguf", "/m/.gguf"),
        ("", ""),
    ],
)
def test_of_a_file_only_the_name_is_shown(model: str, name: str) -> None:
    assert short_name(model) == name


def test_files_with_the_same_name_get_as_many_folders_as_tell_them_apart() -> None:
    models = ["/x/a/m.gguf", "/x/b/m.gguf", "/y/b/m.gguf", "other.gguf", "m:7b", "/x/a/m.gguf"]
    assert short_names(models) == {
        "/x/a/m.gguf": "x/a/m",
        "/x/b/m.gguf": "x/b/m",
        "/y/b/m.gguf": "y/b/m",
        "other.gguf": "other",
        "m:7b": "m:7b",
    }
    assert len(set(short_names(["/a/m.gguf", "m.gguf", "m"]).values())) == 3


def test_a_long_name_keeps_both_ends() -> None:
    assert fitted_name("/m/SmolLM2-135M-Instruct.Q4_1.gguf", 15) == "SmolLM2…ct.Q4_1"
    assert fitted_name("short", 15) == "short"
