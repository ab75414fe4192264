"""One repository on the Hugging Face Hub, and its folder in the cache of `huggingface_hub`.

The client lists the repository, finds the user's token (`HF_TOKEN`, `hf auth login`) and keeps the files in its
cache (`HF_HOME`), where other programs find them. Its current versions delete what an interrupted download has
brought (huggingface_hub#4228), and do not verify files that come over HTTP. So `runtime/download.py` transfers
them to where the cache would have them, under their hash, and a file gets there only after its hash was compared.

Nothing here logs or shows a token: errors of the client, which can have signed addresses, are translated.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from sollol_nb._version import __version__
from sollol_nb.errors import ModelPullError, SollolError, TransportError
from sollol_nb.models.hub import failures
from sollol_nb.models.hub.failures import Place
from sollol_nb.models.hub.files import HubFile, HubModel, folder_name, shown_size
from sollol_nb.runtime.download import Digest, download, read_digest
from sollol_nb.settings import config

if TYPE_CHECKING:
    from tqdm.std import tqdm

MISSING = "pulling a model needs the package huggingface_hub; run: pip install 'huggingface_hub>=0.34'"
MIN_FREE_BYTES = 2**28
"""What stays free on the disk."""
_TIMEOUT_S = 20.0
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_SHA256_DIGITS = 64


class Repository:
    """One repository on the Hub, and its folder in the cache. Entered, it keeps the client's own log quiet.

    Raises:
        ModelPullError: the client is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError:
            raise ModelPullError(MISSING) from None
        self._client: Any = huggingface_hub
        self.name = name
        self.endpoint = config.hub_endpoint()
        self.cache = config.hub_cache()
        self.folder = self.cache / folder_name(name)
        self.commit = ""

    def __enter__(self) -> Repository:
        log = self._client.utils.logging
        self._verbosity = log.get_verbosity()
        log.set_verbosity_error()  # its warnings have signed addresses
        return self

    def __exit__(self, *error: object) -> None:
        self._client.utils.logging.set_verbosity(self._verbosity)

    def files(self) -> list[HubFile]:
        """The files of the repository's newest version that have a hash and a name that stays in its folder."""
        with self._translated():
            api = self._client.HfApi(endpoint=self.endpoint)
            info = api.model_info(self.name, files_metadata=True, timeout=_TIMEOUT_S)
        self.commit = str(info.sha)
        if not _DIGEST.fullmatch(self.commit):
            raise ModelPullError(f"{self._place.endpoint} answers as no Hugging Face Hub does; check HF_ENDPOINT")
        files = []
        for each in info.siblings or ():
            if not _is_inside(str(each.rfilename)):
                continue
            digest = str(each.lfs.sha256 if each.lfs is not None else each.blob_id)
            if isinstance(each.size, int) and each.size > 0 and _DIGEST.fullmatch(digest):
                files.append(HubFile(str(each.rfilename), each.size, digest))
        return files

    def check_access(self, file: HubFile) -> None:
        """Raise ModelPullError if the user may not download this file."""
        with self._translated():
            self._client.get_hf_file_metadata(self._url(file), headers=self._headers(), timeout=_TIMEOUT_S)

    def check_disk(self, model: HubModel) -> None:
        """Raise ModelPullError if the disk has no room for what is missing."""
        # A part that is larger than its file is emptied first, which frees at least as much as the file needs.
        missing = sum(
            max(0, file.size_bytes - self._partial_bytes(file))
            for file in model.files
            if self._existing(file) is None
        )
        folder = next(each for each in (self.cache.absolute(), *self.cache.absolute().parents) if each.exists())
        free = shutil.disk_usage(folder).free
        if missing > 0 and free < missing + MIN_FREE_BYTES:
            raise ModelPullError(
                f"hf.co/{self.name} needs {shown_size(missing)} more in {self.cache}, and the disk has only "
                f"{shown_size(free)} free; free some, or set HF_HOME to a folder on another disk"
            )

    def fetch(self, file: HubFile, bar: tqdm[Any], say: Callable[[str], object]) -> Path:
        """The path of a file in the cache, which has it complete from then on.

        Raises:
            ModelPullError: it cannot be fetched, or is damaged.
        """
        from filelock import FileLock, Timeout  # here, so that `%load_ext` is quick

        lock = FileLock(self.cache / ".locks" / folder_name(self.name) / f"{file.digest}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    say(f"waiting for another process that downloads {Path(file.name).name}")
                    held.enter_context(lock)
                if not self._is_complete(file, bar):
                    self._download(file, bar)
        except OSError as error:
            raise ModelPullError(failures.of_disk(error, self._place)) from None
        with self._translated():
            path: str = self._client.hf_hub_download(
                self.name,
                file.name,
                revision=self.commit,
                endpoint=self.endpoint,
                cache_dir=str(self.cache),
            )
        with contextlib.suppress(OSError):  # a cache that only another user may write
            refs = self.folder / "refs"
            refs.mkdir(parents=True, exist_ok=True)
            (refs / "main").write_text(self.commit, encoding="utf-8")
        return Path(path)

    def _is_complete(self, file: HubFile, bar: tqdm[Any]) -> bool:
        """Whether the cache has the file undamaged. A damaged one is deleted."""
        path = self._existing(file)
        if path is None:
            return False
        if read_digest(path, _new_digest(file), bar.update) == file.digest:
            return True
        bar.update(-file.size_bytes)
        path.unlink()
        return False

    def _download(self, file: HubFile, bar: tqdm[Any]) -> None:
        partial = self._partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        kept_bytes = self._partial_bytes(file)
        if kept_bytes > file.size_bytes:  # no beginning of this file: it is downloaded from its first byte
            kept_bytes = 0
        while True:
            bar.update(kept_bytes)
            try:
                digest = download(
                    self._url(file),
                    partial,
                    size_bytes=file.size_bytes,
                    headers=self._headers(),
                    new_digest=functools.partial(_new_digest, file),
                    advanced=bar.update,
                )
            except TransportError as error:
                raise ModelPullError(failures.of_transfer(error, file.name, self._place)) from None
            if digest == file.digest:
                partial.replace(self._blob(file))
                return
            partial.unlink()
            bar.update(-file.size_bytes)
            if not kept_bytes:
                raise ModelPullError(
                    f"{Path(file.name).name} of hf.co/{self.name} arrived damaged: its hash is {digest[:12]} "
                    f"instead of {file.digest[:12]}; it was deleted, run the same command again"
                )
            kept_bytes = 0  # what an earlier attempt left may be the damaged part

    def _existing(self, file: HubFile) -> Path | None:
        """Where the cache has the file; None if it does not, or not in its full size."""
        for path in (self._blob(file), self.folder / "snapshots" / self.commit / file.name):
            with contextlib.suppress(OSError):
                if path.stat().st_size == file.size_bytes:
                    return path
        return None

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.digest

    def _partial(self, file: HubFile) -> Path:
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def _partial_bytes(self, file: HubFile) -> int:
        """The size of what an earlier attempt has left of a file."""
        try:
            return self._partial(file).stat().st_size
        except OSError:
            return 0

    def _url(self, file: HubFile) -> str:
        url: str = self._client.hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)
        return url

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = self._client.utils.build_hf_headers(
            library_name="sollol_nb", library_version=__version__
        )
        return headers

    # --- errors -----------------------------------------------------------------------------------

    @property
    def _place(self) -> Place:
        address = urlsplit(self.endpoint)
        without_password = address.netloc.rpartition("@")[2]
        endpoint = urlunsplit((address.scheme, without_password, address.path, "", ""))
        return Place(self.name, endpoint, self.cache)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """The client's errors as one line each."""
        try:
            yield
        except (SollolError, KeyboardInterrupt):
            raise
        except Exception as error:  # the client lets errors of three HTTP libraries through
            raise ModelPullError(failures.of_client(error, self._client.errors, self._place)) from None


def _is_inside(name: str) -> bool:
    """Whether a file's name in a repository is one that stays in the repository's folder on every system."""
    is_plain = name.isprintable() and not any(sign in name for sign in ("\\", ":"))
    return is_plain and not name.startswith("/") and ".." not in name.split("/")


def _new_digest(file: HubFile) -> Digest:
    """The hash that the Hub names a file by: SHA-256 with LFS, else that of a Git blob."""
    if len(file.digest) == _SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
