"""`sollol-nb weights` and the doctor: what workers of this machine keep of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.cli.doctor import describe, diagnose
from sollol_nb.cli.main import main
from sollol_nb.llama_cpp.weights import cache

MIB = 2**20


def test_the_size_and_the_folder_are_shown_and_all_can_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "1")
    folder = cache.open_cache("w")
    assert folder is not None
    cached = folder / "rpc" / f"{1:016x}"
    cached.write_bytes(bytes(11 * MIB))

    assert main(["weights"]) == 0
    assert (shown := capsys.readouterr().out).startswith(
        f"11.0 MiB kept by workers in {tmp_path / 'tensors'}, of at "
    )
    assert shown.strip() in describe(diagnose(check=False))
    assert main(["weights", "--forget"]) == 0
    assert capsys.readouterr().out == "deleted 11.0 MiB of weights\n"
    assert not cached.exists()
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "0")
    assert main(["weights"]) == 0
    assert "no more are kept, since tensor_cache_gb = 0" in capsys.readouterr().out
