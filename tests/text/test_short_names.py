"""Names of models and workers as people read them."""

from __future__ import annotations

import pytest

from sollol_nb.text.short_names import (
    fitted_name,
    short_endpoints,
    short_name,
    short_names,
    without_domains,
    without_home,
)

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


@pytest.mark.parametrize(
    ("names", "without_domain", "shortest"),
    [
        (["gpu1.lab.org:1", "gpu2.lab.org:1"], ["gpu1:1", "gpu2:1"], ["gpu1", "gpu2"]),
        (["a.x.org:1", "a.y.org:1"], ["a.x.org:1", "a.y.org:1"], ["a.x.org", "a.y.org"]),
        (["127.0.0.1:50052", "127.0.0.1:50053"], None, [":50052", ":50053"]),
        (["[::1]:50052", "[::1]:50053"], None, [":50052", ":50053"]),
        (["10.0.0.1:50052", "10.0.0.2:50052"], None, ["10.0.0.1", "10.0.0.2"]),
        (["10.0.0.1:50052", "10.0.0.2:50053"], None, None),
        (["gpu1/CUDA0", "gpu1/CUDA1"], None, None),
        (["this machine", "10.0.0.1:50052"], None, None),
        (["ssh://gpu1.lab.org:2222"], None, None),
        ([], None, None),
    ],
)
def test_workers_have_short_names_that_tell_them_apart(
    names: list[str], without_domain: list[str] | None, shortest: list[str] | None
) -> None:
    assert without_domains(names) == dict(zip(names, without_domain or names, strict=True))
    assert short_endpoints(names) == dict(zip(names, shortest or names, strict=True))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/m/a.gguf", "~/m/a.gguf"),
        ("held by the coordinator of /home/me/m/a.gguf", "held by the coordinator of ~/m/a.gguf"),
        ("/home/member/a.gguf", "/home/member/a.gguf"),
        ("/data/home/me/a.gguf", "/data/home/me/a.gguf"),
        ("llama3.1:70b", "llama3.1:70b"),
    ],
)
def test_paths_below_the_home_folder_do_not_name_it(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert without_home(text) == shown
