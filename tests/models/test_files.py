"""Finding a model's GGUF in Ollama's storage: one written by a real Ollama, and damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ModelFileError, ModelNotFoundError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.models.files import ARCHITECTURES, OllamaGGUFResolver, storage_folders
from tests.support.gguf_files import write_keys, write_llama
from tests.support.ollama_server import DEMO_MODEL, OllamaServer
from tests.support.ollama_storage import Storage

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "models")


@pytest.fixture
def llama(tmp_path: Path) -> bytes:
    return write_llama(tmp_path / "llama.gguf", blocks=1).read_bytes()


# --- storage that Ollama wrote --------------------------------------------------------------------


@pytest.mark.ollama
@pytest.mark.parametrize(
    "name",
    [
        "llama3.2",
        "llama3.2:latest",
        "llama3.1:70b",
        "LLAMA3.1:70B",
        "library/llama3.2",
        "registry.ollama.ai/library/llama3.2:latest",
        "someone/special:7b",
        "hf.co/someone/some-model-GGUF:Q4_K_M",
    ],
)
def test_a_model_created_by_ollama_is_found(ollama: OllamaServer, name: str) -> None:
    path = OllamaGGUFResolver(ollama.models_folder).get_gguf_path(name)
    assert isinstance(path, str)
    assert Path(path).parent == ollama.models_folder / "blobs"
    assert Path(path).read_bytes() == DEMO_MODEL.read_bytes()


@pytest.mark.ollama
def test_installed_models_have_the_names_ollama_shows(ollama: OllamaServer) -> None:
    shown = {entry["name"] for entry in ollama.ask("/api/tags")["models"]}
    assert set(OllamaGGUFResolver(ollama.models_folder).installed()) == shown


@pytest.mark.ollama
def test_a_digest_that_ollama_shows_pins_the_model(ollama: OllamaServer) -> None:
    resolver = OllamaGGUFResolver(ollama.models_folder)
    (shown,) = [e["digest"] for e in ollama.ask("/api/tags")["models"] if e["name"] == "llama3.2:latest"]
    blob = hashlib.sha256(DEMO_MODEL.read_bytes()).hexdigest()
    path = resolver.resolve("llama3.2")
    for name in (f"llama3.2@sha256:{shown}", f"llama3.2@sha256:{blob}", f"sha256:{blob}", f"sha256-{blob}"):
        assert resolver.resolve(name) == path, name
    with pytest.raises(ModelFileError, match="does not have the digest"):
        resolver.resolve(f"llama3.2@sha256:{'0' * 64}")
    with pytest.raises(ModelNotFoundError, match=r"sha256:00.* is not in Ollama"):
        resolver.resolve(f"sha256:{'0' * 64}")


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ":", "/", "a:", ":b", "/m", "m/", "a//b", "a b", "m:t:u/x:"),
        *("../../etc/passwd", "..", "../m", "u/..", "m:..", "./m", "/etc/passwd", "u/.hidden", "~/m"),
        *("m\0", "m:t\0", "u\\m", "..\\m", "C:\\m", "m:a/b", "a/b/c/d", "m\n", "-m", "ünïcode", "m" * 81),
        *("m@", "m@sha256:12", "m@md5:" + "0" * 32, "@", "file:///etc/passwd"),
    ],
)
def test_an_invalid_name_never_becomes_a_path(storage: Storage, text: str) -> None:
    (storage.root / "manifests").mkdir()
    with pytest.raises(ModelNotFoundError) as refused:
        OllamaGGUFResolver(storage.root).resolve(text)
    assert "\n" not in str(refused.value)


def test_a_manifest_cannot_lead_out_of_the_storage(storage: Storage, llama: bytes, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(llama)
    storage.model("registry.ollama.ai/library/m/latest", (MODEL, llama))
    manifest = storage.root / "manifests/registry.ollama.ai/library/m/latest"
    stated = json.loads(manifest.read_text())
    stated["layers"][0]["digest"] = "sha256:../../../outside"
    manifest.write_text(json.dumps(stated))
    with pytest.raises(ModelFileError, match="not an Ollama manifest"):
        OllamaGGUFResolver(storage.root).resolve("m")


# --- layers -----------------------------------------------------------------------------------------


def test_layers_are_distinguished_by_their_type(storage: Storage, llama: bytes, tmp_path: Path) -> None:
    projector = write_keys(tmp_path / "p.gguf", "clip", {"clip.block_count": 1}).read_bytes()
    adapter = write_keys(tmp_path / "a.gguf", "llama", {"llama.block_count": 1}).read_bytes()
    paths = storage.model(
        "registry.ollama.ai/library/seeing/latest",
        ("application/vnd.ollama.image.projector", projector),
        (MODEL, llama),
        ("application/vnd.ollama.image.adapter", adapter),
        ("application/vnd.ollama.image.template", b"{{ .Prompt }}"),
    )
    files = OllamaGGUFResolver(storage.root).files("seeing")
    assert (files.name, files.model) == ("seeing:latest", paths[1])
    assert (files.projectors, files.adapters) == ((paths[0],), (paths[2],))


@pytest.mark.parametrize(
    ("layers", "config", "reason"),
    [
        ([], {}, "has no model layer.*ollama pull m:latest"),
        ([("application/vnd.ollama.image.projector", b"GGUF")], {}, "has no model layer"),
        ([("application/vnd.ollama.image.tensor", b"x")], {}, "separate tensors.*not as GGUF"),
        ([], {"remote_host": "https://ollama.com"}, "cloud model.*no file"),
    ],
)
def test_a_model_without_a_gguf_says_why(
    storage: Storage, layers: list[tuple[str, bytes]], config: dict[str, Any], reason: str
) -> None:
    storage.model("registry.ollama.ai/library/m/latest", *layers, config=config)
    with pytest.raises(ModelFileError, match=reason):
        OllamaGGUFResolver(storage.root).resolve("m")


# --- damage -----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def leave_partial(path: Path) -> None:
    path.rename(f"{path}-partial")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
        pytest.param(leave_partial, "is incomplete", id="partial"),
        pytest.param(truncate, "bytes instead of [0-9]+", id="too short"),
    ],
)
def test_a_damaged_blob_is_named_with_its_reason_and_the_remedy(
    storage: Storage, llama: bytes, damage: Callable[[Path], None], reason: str
) -> None:
    (path,) = storage.model("registry.ollama.ai/user/m/7b", (MODEL, llama))
    damage(path)
    with pytest.raises(ModelFileError, match=reason) as error:
        OllamaGGUFResolver(storage.root).resolve("user/m:7b")
    message = str(error.value)
    assert message.startswith("user/m:7b: ")
    assert str(path) in message
    assert message.endswith("Run: ollama pull user/m:7b")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (b"GGUF\x03\0\0\0", "truncated"),
        (b"GGUF\x63\0\0\0" + bytes(64), "version 99"),
    ],
)
def test_a_blob_that_is_not_gguf_is_named_with_its_reason(storage: Storage, content: bytes, reason: str) -> None:
    (path,) = storage.model("registry.ollama.ai/library/m/latest", (MODEL, content))
    with pytest.raises(ModelFileError, match=reason) as error:
        OllamaGGUFResolver(storage.root).resolve("m")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "keys", "reason"),
    [
        ("mllama", {}, "architecture 'mllama', which this llama.cpp does not load"),
        ("gptoss", {}, "architecture 'gptoss'"),
        ("clip", {}, "architecture 'clip'"),
        ("gemma3", {"gemma3.vision.block_count": 2}, "contains its vision part"),
        ("gemma4", {"gemma4.audio.block_count": 2}, "contains its audio part"),
        ("gemma3", {}, None),
    ],
)
def test_a_model_that_only_ollamas_own_engine_loads_is_refused(
    storage: Storage, tmp_path: Path, architecture: str, keys: dict[str, int], reason: str | None
) -> None:
    all_keys = {f"{architecture}.block_count": 1, **keys}
    content = write_keys(tmp_path / "m.gguf", architecture, all_keys).read_bytes()
    (path,) = storage.model("registry.ollama.ai/library/m/latest", (MODEL, content))
    resolver = OllamaGGUFResolver(storage.root)
    if reason is None:
        assert resolver.resolve("m") == path
    else:
        with pytest.raises(ModelFileError, match=reason) as error:
            resolver.resolve("m")
        assert str(path) in str(error.value)


def test_the_architectures_are_those_of_models() -> None:
    assert {"llama", "gpt-oss", "gemma3", "qwen3moe", "deepseek2", "mamba"} <= ARCHITECTURES
    assert "clip" not in ARCHITECTURES
    assert read_facts(DEMO_MODEL).architecture in ARCHITECTURES


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"layers": 5}', '{"layers": [{"digest": 1}]}', '{"layers": [5]}', "[" * 100_000]
)
def test_a_broken_manifest_is_named(storage: Storage, manifest: str) -> None:
    path = storage.root / "manifests/registry.ollama.ai/library/m/latest"
    path.parent.mkdir(parents=True)
    path.write_text(manifest)
    with pytest.raises(ModelFileError, match=r"not an Ollama manifest.*ollama pull m:latest") as error:
        OllamaGGUFResolver(storage.root).resolve("m")
    assert str(path) in str(error.value)


def without_roots_rights(folder: Path, work: Callable[[], None]) -> None:
    """Run something with the rights of the folder's owner, never with root's, which no file mode stops."""
    if os.geteuid() != 0:
        work()
        return
    nobody = 65534
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody, nobody)
    os.seteuid(nobody)
    try:
        work()
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX")
@pytest.mark.parametrize("closed", ["blob", "manifest", "manifests"])
def test_an_unreadable_file_is_named_with_the_fix(llama: bytes, closed: str) -> None:
    # Not in pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder) / "models")
        (blob,) = storage.model("registry.ollama.ai/library/m/latest", (MODEL, llama))
        manifests = storage.root / "manifests"
        manifest = manifests / "registry.ollama.ai/library/m/latest"
        target = {"blob": blob, "manifest": manifest, "manifests": manifests}[closed]

        def resolve() -> None:
            target.chmod(0)
            with pytest.raises(ModelFileError, match=r"no permission to read .*chmod") as error:
                OllamaGGUFResolver(storage.root).resolve("m")
            assert str(target) in str(error.value)
            target.chmod(0o700)

        without_roots_rights(Path(folder), resolve)


# --- places -----------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_and_all_named_when_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: bytes
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "chosen"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    chosen, home = Storage(tmp_path / "chosen"), Storage(tmp_path / "home" / ".ollama" / "models")
    assert storage_folders()[:2] == [chosen.root, home.root]
    resolver = OllamaGGUFResolver()
    with pytest.raises(ModelNotFoundError, match="ollama pull m:latest") as error:
        resolver.resolve("m")
    assert all(str(folder) in str(error.value) for folder in storage_folders())
    place = "registry.ollama.ai/library/m/latest"
    (at_home,) = home.model(place, (MODEL, llama))
    assert resolver.resolve("m") == at_home
    (first,) = chosen.model(place, (MODEL, llama))
    assert resolver.resolve("m") == first
    first.unlink()  # broken there, whole at home
    assert resolver.resolve("m") == at_home


def test_installed_lists_the_models_of_all_folders_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: bytes
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "chosen"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    chosen, home = Storage(tmp_path / "chosen"), Storage(tmp_path / "home" / ".ollama" / "models")
    for storage, place in (
        (chosen, "registry.ollama.ai/library/b/latest"),
        (home, "registry.ollama.ai/library/b/latest"),
        (home, "registry.ollama.ai/user/a/7b"),
        (home, "hf.co/u/r/Q8_0"),
        (home, "registry.ollama.ai/library/.DS_Store/latest"),
    ):
        storage.model(place, (MODEL, llama))
    assert OllamaGGUFResolver().installed() == ["b:latest", "hf.co/u/r:Q8_0", "user/a:7b"]


def test_storage_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    resolver = OllamaGGUFResolver(tmp_path / "nowhere")
    assert resolver.installed() == []
    with pytest.raises(ModelNotFoundError):
        resolver.resolve("llama3.2")
