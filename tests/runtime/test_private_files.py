"""Private files and folders: what others could have put there is not used, and others cannot read what is ours."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.latency.log import LatencyLog
from sollol_nb.runtime.private_files import (
    check_private,
    open_private,
    private_folder,
    read_private,
    write_private,
)
from sollol_nb.settings import config
from tests.support.engines import posix_only

pytestmark = posix_only
ANOTHER_UID = 54321


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def of_another_user(path: Path) -> Path:
    """This path if it can be given away (as root), else a similar one of the system."""
    if os.geteuid() == 0:
        os.chown(path, ANOTHER_UID, -1)
        return path
    return Path("/etc") if path.is_dir() else Path("/etc/passwd")


def test_a_new_folder_is_the_owners_alone(tmp_path: Path) -> None:
    assert mode(private_folder(tmp_path / "a" / "state")) == 0o700


def test_an_empty_folder_that_the_user_made_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    assert mode(private_folder(tmp_path / "state", shared_parent=True)) == 0o700


def test_a_folder_with_other_things_of_the_user_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "analysis.ipynb").touch()
    private_folder(folder, shared_parent=True)
    assert mode(folder) == 0o755
    private_folder(folder)
    assert mode(folder) == 0o700


@pytest.mark.parametrize("folder_mode", [0o777, 0o1777, 0o770, 0o722], ids=oct)
def test_a_folder_where_others_can_write_is_refused(folder_mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(folder_mode)
    with pytest.raises(ConfigError, match=r"other users can write in the folder .*; check it and run `chmod 700"):
        private_folder(tmp_path)
    assert mode(tmp_path) == folder_mode & 0o777 | folder_mode & 0o1000


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_folder(of_another_user(folder))


def test_a_link_to_a_folder_of_the_user_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "large disk")
    assert private_folder(tmp_path / "state") == tmp_path / "state"


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_created_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match="SOLLOL_STATE_DIR"):
        private_folder(tmp_path / place)


def link(path: Path) -> None:
    target = path.with_name("target")
    target.write_text("precious")
    path.symlink_to(target)


MAKE: dict[str, Callable[[Path], object]] = {
    "a symbolic link": link,
    "not a regular file": Path.mkdir,
    "not a regular file (FIFO)": os.mkfifo,
}


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_not_a_file_of_the_user_is_not_used(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.sqlite"
    MAKE[kind](path)
    with pytest.raises(ConfigError, match=rf"{kind.split(' (')[0]}; move it away"):
        check_private(path)
    with pytest.raises((ConfigError, OSError)):
        open_private(path, os.O_RDWR | os.O_TRUNC)
    assert read_private(path) is None
    if kind == "a symbolic link":
        assert (tmp_path / "target").read_text() == "precious"


def test_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    write_private(path, "text")
    assert read_private(path) == "text"
    assert read_private(of_another_user(path)) is None
    with pytest.raises(ConfigError, match="another user"):
        check_private(of_another_user(path))


@pytest.mark.parametrize("file_mode", [0o666, 0o620], ids=oct)
def test_a_file_that_others_can_write_is_not_believed(file_mode: int, tmp_path: Path) -> None:
    path = tmp_path / "entry"
    write_private(path, "text")
    path.chmod(file_mode)
    assert read_private(path) is None


def test_a_long_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    write_private(tmp_path / "long", "x" * 100)
    assert read_private(tmp_path / "long", limit_bytes=99) is None
    assert read_private(tmp_path / "long", limit_bytes=100) == "x" * 100


def test_a_file_whose_mode_cannot_be_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readable").touch(0o644)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(ConfigError, match=r"cannot use .*readable \(Read-only file system\); set SOLLOL_"):
        check_private(tmp_path / "readable")


def test_a_private_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_private(path, "old")
    write_private(path, "new")
    assert path.read_text() == "new"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_latency_log_is_private_also_where_an_older_version_made_it_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    (tmp_path / "latency.sqlite").touch(mode=0o644)
    (tmp_path / "latency.sqlite").chmod(0o644)
    log = LatencyLog()
    with log._file.connection():
        assert {mode(path) for path in tmp_path.glob("latency.sqlite*")} == {0o600}


def test_a_planted_link_in_the_state_folder_is_named_and_its_target_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    link(tmp_path / "latency.sqlite")
    with pytest.raises(ConfigError, match=r"latency\.sqlite is not used, because it is a symbolic link"):
        LatencyLog()
    assert config.state_file("batches.sqlite") == tmp_path / "batches.sqlite"
    assert (tmp_path / "target").read_text() == "precious"
