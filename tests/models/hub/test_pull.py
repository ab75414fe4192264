"""Pulling models with the real client from a server that speaks the Hub's file API."""

from __future__ import annotations

import _thread
import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from sollol_nb.errors import ModelFileError, ModelNotFoundError, ModelPullError, PullInterrupted
from sollol_nb.models.files import DEMO_MODEL_PATH, find_model_file
from sollol_nb.models.hub import repository
from sollol_nb.models.hub.pull import pull
from sollol_nb.runtime import download
from sollol_nb.settings import config
from tests.support.engines import eventually
from tests.support.gguf_files import write_llama, write_projector
from tests.support.hub import TOKEN, Hub, Repo, digest, running_hub
from tests.support.ollama_storage import Storage

DEMO = DEMO_MODEL_PATH.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with its own cache of the Hub and its own settings file."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "mine.toml").touch()
    monkeypatch.setenv("SOLLOL_CONFIG", str(tmp_path / "mine.toml"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE_S", 0)
    return tmp_path


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with one model in two quantizations."""
    with running_hub(
        Tiny_GGUF={"README.md": b"# Tiny", "Tiny-Q4_K_M.gguf": DEMO, "Tiny-Q2_K.gguf": b"GGUF" * 1000}
    ) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_a_model_is_pulled_verified_and_named(hub: Hub, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pulled = pull("hf.co/user/Tiny-GGUF")
    assert str(pulled).splitlines() == [
        "pulled hf.co/user/Tiny-GGUF: Q4_K_M, 5.53 MB in 1 file, hashes verified",
        f"its name is tiny (saved in {home / 'mine.toml'}); ask it with %%sollol tiny",
    ]
    assert "tiny Q4_K_M: 100%" in capsys.readouterr().err
    assert pulled.path.read_bytes() == DEMO
    assert pulled.path.is_relative_to(home / "hf" / "hub" / "models--user--Tiny-GGUF" / "snapshots")
    assert pulled.saved_in == str(home / "mine.toml")
    assert find_model_file("tiny") == pulled.path

    sent_bytes = hub.sent_bytes
    assert pull("hf.co/user/Tiny-GGUF:q4_k_m").path == pulled.path
    assert hub.sent_bytes == sent_bytes == len(DEMO)


def test_the_client_finds_what_was_pulled_without_network(hub: Hub) -> None:
    pulled = pull("hf.co/user/Tiny-GGUF")
    found = hf_hub_download(
        "user/Tiny-GGUF", "Tiny-Q4_K_M.gguf", cache_dir=config.hub_cache(), local_files_only=True
    )
    assert found == str(pulled.path)


def test_a_file_that_the_client_has_brought_is_not_brought_again(hub: Hub) -> None:
    hf_hub_download("user/Tiny-GGUF", "Tiny-Q4_K_M.gguf", endpoint=hub.endpoint, cache_dir=config.hub_cache())
    pull("hf.co/user/Tiny-GGUF")
    assert hub.sent_bytes == len(DEMO)


def test_all_parts_and_the_projector_are_pulled(hub: Hub, tmp_path: Path) -> None:
    first = write_llama(tmp_path / "big-Q4_K_M.gguf", tensors_per_part=15)
    parts = {f"Q4_K_M/{path.name}": path.read_bytes() for path in first.parent.glob("big-*-of-*.gguf")}
    projector = write_projector(tmp_path / "mmproj-F16.gguf")
    hub.repos["user/big"] = Repo({**parts, "mmproj-F16.gguf": projector.read_bytes()})

    pulled = pull("user/big")
    assert len(parts) > 1
    assert sorted(path.read_bytes() for path in pulled.path.parent.iterdir()) == sorted(parts.values())
    assert pulled.projector is not None
    assert pulled.projector.read_bytes() == projector.read_bytes()
    assert f"in {len(parts) + 1} files, hashes verified, reads images\n" in str(pulled)
    assert config.saved_model("big").projector == pulled.projector


# --- interrupted and damaged ----------------------------------------------------------------------


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_connection_that_breaks_is_continued(hub: Hub, ignores_range: bool) -> None:
    hub.cut_after_bytes = 2_000_000
    if ignores_range:
        hub.ignores_range = True
        with pytest.raises(ModelPullError, match="connection breaks again and again; what has arrived is kept"):
            pull("hf.co/user/Tiny-GGUF")
        hub.cut_after_bytes = None
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO
    if not ignores_range:
        assert len(hub.ranges()) == 3
        assert hub.sent_bytes < len(DEMO) + 3 * 16 * 1024


def test_an_interrupted_download_is_continued_by_the_next(hub: Hub) -> None:
    hub.hold_after_bytes = 3_000_000
    interrupt_when(lambda: sum(file.stat().st_size for file in partial_files()) > 1_000_000)
    with pytest.raises(PullInterrupted, match=r"stopped; .* of 5\.53 MB are kept, and the same command continues"):
        pull("hf.co/user/Tiny-GGUF")
    (partial,) = partial_files()
    kept_bytes = partial.stat().st_size
    assert 1_000_000 < kept_bytes < len(DEMO)
    assert find_model_file("tiny") is None
    hub.hold_after_bytes = None
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO
    assert hub.ranges()[-1] == f"bytes={kept_bytes}-{len(DEMO) - 1}"
    assert partial_files() == []


def test_a_large_file_is_requested_in_pieces(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIECE_BYTES", 2_000_000)
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO
    assert hub.ranges() == ["bytes=0-1999999", "bytes=2000000-3999999", f"bytes=4000000-{len(DEMO) - 1}"]


def test_a_damaged_file_is_deleted_and_named(hub: Hub) -> None:
    hub.damage = lambda content: content[:-100] + bytes(100)
    with pytest.raises(ModelPullError) as caught:
        pull("hf.co/user/Tiny-GGUF")
    assert "Tiny-Q4_K_M.gguf of hf.co/user/Tiny-GGUF arrived damaged: its hash is " in str(caught.value)
    assert [path for path in config.hub_cache().rglob("*") if path.is_file() and path.stat().st_size > 1000] == []
    hub.damage = None
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO


def test_a_damaged_part_of_an_earlier_attempt_is_brought_again(hub: Hub) -> None:
    partial = partial_path(hub)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(1_000_000))
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO


def test_a_part_that_is_larger_than_its_file_is_brought_from_the_beginning(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = partial_path(hub)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(DEMO + b"more")
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO
    assert hub.ranges() == [f"bytes=0-{len(DEMO) - 1}"]
    assert partial_files() == []
    assert "tiny Q4_K_M: 100%" in capsys.readouterr().err.split("\r")[-1], "nothing is counted twice"


def test_a_file_that_was_damaged_in_the_cache_is_brought_again(hub: Hub) -> None:
    path = pull("hf.co/user/Tiny-GGUF").path
    path.write_bytes(DEMO[:-100] + bytes(100))
    assert pull("hf.co/user/Tiny-GGUF").path.read_bytes() == DEMO
    assert hub.sent_bytes == 2 * len(DEMO)


def test_two_downloads_of_the_same_file_transfer_it_once(hub: Hub, home: Path) -> None:
    hub.hold_after_bytes = 1_000_000
    said: list[str] = []
    first = subprocess.Popen(
        [sys.executable, "-m", "sollol_nb", "pull", "hf.co/user/Tiny-GGUF"], stdout=subprocess.DEVNULL
    )
    eventually(lambda: any(path.startswith("/storage/") for _, path, _ in hub.requests), "the first one has begun")

    def say(line: str) -> None:
        said.append(line)
        hub.release()

    assert pull("hf.co/user/Tiny-GGUF", say=say).path.read_bytes() == DEMO
    assert said == ["waiting for another process that downloads Tiny-Q4_K_M.gguf"]
    assert first.wait() == 0
    assert hub.sent_bytes == len(DEMO)


def test_a_file_that_is_no_model_gets_no_name(hub: Hub) -> None:
    with pytest.raises(ModelFileError, match=r"Tiny-Q2_K\.gguf has GGUF version .* are supported"):
        pull("hf.co/user/Tiny-GGUF:Q2_K")
    assert config.saved_models() == {}


# --- disk -----------------------------------------------------------------------------------------


def test_nothing_is_loaded_if_the_disk_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    free = shutil.disk_usage(home).free
    monkeypatch.setattr(repository, "MIN_FREE_BYTES", free)
    with pytest.raises(ModelPullError) as caught:
        pull("hf.co/user/Tiny-GGUF")
    assert f"hf.co/user/Tiny-GGUF needs 5.53 MB more in {home / 'hf' / 'hub'}, and the disk has only" in str(
        caught.value
    )
    assert "set HF_HOME" in str(caught.value)
    assert hub.sent_bytes == 0


@pytest.mark.parametrize("is_complete", [False, True])
def test_what_is_left_of_one_file_makes_no_room_for_another(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path, is_complete: bool
) -> None:
    """Neither a part that is larger than its file, nor one beside the complete file."""
    projector = b"GGUF" * 1000
    hub.repos["user/eyes"] = Repo({"eyes-Q4_K_M.gguf": DEMO, "mmproj-eyes.gguf": projector})
    blobs = config.hub_cache() / "models--user--eyes" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest(projector)}.incomplete").write_bytes(DEMO)
    if is_complete:
        (blobs / digest(projector)).write_bytes(projector)
    monkeypatch.setattr(repository, "MIN_FREE_BYTES", shutil.disk_usage(home).total)
    with pytest.raises(ModelPullError, match=r"needs 5\.53 MB more in "):
        pull("hf.co/user/eyes")
    assert hub.sent_bytes == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_named(hub: Hub) -> None:
    partial = partial_path(hub)
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(ModelPullError, match=r"the disk of .* is full; free some of it, or set HF_HOME"):
        pull("hf.co/user/Tiny-GGUF")


# --- access ---------------------------------------------------------------------------------------


def test_a_private_model_needs_the_token_which_only_the_hub_gets(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["user/secret"] = Repo({"secret-Q8_0.gguf": DEMO}, private=True)
    with pytest.raises(ModelPullError, match=r"hf\.co/user/secret does not exist, is private, .* HF_TOKEN"):
        pull("hf.co/user/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull("hf.co/user/secret").path.read_bytes() == DEMO
    with_token = {path.split("/")[1] for _, path, headers in hub.requests if "authorization" in headers}
    assert with_token == {"api", "user"}  # and not the storage


def test_a_token_of_a_login_is_used(hub: Hub, home: Path) -> None:
    hub.repos["user/secret"] = Repo({"secret-Q8_0.gguf": DEMO}, private=True)
    (home / "hf").mkdir()
    (home / "hf" / "token").write_text(TOKEN)
    command = [sys.executable, "-m", "sollol_nb", "pull", "hf.co/user/secret"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1][:19]) == (0, "its name is secret ")
    assert TOKEN not in done.stdout + done.stderr


def test_a_gated_model_says_where_to_accept_its_conditions(hub: Hub) -> None:
    hub.repos["user/gated"] = Repo({"gated-Q4_K_M.gguf": DEMO}, gated=True)
    with pytest.raises(ModelPullError) as caught:
        pull("hf.co/user/gated")
    assert f"hf.co/user/gated is gated: accept its conditions on {hub.endpoint}/user/gated" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, r"refuses hf\.co/user/Tiny-GGUF \(403\)"), (429, "too many requests"), (500, "answered 500 for hf.co")],
)
def test_a_status_of_the_storage_is_one_line(hub: Hub, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(ModelPullError, match=message):
        pull("hf.co/user/Tiny-GGUF")


@pytest.mark.parametrize("endpoint", ["http://user:hidden@127.0.0.1:9", "http://no.host.invalid", "nonsense"])
def test_an_endpoint_that_cannot_be_reached_is_one_line(
    home: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelPullError) as caught:
        pull("hf.co/user/Tiny-GGUF")
    assert str(caught.value).startswith("cannot reach ")
    assert str(caught.value).endswith("check the network, or name a mirror in HF_ENDPOINT")
    assert "hidden" not in str(caught.value)


def test_neither_tokens_nor_signed_addresses_are_logged(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level(logging.INFO)
    hub.cut_after_bytes = 2_000_000
    pull("hf.co/user/Tiny-GGUF")
    logging.getLogger("httpx").info("requests of others")
    assert "requests of others" in caplog.text
    hub.status = 500
    with pytest.raises(ModelPullError) as caught:
        pull("hf.co/user/Tiny-GGUF:Q2_K")
    shown = "".join((caplog.text, *capfd.readouterr(), str(caught.value)))
    assert "100%" in shown
    assert TOKEN not in shown
    assert "signed-secret" not in shown


def test_a_repository_without_the_wanted_quantization_lists_what_it_has(hub: Hub) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"has no 'Q8_0'; .* It has Q2_K \(0\.004 MB\), Q4_K_M \(5\.53 MB\)"
    ):
        pull("hf.co/user/Tiny-GGUF:Q8_0")


# --- names ----------------------------------------------------------------------------------------


def test_a_name_of_ollama_or_of_another_file_is_not_taken(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "ollama"))
    storage = Storage(home / "ollama")
    storage.model("registry.ollama.ai/library/tiny/latest", ("application/vnd.ollama.image.model", DEMO))
    assert pull("hf.co/user/Tiny-GGUF").name == "tiny:q4_k_m"
    with pytest.raises(ModelPullError, match="tiny is another model, of Ollama or built in; choose a name"):
        pull("hf.co/user/Tiny-GGUF", name="tiny")
    with pytest.raises(ModelPullError, match="demo is another model"):
        pull("hf.co/user/Tiny-GGUF", name="demo")
    shutil.rmtree(storage.root)
    assert pull("hf.co/user/Tiny-GGUF", taken=["Tiny:latest"], name="mine").name == "mine"
    hub.repos["user/other"] = Repo({"Tiny-Q4_K_M.gguf": DEMO})
    with pytest.raises(ModelPullError, match=r"mine stands for .*Tiny-Q4_K_M\.gguf; choose a name"):
        pull("hf.co/user/other", name="mine")


def test_a_newer_version_takes_the_name_over(hub: Hub) -> None:
    before = pull("hf.co/user/Tiny-GGUF")
    hub.repos["user/Tiny-GGUF"].files["README.md"] = b"# Tiny, better"
    after = pull("hf.co/user/Tiny-GGUF")
    assert (after.name, find_model_file("tiny")) == ("tiny", after.path)
    assert after.path != before.path
    assert hub.sent_bytes == len(DEMO)


@pytest.mark.parametrize(
    "name", ["../../../../victim.gguf", "a/../../../../../victim.gguf", "/{home}/victim.gguf"]
)
def test_a_file_name_cannot_lead_out_of_the_cache(hub: Hub, home: Path, name: str) -> None:
    victim = home / "victim.gguf"
    victim.write_bytes(bytes(len(DEMO)))
    hub.repos["user/evil"] = Repo({name.format(home=home): DEMO})
    with pytest.raises(ModelNotFoundError, match="has no GGUF file"):
        pull("hf.co/user/evil")
    assert victim.read_bytes() == bytes(len(DEMO))


def test_without_the_client_the_command_that_installs_it_is_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelPullError, match=r"run: pip install 'huggingface_hub>=0\.34'"):
        pull("hf.co/user/Tiny-GGUF")


# --- helpers --------------------------------------------------------------------------------------


def partial_files() -> list[Path]:
    return list(config.hub_cache().glob("models--*/blobs/*.incomplete"))


def partial_path(hub: Hub) -> Path:
    return config.hub_cache() / "models--user--Tiny-GGUF" / "blobs" / f"{digest(DEMO)}.incomplete"


def interrupt_when(condition: Callable[[], bool]) -> None:
    """Interrupt the main thread as Ctrl-C does, once."""

    def wait() -> None:
        eventually(condition, "there is something to interrupt")
        _thread.interrupt_main(signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
