"""Ollama's storage, written by a test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Storage:
    """Ollama's storage, written by the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, content: bytes) -> tuple[str, Path]:
        digest = hashlib.sha256(content).hexdigest()
        path = self.root / "blobs" / f"sha256-{digest}"
        path.write_bytes(content)
        return f"sha256:{digest}", path

    def model(
        self, path_in_storage: str, *layers: tuple[str, bytes], config: dict[str, Any] | None = None
    ) -> list[Path]:
        """A model at `host/namespace/model/tag`; the paths of its layers."""
        blobs = [(kind, len(content), *self.blob(content)) for kind, content in layers]
        manifest = {
            "layers": [{"mediaType": kind, "digest": digest, "size": size} for kind, size, digest, _ in blobs],
            "config": {"digest": self.blob(json.dumps(config or {}).encode())[0]},
        }
        path = self.root / "manifests" / path_in_storage
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest))
        return [path for _, _, _, path in blobs]
