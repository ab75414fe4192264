"""The workers' caches of weights: what is sealed, what is deleted, and what is never exceeded."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.weights import cache
from tests.support.engines import posix_only

MIB = 2**20
SIZE = 11 * MIB


def open_cache(name: str = "w") -> Path:
    folder = cache.open_cache(name)
    assert folder is not None
    return folder


def written(folder: Path, number: int, size: int = SIZE, *, age_s: float = 0.0) -> Path:
    """A file as the worker program writes it: a sparse one."""
    path = folder / "rpc" / f"{number:016x}"
    with path.open("wb") as file:
        file.truncate(size)
    at = time.time() - age_s
    os.utime(path, (at, at))
    return path


def is_sealed(path: Path) -> bool:
    return not path.stat().st_mode & stat.S_IWUSR


@posix_only
def test_the_folders_are_private(caches: Path) -> None:
    folder = open_cache()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (caches, folder, folder / "rpc")} == {0o700}


def test_a_complete_file_is_sealed_and_outlives_the_worker(caches: Path) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    file = written(folder, 1)
    cache.settle(["w"])
    assert is_sealed(file)
    assert open_cache() == folder
    assert file.exists()


def test_a_file_that_was_not_sealed_is_deleted_before_a_worker_starts(caches: Path) -> None:
    """Its worker may have been killed while it wrote, whatever the file's size."""
    cache.prepare({"w": SIZE}, [SIZE])
    file = written(open_cache(), 1)
    open_cache()
    assert not file.exists()


@pytest.mark.parametrize("size", [0, 4096, SIZE - 4096, SIZE + 1])
def test_one_file_of_a_wrong_size_takes_all_that_were_not_sealed_with_it(caches: Path, size: int) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    earlier = written(folder, 1)
    cache.settle(["w"])
    sound, damaged = written(folder, 2), written(folder, 3, size)
    cache.prepare({"w": SIZE}, [SIZE])
    assert earlier.exists()
    assert not sound.exists()
    assert not damaged.exists()


def test_sizes_of_models_that_were_loaded_earlier_are_known(caches: Path) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    file = written(folder, 1)
    cache.prepare({"w": 2 * SIZE}, [2 * SIZE])
    assert is_sealed(file)
    assert cache.known_sizes() == {SIZE, 2 * SIZE}


def test_the_least_recently_used_files_go_when_the_limit_is_reached(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", str(3.5 * SIZE / 1e9))
    first, second = open_cache("w"), open_cache("v")
    cache.prepare({"w": SIZE, "v": SIZE}, [SIZE])
    old, used, new = (
        written(first, 1, age_s=900),
        written(second, 2, age_s=800),
        written(first, 3, age_s=700),
    )
    cache.settle(["w", "v"])
    os.utime(used, (time.time(), time.time() - 800))  # it was read
    cache.prepare({"v": 2 * SIZE}, [SIZE])  # SIZE of it may be there
    assert not old.exists()
    assert used.exists()
    assert new.exists()
    assert cache.measure().used_bytes == 2 * SIZE


def test_a_load_for_which_there_is_no_space_uses_no_cache_and_the_next_one_does(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    file = written(folder, 1)
    cache.settle(["w"])
    free = shutil.disk_usage(folder).free
    for impossible in ({"w": 51 * 10**9}, {"w": free}):
        cache.prepare(impossible, [SIZE])
        assert not (folder / "rpc").exists(), "the worker can neither read nor write"
        assert (folder / "off" / file.name).exists(), "nothing was deleted for it"
    cache.prepare({"w": SIZE}, [SIZE])
    assert file.exists()


def test_nothing_is_cached_on_a_disk_that_is_nearly_full_or_when_it_is_switched_off(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MIN_FREE_BYTES", 2**60)
    assert cache.open_cache("w") is None
    monkeypatch.undo()
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "0")
    assert cache.open_cache("w") is None


def test_where_nobody_tells_when_a_load_ends_files_are_sealed_once_none_was_written_for_a_while(
    caches: Path,
) -> None:
    folder = open_cache()
    cache.note_sizes([SIZE])
    old, file = written(folder, 1, age_s=cache.QUIET_S + 1), written(folder, 2)
    cache.tend(["w"])
    assert not is_sealed(old), "the load may go on"
    written(folder, 2, age_s=cache.QUIET_S + 1)
    cache.tend(["w"])
    assert is_sealed(old)
    assert is_sealed(file)


def test_a_file_that_was_cut_after_it_was_sealed_is_deleted_before_the_next_load(caches: Path) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    cut, sound = written(folder, 1), written(folder, 2)
    cache.settle(["w"])
    assert is_sealed(cut)
    cut.chmod(0o600)
    os.truncate(cut, SIZE // 2)
    cut.chmod(0o400)
    assert not cache.prepare({"w": SIZE}, [SIZE])
    assert not cut.exists()
    assert sound.exists()


def test_files_that_cannot_be_flushed_to_the_disk_are_deleted(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_cache()
    file = written(folder, 1)

    def fail(path: Path) -> None:
        raise OSError("an input/output error")

    monkeypatch.setattr(cache, "_write_through", fail)
    assert not cache.prepare({"w": SIZE}, [SIZE])
    assert not file.exists()


def test_a_load_waits_for_the_disk_only_so_long_and_does_without_the_rest(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(open_cache(), 1)
    monkeypatch.setattr(cache, "SEAL_LIMIT_S", -1.0)
    assert not cache.prepare({"w": SIZE}, [SIZE])
    assert not file.exists()


def test_a_damaged_file_that_cannot_be_deleted_is_where_the_worker_does_not_find_it(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_cache()
    cut = written(folder, 1, SIZE // 2)
    monkeypatch.setattr(cache, "_remove", lambda file: False)
    assert not cache.prepare({"w": SIZE}, [SIZE])
    assert not cut.exists()
    assert (folder / "off" / cut.name).exists()
    (folder / "off").rename(folder / "rpc")
    monkeypatch.setattr(cache, "_switch", lambda folder, *, on: None)
    assert cache.prepare({"w": SIZE}, [SIZE]) == {"w"}, "nothing may be loaded over its worker"


def test_a_load_waits_for_the_disk_once_not_for_each_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [written(open_cache(name), number) for name in ("w", "v") for number in range(2)]
    seconds = iter(range(0, 1000, 6))
    monkeypatch.setattr(cache.time, "monotonic", lambda: float(next(seconds)))
    cache.prepare({"w": SIZE, "v": SIZE}, [SIZE])
    assert sum(map(is_sealed, filter(Path.exists, files))) == 1


def test_two_processes_that_seal_the_same_files_lose_none(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_cache()
    cache.note_sizes([SIZE])
    files = [written(folder, number) for number in range(4)]
    open_private = cache.open_private

    def while_another_seals(path: Path, flags: int) -> int:
        for file in files[:2]:
            file.chmod(0o400)
        files[3].unlink(missing_ok=True)  # there was no time for this one
        if path.exists() and is_sealed(path):
            raise PermissionError("root may write it all the same")
        return open_private(path, flags)

    monkeypatch.setattr(cache, "open_private", while_another_seals)
    cache.settle(["w"])
    assert all(map(is_sealed, files[:3]))


def test_a_file_that_another_process_deletes_does_not_hide_those_that_are_damaged(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_cache()
    cut, gone = written(folder, 1, SIZE // 2), folder / "rpc" / f"{2:016x}"
    gone.symlink_to(folder / "nowhere")
    monkeypatch.setattr(cache, "_remove", lambda file: False)
    monkeypatch.setattr(cache, "_switch", lambda folder, *, on: None)
    assert cache.prepare({"w": SIZE}, [SIZE]) == {"w"}
    cut.unlink()
    assert not cache.prepare({"w": SIZE}, [SIZE])


def test_files_of_other_models_are_not_counted_as_what_a_load_finds_and_go_first(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", str(4.5 * SIZE / 1e9))
    folder = open_cache()
    cache.note_sizes([SIZE, SIZE + 4096])
    own = written(folder, 1, age_s=900)
    others = [written(folder, number, SIZE + 4096, age_s=800) for number in (2, 3)]
    cache.settle(["w"])
    cache.prepare({"w": 4 * SIZE}, [SIZE])
    assert own.exists()
    assert not any(other.exists() for other in others)
    assert (folder / "rpc").exists()


def test_two_processes_get_different_caches_for_the_same_device(caches: Path) -> None:
    with cache.claimed("CUDA0") as one:
        with cache.claimed("CUDA0") as two:
            assert one != two
        with cache.claimed("CUDA0") as again:
            assert again == two
    with cache.claimed("CUDA0") as first:
        assert first == one


def test_clear_deletes_the_files_and_nothing_else(caches: Path) -> None:
    folder = open_cache()
    cache.prepare({"w": SIZE}, [SIZE])
    file, stranger = written(folder, 1), folder / "rpc" / "notes.txt"
    stranger.write_text("mine")
    cache.settle(["w"])
    assert cache.clear() == SIZE
    assert not file.exists()
    assert stranger.exists()
    assert cache.measure().used_bytes == 0
