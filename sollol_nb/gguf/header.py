"""Reads the header of one GGUF file: its keys, and its tensors' names, shapes and positions.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The official reader of the `gguf` package parses
it; two of its steps are replaced here: every read is checked against the end of the file (the original reads, or
loops, past the end of a damaged file), and arrays are read or skipped in one step (the original creates several
objects for each of the 400,000 entries of a large vocabulary, which takes seconds). The reader memory-maps the
file; the map is closed when `read_header` returns or raises, so that the file can be replaced or deleted on
Windows too.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ModelFileError

if TYPE_CHECKING:
    from gguf import GGUFReader

Keys = dict[str, Any]

_MAGIC = b"GGUF"
_FIXED_HEADER_BYTES = 24  # magic, version, tensor count, key count
_SUPPORTED_VERSIONS = (2, 3)
_MAX_ENTRIES = 2**17  # tensors, and keys; the largest models have a few thousand


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file and its state when it was checked: the key of the cache of facts."""

    path: Path
    file_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: `end_offset` is the position of the first byte after its data."""

    name: str
    shape: tuple[int, ...]
    element_count: int
    byte_count: int
    end_offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """Keys (strings, numbers, lists of numbers, but no lists of strings) and tensors of one file."""

    keys: Keys
    tensors: tuple[TensorInfo, ...]


class _EndOfFileError(ValueError):
    """The header points past the end of the file."""


def check_file(path: Path, *, advice: str) -> GgufFile:
    """Size and modification time of a file; `advice` ends the message when it does not exist.

    Raises:
        ModelFileError: no such file, a folder or a special file, no permission.
    """
    try:
        stat = path.stat()
        is_folder, is_file = path.is_dir(), path.is_file()
    except PermissionError:
        raise ModelFileError(_no_permission(path)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFileError(f"{path} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot read {path}: {_one_line(error)}; {advice}") from None
    if is_folder:
        raise ModelFileError(f"{path} is a folder; name the .gguf file in it")
    if not is_file:
        raise ModelFileError(f"{path} is not a regular file; name a .gguf file")
    return GgufFile(path, stat.st_size, stat.st_mtime_ns)


def _no_permission(path: Path) -> str:
    return (
        f"no permission to read {path}; allow it with `chmod a+r` on the file (and `chmod a+x` on its folders), "
        "or copy the file to a folder of yours"
    )


def read_header(file: GgufFile) -> Header:
    """Read a file's header.

    Raises:
        ModelFileError: not readable, not GGUF, an unsupported version, truncated or damaged.
    """
    # The reader's exception holds its frames, and with them the memory map: so the new error is raised outside the
    # except block, where the reader's does not become its context.
    problem = _obvious_problem(file)
    if problem is None:
        try:
            header = _parse(file.path)
        except _EndOfFileError as error:
            problem = f"is truncated or damaged: {error}; download it again"
        except PermissionError:
            raise ModelFileError(_no_permission(file.path)) from None
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
            problem = f"has a header that cannot be read ({_one_line(error)}); download it again, or update gguf"
    if problem is not None:
        raise ModelFileError(f"{file.path} {problem}")
    data_end = max((tensor.end_offset for tensor in header.tensors), default=0)
    if data_end > file.file_bytes:
        raise ModelFileError(
            f"{file.path} is truncated: {data_end - file.file_bytes} bytes of {data_end} are missing; "
            "download it again"
        )
    return header


def _obvious_problem(file: GgufFile) -> str | None:
    """A problem visible in the first bytes, as a text that follows the file's name."""
    try:
        with file.path.open("rb") as opened:
            start = opened.read(_FIXED_HEADER_BYTES)
    except PermissionError:
        raise ModelFileError(_no_permission(file.path)) from None
    except OSError as error:
        raise ModelFileError(f"cannot read {file.path}: {_one_line(error)}") from None
    if not start:
        return "is empty; download it again"
    if not start.startswith(_MAGIC):
        return f"is not a GGUF file (it starts with {start[:4]!r}); convert the model to GGUF"
    if len(start) < _FIXED_HEADER_BYTES:
        return f"is truncated: it has only {len(start)} bytes; download it again"
    version = struct.unpack_from("<I", start, 4)[0]
    if version & 0xFFFF == 0:
        return "is a big-endian GGUF file, which llama.cpp cannot load here; convert the model again"
    if version not in _SUPPORTED_VERSIONS:
        return f"has GGUF version {version}, but only versions 2 and 3 are supported; convert the model again"
    if max(struct.unpack_from("<QQ", start, 8)) > _MAX_ENTRIES:
        return "is damaged: its header counts are impossible; download it again"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parse(path: Path) -> Header:
    """Read keys and tensor shapes into plain values, which do not refer to the memory map."""
    reader = _reader_class()(path)
    keys: Keys = {}
    for key, field in reader.fields.items():
        # Large lists of numbers (token types, scores) are not needed either.
        if not key.startswith(("GGUF.", "tokenizer.ggml.")):
            keys[key] = field.contents()
    tensors = tuple(
        TensorInfo(
            name=tensor.name,
            shape=tuple(int(size) for size in tensor.shape),
            element_count=int(tensor.n_elements),
            byte_count=int(tensor.n_bytes),
            end_offset=int(tensor.data_offset) + int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    )
    return Header(keys, tensors)


@functools.cache
def _reader_class() -> type[GGUFReader]:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class HeaderReader(GGUFReader):
        """The official reader, bounded by the end of the file and without the tensors' data."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if hasattr(self, "data_offset"):  # after the header: a tensor's data, which may be missing
                return np.broadcast_to(np.zeros((), dtype), (int(count),))
            self._check_end(int(offset) + np.dtype(dtype).itemsize * int(count))
            return super()._get(int(offset), dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            element_type = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            start, count = orig_offs + 12, int(length[0])
            kind = GGUFValueType(int(element_type[0]))
            types = [GGUFValueType.ARRAY, kind]
            if kind == GGUFValueType.STRING:
                end = self._end_of_strings(start, count)
                return end - orig_offs, [element_type, length], [], types
            if kind not in self.gguf_scalar_to_np:
                raise ValueError("an array of arrays")
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + int(values.nbytes), [element_type, length, values], [2], types

        def _end_of_strings(self, offset: int, count: int) -> int:
            view = memoryview(self.data)  # type: ignore[arg-type]  # numpy arrays are buffers
            read_length = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self._check_end(offset + 8)
                offset += 8 + read_length(view, offset)[0]
            self._check_end(offset)
            return offset

        def _check_end(self, end: int) -> None:
            missing = end - len(self.data)
            if missing > 0:
                raise _EndOfFileError(f"its header points {missing} bytes past its end")

    return HeaderReader
