"""The caches in which the workers of this machine keep tensors, so that a reload need not send them again.

The worker program (`ggml-rpc-server -c`) keeps each tensor over 10 MiB that it receives in a file
`$LLAMA_CACHE/rpc/<hash>`, and takes it from there when a coordinator offers a tensor with this hash
(`rpc_server::set_tensor_hash` in ggml-rpc.cpp). It never removes a file, and checks neither that it has written
all of it nor how long the file is that it reads: after a full disk, or its own death, the rest of the tensor would
be missing in the model's weights, without an error. So each worker has a folder of its own, with these rules:

* A file is *sealed* once it is known to be complete: it is on the disk (`fsync`), and made read-only, which is the
  mark. Before a worker starts, all files that are not sealed are deleted: it may have been killed while it wrote.
* While a worker runs, files are sealed after a load and, at the latest, before the next one. Each must have the
  size of a tensor of a model that was loaded (the headers of GGUF files tell the sizes). If one has not, or the
  disk is full, or a write failed in another way (`fsync` reports it), all that are not sealed are deleted: after
  one write that failed, others may have failed too.
* Before each load all files are checked, also those that are sealed: what has another size is deleted. Only when
  nothing else is left may a coordinator be started over this worker. For workers of other machines the link asks
  the far side to do it, tells it the sizes, and waits for the answer (`links/verifying.py`). A worker from which
  none comes is left out of the plan. Workers of versions that do not know the question have no caches.
* Workers whose coordinators are unknown (`sollol-nb worker` that listens) have no caches: nobody could ask.
* All caches together have at most `tensor_cache_gb`, and never more than half of what would be free without them.
  The files that were not used for the longest time go, before a load that will need the space. A load for which
  there is no space uses no cache: its folder is then called `off`, so that the worker finds and writes nothing.

No two workers share a folder, because one would read what the other is writing. The hash (FNV-1a) protects against
accidents only: whoever can connect to a worker can put files into its cache, and can do worse to it anyway. One
case is not covered: a model with two equal tensors, loaded while the disk runs full between them. All
of it is safe to delete while no model is loading. Blocking; call it in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.private_files import open_private, private_folder, read_private
from sollol_nb.settings import config

VARIABLE = "LLAMA_CACHE"
"""Environment variable of the worker program with the folder of its cache."""
FLAG = "-c"
MIN_FREE_BYTES = 2 * 10**9
"""With less free disk, nothing is cached."""
QUIET_S = 60.0
"""Where nobody tells when a load has ended: nothing was written for this long."""
ABANDONED_S = 86400.0
"""Files that are not sealed, in a folder that no worker has used for this long, are deleted."""
SEAL_LIMIT_S = 8.0
"""How long a load waits for what is flushed to the disk, for all caches together; what is left then is deleted."""
MAX_CLAIMS = 64
TRIAL_BYTES = 1024 * 1024
MAX_SIZES_BYTES = 512 * 1024
_NAME = re.compile(r"[0-9a-f]{16}")
_FILES, _OFF, _SIZES = "rpc", "off", "sizes"


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the caches of this machine take.

    Attributes:
        folder: of all of them.
        used_bytes: of their files.
        limit_bytes: that they may have now; 0 if there are none.
        free_bytes: of the disk.
    """

    folder: Path
    used_bytes: int
    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    byte_count: int
    is_sealed: bool
    used_at: float
    changed_at: float


def root() -> Path:
    """The folder of all caches of this user here; it may not exist."""
    return config.cache_dir() / "tensors"


def local_name(port: int) -> str:
    """The name of the cache of the worker that listens on a port of this machine, for this state folder: no other
    worker has it at the same time, even where machines or containers share the home folder."""
    try:
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        network = ""
    where = hashlib.sha256(f"{platform.node()}\n{network}\n{config.state_dir()}".encode()).hexdigest()[:8]
    return f"here-{where}-{port}"


def measure() -> CacheUse:
    """What the caches take, and may take."""
    used = sum(file.byte_count for file in _all_files())
    free = _free_bytes()
    setting = int(float(config.default("tensor_cache_gb")) * 1e9)
    return CacheUse(root(), used, max(0, min(setting, (free + used) // 2)), free)


def clear() -> int:
    """Delete all cached tensors. Returns their bytes. A model that is loading at this moment may fail to load."""
    freed = 0
    for file in _all_files():
        if _remove(file):
            freed += file.byte_count
    return freed


# --- a worker's cache ---------------------------------------------------------------------------


def open_cache(name: str) -> Path | None:
    """Make a cache ready for the worker program, which is about to start; returns its folder, for `VARIABLE`.

    Returns:
        None where nothing may be cached: by the setting, with a nearly full disk, or without a usable folder.
    """
    try:
        if not config.default("tensor_cache_gb"):
            return None
        private_folder(root())
        folder = private_folder(root() / name)
        files = folder / _FILES
        if (folder / _OFF).is_dir() and not files.exists():
            (folder / _OFF).rename(files)
        files.mkdir(mode=0o700, exist_ok=True)
        discard(name)
        _evict(0)
        return folder if _free_bytes() >= MIN_FREE_BYTES else None
    except (OSError, ConfigError):
        return None


def discard(name: str) -> None:
    """Delete what is not sealed: the worker of this cache has ended, maybe while it wrote."""
    for file in _files(root() / name):
        if not file.is_sealed:
            _remove(file)


@contextlib.contextmanager
def claimed(device: str) -> Iterator[str]:
    """The name of a cache for a worker on this device of this machine, which no other process gets meanwhile.

    Raises:
        OSError, ConfigError: there is none.
    """
    private_folder(root())
    plain = re.sub(r"[^\w.-]", "-", f"{platform.node()}-{device}", flags=re.ASCII)[:80]
    with contextlib.ExitStack() as held:
        for number in range(MAX_CLAIMS):
            name = f"lent-{plain}-{number}"
            try:
                held.enter_context(FileLock(root() / f"{name}.lock", timeout=0, mode=0o600))
            except Timeout:
                continue
            yield name
            return
        raise ConfigError(f"{MAX_CLAIMS} workers of {device} run here already")


def worker_environment(folder: Path | None) -> dict[str, str]:
    """What to add to the environment of a worker with this cache."""
    return {} if folder is None else {VARIABLE: str(folder)}


def prepare(needs: Mapping[str, int], sizes: Collection[int]) -> frozenset[str]:
    """Before a coordinator loads a model over these workers, which are idle: verify their caches, and make room.

    Args:
        needs: bytes of weights that each of the named caches' workers will get; 0 if unknown.
        sizes: of the model's tensors that are cached (`ModelFacts.cacheable_sizes`).

    Returns:
        The caches that cannot be verified; their workers must not load anything.
    """
    known = frozenset(sizes)
    with contextlib.suppress(OSError, ConfigError):
        known |= known_sizes()
    with contextlib.suppress(OSError, ConfigError):
        note_sizes(sizes)
    until = time.monotonic() + SEAL_LIMIT_S
    with contextlib.suppress(OSError, ConfigError):
        for name in needs:
            _seal(root() / name, known, until=until)
            for file in _files(root() / name):
                if file.byte_count not in known:  # something has changed it since it was sealed
                    _remove(file)
        _evict(0)
        missing_bytes, wanted = 0, set[Path]()
        for name, need in needs.items():
            # Files of other sizes are of other models.
            there = [file for file in _files(root() / name) if file.is_sealed and file.byte_count in sizes]
            missing_bytes += max(0, need - sum(file.byte_count for file in there))
            wanted |= {file.path for file in there}
        if missing_bytes <= measure().limit_bytes:  # else nothing is worth deleting
            _evict(missing_bytes, last=wanted)
        may = measure()
        is_room = may.used_bytes + missing_bytes <= may.limit_bytes
        is_room = is_room and may.free_bytes - missing_bytes >= MIN_FREE_BYTES
        for name in needs:
            _switch(root() / name, on=is_room)
    return frozenset(name for name in needs if not _is_verified(root() / name, known))


def _is_verified(folder: Path, sizes: Collection[int]) -> bool:
    """Whether the worker of a cache finds only files that are complete; if not, it is switched off."""
    try:
        files = [path for path in (folder / _FILES).iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return True
    except OSError:
        files = None
    if files is not None and all(_is_complete(path, sizes) for path in files):
        return True
    with contextlib.suppress(OSError):
        _switch(folder, on=False)
    return not (folder / _FILES).exists()


def _is_complete(path: Path, sizes: Collection[int]) -> bool:
    """Whether a worker may find this file; one that is gone it does not find."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not found.st_mode & stat.S_IWUSR and found.st_size in sizes


def settle(names: Collection[str]) -> None:
    """After a load, whether it succeeded or not: seal what the workers of these caches have written, if it is
    complete, and keep the limit."""
    with contextlib.suppress(OSError, ConfigError):
        sizes = known_sizes()
        for name in names:
            _seal(root() / name, sizes)
        _evict(0)


def tend(names: Collection[str]) -> None:
    """The same for workers that run for another machine, every few seconds, also while they load."""
    with contextlib.suppress(OSError, ConfigError):
        sizes, is_loading = known_sizes(), False
        for name in names:
            news = [file for file in _files(root() / name) if not file.is_sealed]
            if any(time.time() - file.changed_at < QUIET_S for file in news):
                is_loading = True
            else:
                _seal(root() / name, sizes)
        if not is_loading:
            _evict(0)
        may = measure()
        is_room = may.used_bytes <= may.limit_bytes and may.free_bytes >= MIN_FREE_BYTES
        for name in names:
            _switch(root() / name, on=is_room)


def _seal(folder: Path, sizes: Collection[int], *, until: float = math.inf) -> None:
    """Mark the new files of a cache as complete, or delete them all.

    `settle` may do this in one process while `prepare` does it in another: each leaves alone what the other has
    sealed or deleted.
    """
    news = [file for file in _files(folder) if not file.is_sealed]
    if not news:
        return
    is_sound = all(file.byte_count in sizes for file in news) and _has_space(folder)
    if is_sound:
        try:
            for file in news:
                if time.monotonic() < until:
                    with contextlib.suppress(FileNotFoundError):
                        _write_through(file.path)
                        file.path.chmod(0o400)
                else:
                    _remove(file)
        except (OSError, ConfigError):
            is_sound = False
    if not is_sound:
        for file in news:
            _remove(file)


def _switch(folder: Path, *, on: bool) -> None:
    source, target = (folder / _OFF, folder / _FILES) if on else (folder / _FILES, folder / _OFF)
    if source.is_dir() and not target.exists():
        source.rename(target)


def _has_space(folder: Path) -> bool:
    """Whether the disk, and the user's quota, have not run out: df does not know quotas."""
    trial = folder / "trial"
    try:
        descriptor = open_private(trial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(descriptor, bytes(TRIAL_BYTES))
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size == TRIAL_BYTES
        finally:
            os.close(descriptor)
    except (OSError, ConfigError):
        return False
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


def _write_through(path: Path) -> None:
    try:
        descriptor = open_private(path, os.O_RDWR)
    except PermissionError:
        if path.stat().st_mode & stat.S_IWUSR:
            raise
        return  # another process has sealed it
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- sizes --------------------------------------------------------------------------------------


def known_sizes() -> frozenset[int]:
    """Sizes of the tensors of all models that were loaded here, in bytes."""
    text = read_private(root() / _SIZES, MAX_SIZES_BYTES) or ""
    return frozenset(int(line) for line in text.split() if line.isdecimal() and len(line) < 20)


def note_sizes(sizes: Collection[int]) -> None:
    """Remember them.

    Raises:
        OSError, ConfigError: they cannot be written.
    """
    new = sorted(frozenset(sizes) - known_sizes())
    if not new:
        return
    path = private_folder(root()) / _SIZES
    if path.exists() and path.stat().st_size > MAX_SIZES_BYTES // 2:
        path.unlink()
    descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, "".join(f"{size}\n" for size in new).encode())
    finally:
        os.close(descriptor)


# --- files --------------------------------------------------------------------------------------


def _all_files() -> list[_File]:
    try:
        folders = [entry for entry in root().iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []
    return [file for folder in folders for file in _files(folder)]


def _files(folder: Path) -> Iterator[_File]:
    """The files of one cache; nothing that is not a regular file with a hash as its name."""
    for part in (_FILES, _OFF):
        try:
            entries = [*os.scandir(folder / part)]
        except OSError:
            continue
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if _NAME.fullmatch(entry.name) and stat.S_ISREG(found.st_mode):
                    yield _File(
                        path=Path(entry.path),
                        byte_count=found.st_size,
                        is_sealed=not found.st_mode & stat.S_IWUSR,
                        used_at=max(found.st_atime, found.st_mtime),
                        changed_at=found.st_mtime,
                    )


def _evict(wanted_bytes: int, last: Collection[Path] = ()) -> None:
    """Delete files until so many bytes fit in; of those that are not sealed, the ones that nobody will seal.

    Args:
        last: files that go only when no others are left.
    """
    files = _all_files()
    for file in files:
        if not file.is_sealed and time.time() - file.changed_at > ABANDONED_S:
            _remove(file)
    may = measure()
    over = may.used_bytes + wanted_bytes - may.limit_bytes
    sealed = [file for file in files if file.is_sealed]
    for file in sorted(sealed, key=lambda file: (file.path in last, file.used_at)):
        if over <= 0:
            break
        if _remove(file):
            over -= file.byte_count
    for folder in {file.path.parents[1] for file in files}:
        if not any(_files(folder)) and time.time() - folder.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _remove(file: _File) -> bool:
    try:
        if os.name == "nt":
            file.path.chmod(0o600)
        file.path.unlink()
    except OSError:
        return False
    return True


def _free_bytes() -> int:
    """Of the disk of the caches, for this user."""
    folder = root()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
