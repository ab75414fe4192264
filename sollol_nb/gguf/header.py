"""Reads the header of one GGUF file: its keys, and its tensors' names, shapes and positions.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and gguf.cpp of llama.cpp for its limits. A file
may be damaged, or made to do harm: every position is checked against the end of the file and of the header, every
count and size is bounded, and nothing is calculated in numbers of fixed width. The `gguf` package knows the sizes
of the tensor types; its reader is not used, since it reads and loops past the end of a damaged file, lets sizes
overflow, and creates objects for each of the 400,000 entries of a large vocabulary, which takes seconds.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from sollol_nb.errors import ModelFileError

Keys = dict[str, Any]
T = TypeVar("T")

_MAGIC = b"GGUF"
_FIXED_HEADER_BYTES = 24  # magic, version, tensor count, key count
_SUPPORTED_VERSIONS = (2, 3)
_MAX_ENTRIES = 2**16  # tensors, and keys; the largest models have a few thousand
_MAX_HEADER_BYTES = 128 * 2**20  # a vocabulary of 256,000 tokens with its merges takes 15 MiB
_MAX_STRINGS = 2**21  # in all arrays: each takes time
_MAX_TEXT_BYTES = 16 * 2**20
_MAX_KEPT_NUMBERS = 2**12  # of an array: one for each block, say
_MAX_NUMBERS = 2**20  # in all arrays that are kept: each takes memory
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_SIZE = 2**62  # of any number that is a size or a position, so that their sums are plausible too
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_TOKENIZER = "tokenizer.ggml."
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its format for `struct`."""


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


class _DamagedError(ValueError):
    """Something in the header is impossible."""


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
    header = _parsed(file, _Parser.header)
    data_end = max((tensor.end_offset for tensor in header.tensors), default=0)
    if data_end > file.file_bytes:
        raise ModelFileError(
            f"{file.path} is truncated: {data_end - file.file_bytes} bytes of {data_end} are missing; "
            "download it again"
        )
    return header


def read_tokenizer(file: GgufFile) -> Keys:
    """Read the keys of a file's tokenizer, without `tokenizer.ggml.` before them; `tokens` are their bytes, in a
    tuple, and other lists of texts are left out.

    Raises:
        ModelFileError: as for `read_header`.
    """
    return _parsed(file, _Parser.tokenizer)


def _parsed(file: GgufFile, read: Callable[[_Parser], T]) -> T:
    try:
        with file.path.open("rb") as opened:
            problem = _obvious_problem(opened.read(_FIXED_HEADER_BYTES))
            if problem is None:
                with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return read(_Parser(data))
    except PermissionError:
        raise ModelFileError(_no_permission(file.path)) from None
    except OSError as error:
        raise ModelFileError(f"cannot read {file.path}: {_one_line(error)}") from None
    except _DamagedError as error:
        problem = f"is truncated or damaged: {error}; download it again"
    except ValueError as error:
        problem = f"has a header that cannot be read ({_one_line(error)}); download it again, or update gguf"
    raise ModelFileError(f"{file.path} {problem}")


def _obvious_problem(start: bytes) -> str | None:
    """A problem visible in the first bytes, as a text that follows the file's name."""
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


class _Parser:
    """Reads a header from its first key on.

    Args:
        data: the whole file; its fixed part has been checked.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = _FIXED_HEADER_BYTES
        self._end = len(data)
        self._string_count = self._number_count = 0
        self._tensor_count, self._key_count = struct.unpack_from("<QQ", data, 8)

    def header(self) -> Header:
        """The header.

        Raises:
            _DamagedError: it points past its end, or states what is impossible.
            ValueError: it has a value or a tensor of a type that is not known here.
        """
        keys: Keys = {}
        for _ in range(self._key_count):
            name = self._text()
            if name in keys:
                raise _DamagedError("a key occurs twice")
            value = self._value(*self._read("I"))
            # The vocabulary is not needed.
            if value is not None and not name.startswith(_TOKENIZER):
                keys[name] = value
        described = [self._tensor() for _ in range(self._tensor_count)]
        if len({name for name, *_ in described}) < len(described):
            raise _DamagedError("a tensor occurs twice")
        start = self._data_start(keys)
        return Header(
            keys,
            tuple(
                TensorInfo(name, shape, prod(shape), byte_count, start + offset + byte_count)
                for name, shape, byte_count, offset in described
            ),
        )

    def tokenizer(self) -> Keys:
        """The keys of `read_tokenizer`. Errors are those of `header`."""
        keys: Keys = {}
        for _ in range(self._key_count):
            name = self._text()
            (kind,) = self._read("I")
            value = self._texts() if name == f"{_TOKENIZER}tokens" and kind == _ARRAY else self._value(kind)
            if value is not None and name.startswith(_TOKENIZER):
                keys[name.removeprefix(_TOKENIZER)] = value
        return keys

    def _texts(self) -> tuple[bytes, ...]:
        """The next array, of texts."""
        kind, count = self._read("IQ")
        if kind != _STRING:
            raise _DamagedError("its tokens are no texts")
        self._count_strings(count)
        texts = []
        for _ in range(count):
            (length,) = self._read("Q")
            start = self._at
            self._skip(length)
            texts.append(self._data[start : self._at])
        return tuple(texts)

    def _count_strings(self, count: int) -> None:
        self._string_count += count
        if self._string_count > _MAX_STRINGS:
            raise _DamagedError(f"its lists have {self._string_count} texts or more")

    def _data_start(self, keys: Keys) -> int:
        alignment = keys.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_HEADER_BYTES or alignment & (alignment - 1):
            raise _DamagedError(f"its alignment is {str(alignment)[:20]}")
        return -(-self._at // alignment) * alignment

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, bytes and offset of the next tensor."""
        name = self._text()
        (dimensions,) = self._read("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _DamagedError(f"a tensor has {dimensions} dimensions")
        shape = self._read(f"{dimensions}Q")
        type_number, offset = self._read("IQ")
        block_elements, block_bytes = _type_size(type_number)
        byte_count = prod(shape) // block_elements * block_bytes
        if max(prod(shape), byte_count, offset) > _MAX_SIZE:
            raise _DamagedError("a tensor has an impossible size or position")
        return name, shape, byte_count, offset

    def _value(self, kind: int) -> Any:
        """The next value; None for an array that is not kept."""
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(*self._read("IQ"))
        (value,) = self._read(_scalar(kind))
        return value

    def _array(self, kind: int, count: int) -> list[Any] | None:
        if kind == _STRING:
            self._count_strings(count)
            for _ in range(count):
                self._skip(*self._read("Q"))
            return None
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if count <= _MAX_KEPT_NUMBERS:
            self._number_count += count
            if self._number_count > _MAX_NUMBERS:
                raise _DamagedError(f"its lists have {self._number_count} numbers or more")
            return list(self._read(f"{count}{_scalar(kind)}"))
        self._skip(count * struct.calcsize(f"<{_scalar(kind)}"))
        return None

    def _text(self) -> str:
        (length,) = self._read("Q")
        start = self._at
        self._skip(length)
        if length > _MAX_TEXT_BYTES:
            raise _DamagedError(f"a text of {length} bytes")
        return self._data[start : self._at].decode("utf-8", "replace")

    def _read(self, numbers: str) -> tuple[Any, ...]:
        """The next numbers, in a format of `struct`, little-endian."""
        start = self._at
        self._skip(struct.calcsize(f"<{numbers}"))
        return struct.unpack_from(f"<{numbers}", self._data, start)

    def _skip(self, byte_count: int) -> None:
        self._at += byte_count
        if self._at > self._end:
            raise _DamagedError(f"its header points {self._at - self._end} bytes past its end")
        if self._at > _MAX_HEADER_BYTES:
            raise _DamagedError(f"its header is longer than {_MAX_HEADER_BYTES} bytes")


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"{kind} is not a type of a value")
    return _SCALARS[kind]


def _type_size(number: int) -> tuple[int, int]:
    """Elements and bytes of one block of a tensor type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # loads numpy

    return GGML_QUANT_SIZES[GGMLQuantizationType(number)]
