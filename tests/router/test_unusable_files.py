"""Models that Ollama serves although their files on this machine are of no use to llama.cpp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sollol_nb.errors import ModelFileError
from sollol_nb.models import files
from sollol_nb.models.routing import OLLAMA
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.gguf_files import write_keys
from tests.support.ollama_server import DEMO_MODEL, OllamaServer

QUESTION = "What is sollol_nb?"
SIZE_UNKNOWN = "hf.co/someone/some-model-GGUF:Q4_K_M"
IN_STORAGE = {
    SIZE_UNKNOWN: "hf.co/someone/some-model-GGUF/Q4_K_M",
    "someone/special:7b": "registry.ollama.ai/someone/special/7b",
    "llama3.1:70b": "registry.ollama.ai/library/llama3.1/70b",
}


def store(root: Path, name: str, kind: str | None, content: bytes = b"", config: str = "{}") -> None:
    """Store a model of one layer (none if `kind` is None) as Ollama does."""
    digests = []
    for blob in (content, config.encode()):
        digest = hashlib.sha256(blob).hexdigest()
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "blobs" / f"sha256-{digest}").write_bytes(blob)
        digests.append(f"sha256:{digest}")
    layer = {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digests[0], "size": len(content)}
    manifest = root / "manifests" / IN_STORAGE[name]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": [layer] if kind else [], "config": {"digest": digests[1]}}))


def foreign_architecture(root: Path, name: str) -> None:
    path = root / "foreign.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_keys(path, "gptoss", {"gptoss.block_count": 1})
    store(root, name, "model", path.read_bytes())


def vision_inside(root: Path, name: str) -> None:
    path = root / "vision.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_keys(path, "gemma3", {"gemma3.block_count": 1, "gemma3.vision.block_count": 2})
    store(root, name, "model", path.read_bytes())


def cloud_model(root: Path, name: str) -> None:
    store(root, name, None, config='{"remote_host": "https://ollama.com:443"}')


def separate_tensors(root: Path, name: str) -> None:
    store(root, name, "tensor", b"abc")


def damaged_blob(root: Path, name: str) -> None:
    store(root, name, "model", DEMO_MODEL.read_bytes()[:5000])


def missing_blob(root: Path, name: str) -> None:
    store(root, name, "model", b"x")
    for blob in (root / "blobs").iterdir():
        blob.unlink()


def damaged_manifest(root: Path, name: str) -> None:
    store(root, name, None)
    (root / "manifests" / IN_STORAGE[name]).write_text("[" * 100_000)


KINDS = [
    foreign_architecture,
    vision_inside,
    cloud_model,
    separate_tensors,
    damaged_blob,
    missing_blob,
    damaged_manifest,
]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of the Linux service, as other users than root and ollama see it."""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "_is_file", refuse)


@pytest.mark.ollama
@pytest.mark.usefixtures("unreadable")
def test_ollama_answers_where_its_storage_may_not_be_read(ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as router:
        for name in IN_STORAGE:
            assert router.route(name).backend == router.route(name, backend="ollama").backend == OLLAMA
        assert "no permission to read" in router.route(SIZE_UNKNOWN).reason
        with pytest.raises(ModelFileError, match="no permission to read"):
            router.route("nosuch")


@pytest.mark.ollama
@pytest.mark.parametrize("spoil", KINDS)
def test_ollama_answers_for_a_model_whose_file_here_cannot_be_used(
    ollama: OllamaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path, str], None]
) -> None:
    root = tmp_path / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    for name in IN_STORAGE:
        spoil(root, name)

    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as router:
        for name in IN_STORAGE:
            for backend in (None, "ollama"):
                answer = router.route_request(name, QUESTION, backend=backend, max_tokens=2)
                assert (answer.routing["backend"], answer["eval_count"]) == (OLLAMA, 2)
        large = router.route("llama3.1:70b")
        assert "listed in MODEL_PROFILES as needing sharding, but its GGUF file cannot be sharded" in large.reason
        assert large.reason.endswith("so Ollama runs it")
        # The file matters where llama.cpp is to run the model.
        for backend in ("sharded", "local"):
            with pytest.raises(ModelFileError, match=r"someone/special:7b"):
                router.route("someone/special:7b", backend=backend)


def test_where_no_node_has_the_model_its_file_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    for name in IN_STORAGE:
        cloud_model(tmp_path, name)

    with HybridRouter(auto_discover_rpc=False) as router:
        for name in IN_STORAGE:
            with pytest.raises(ModelFileError, match="is a cloud model"):
                router.route(name)
        assert router.profile(SIZE_UNKNOWN).parameter_count_b is None
        assert "is a cloud model" in router.profile(SIZE_UNKNOWN).reason


def test_a_file_that_the_user_names_must_be_usable(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with HybridRouter(auto_discover_rpc=False, gguf_path=damaged) as router, pytest.raises(ModelFileError):
        router.route("mystery")
    with HybridRouter(auto_discover_rpc=False) as router, pytest.raises(ModelFileError):
        router.route(str(damaged))
