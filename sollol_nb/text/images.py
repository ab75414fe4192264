"""The image that a Python value is, as PNG or JPEG for a model that reads images.

Images of PIL, matplotlib's figures and axes, the bytes of a PNG or JPEG file, IPython's `Image`, and objects
that draw themselves (`_repr_png_`, `_repr_jpeg_`). Large ones are made smaller where their library can do it.
Nothing is fetched, and no library is imported: whoever made the value has imported it.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

from sollol_nb.text.readable_frames import is_instance_of
from sollol_nb.text.tables import format_bytes

MAX_SIDE_PIXELS = 1536
"""Models read no more than about this of a side; a larger image only takes more tokens."""
MAX_IMAGE_BYTES = 8 * 1024 * 1024
_MAX_PNG_BYTES = 2 * 1024 * 1024  # of an image that can be a JPEG instead
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_OTHER_KINDS = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"RIFF", "WebP"),
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image.

    Attributes:
        data: the bytes of a PNG or JPEG file; None if it cannot be sent.
        about: in a few words, such as `PNG image, 640 x 480 pixels`.
        problem: why it cannot be sent, and what to do; usually "".
    """

    data: bytes | None
    about: str
    problem: str = ""

    @property
    def base64(self) -> str:
        """The data as messages take it."""
        return base64.b64encode(self.data or b"").decode("ascii")


def is_image(value: object) -> bool:
    """Whether the value is an image, without making one."""
    if isinstance(value, bytes | bytearray | memoryview):
        return _kind_of(_head(value)) != ""
    return is_instance_of(value, *_PIL, *_FIGURES, _DISPLAYED) or any(
        callable(getattr(type(value), name, None)) for name in _DRAWING_METHODS
    )


def is_figure(value: object) -> bool:
    """Whether the value is a figure of matplotlib, a part of one, or one of its axes."""
    return is_instance_of(value, *_FIGURES)


def about_image(value: Any) -> str:
    """A few words about an image of PIL, of IPython or in bytes, without making one; "" for anything else."""
    if is_instance_of(value, *_PIL):
        return _about_pil(value)
    if is_instance_of(value, _DISPLAYED):
        value = value.data if isinstance(value.data, bytes) else None
        if value is None:
            return "image that is only an address"
    if isinstance(value, bytes | bytearray | memoryview) and _kind_of(_head(value)):
        return image_of_bytes(bytes(value)).about
    return ""


def image_of(value: Any) -> Image | None:
    """The image that a value is; None for a value that is none.

    What drawing it raises is raised.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return image_of_bytes(bytes(value)) if _kind_of(_head(value)) else None
    if is_instance_of(value, *_PIL):
        return _of_pil(value)
    if is_figure(value):
        return _of_figure(value)
    if is_instance_of(value, _DISPLAYED):
        data = value.data
        if isinstance(data, bytes):
            return image_of_bytes(data)
        where = str(getattr(value, "url", None) or "")[:200]
        problem = f"the image {where} is only an address, which is not fetched; use Image(url=..., embed=True)"
        return Image(None, about_image(value), problem)
    for name in _DRAWING_METHODS:
        method = getattr(type(value), name, None)
        drawn = method(value) if callable(method) else None
        image = image_in(drawn[0] if isinstance(drawn, tuple) and drawn else drawn)
        if image is not None:
            return image
    return None


def image_in(data: object) -> Image | None:
    """The image of an entry `image/png` or `image/jpeg` of a MIME bundle: bytes, or base64 text."""
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=False)
        except (binascii.Error, ValueError):
            return None
    return image_of_bytes(data) if isinstance(data, bytes) and _kind_of(data[:16]) else None


def image_of_bytes(data: bytes) -> Image:
    """The image in the bytes of an image file."""
    kind, size = _kind_of(data[:16]), format_bytes(len(data))
    pixels = _png_pixels(data) if kind == "PNG" else ""
    about = f"{kind} image, {pixels or size}"
    if kind not in ("PNG", "JPEG"):
        return Image(None, about, f"models take PNG and JPEG, not {kind}; insert what PIL.Image.open(...) returns")
    if len(data) > MAX_IMAGE_BYTES:
        limit = format_bytes(MAX_IMAGE_BYTES)
        return Image(None, about, f"an image of {size} is over {limit}; insert what PIL.Image.open(...) returns")
    return Image(data, about)


_PIL = ("PIL.Image.Image",)
_FIGURES = ("matplotlib.figure.FigureBase", "matplotlib.axes.Axes")
_DISPLAYED = "IPython.core.display.Image"
_DRAWING_METHODS = ("_repr_png_", "_repr_jpeg_")


def _head(value: bytes | bytearray | memoryview) -> bytes:
    if isinstance(value, memoryview):
        value = value.cast("B") if value.contiguous and value.nbytes else b""
    return bytes(value[:16])


def _kind_of(head: bytes) -> str:
    """The kind of an image file that begins so; "" for anything else."""
    if head.startswith(_PNG):
        return "PNG"
    if head.startswith(_JPEG):
        return "JPEG"
    kind = next((kind for begin, kind in _OTHER_KINDS if head.startswith(begin)), "")
    if (kind == "WebP" and head[8:12] != b"WEBP") or (kind == "BMP" and head[6:10] != bytes(4)):
        return ""
    return kind


def _png_pixels(data: bytes) -> str:
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return f"{width:,} x {height:,} pixels"


def _about_pil(image: Any) -> str:
    return f"image, {image.width:,} x {image.height:,} pixels"


def _of_pil(image: Any) -> Image:
    about = _about_pil(image)
    if not image.width or not image.height:
        return Image(None, about, "an image without pixels cannot be sent")
    shown = _in_plain_colours(image)
    shown.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    data = _saved(shown, "PNG")
    return Image(data if len(data) <= _MAX_PNG_BYTES else _saved(shown, "JPEG"), about)


def _in_plain_colours(image: Any) -> Any:
    """A copy in grey or RGB: the engines drop transparency, and with it the background."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):  # measured values, of any range
        least, largest = image.convert("F").getextrema()
        scale = 255 / (largest - least) if largest > least else 1.0
        return image.convert("F").point(lambda value: value * scale - least * scale).convert("L")
    if ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = over.copy()
        white.paste((255, 255, 255, 255), (0, 0, *over.size))
        white.alpha_composite(over)
        return white.convert("RGB")
    return image.convert("RGB")


def _saved(image: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _of_figure(value: Any) -> Image:
    """A figure, or the part of it that an axes or a subfigure takes."""
    figure = getattr(value, "figure", None) or value
    while is_instance_of(getattr(figure, "figure", None), "matplotlib.figure.FigureBase"):
        parent = figure.figure
        if parent is figure:
            break
        figure = parent
    box: Any = "tight"
    if value is not figure:
        figure.canvas.draw()
        extent = value.get_tightbbox(figure.canvas.get_renderer())
        box = extent.transformed(figure.dpi_scale_trans.inverted()).padded(0.1) if extent is not None else box
    dpi = min(figure.dpi, MAX_SIDE_PIXELS / max(figure.get_size_inches()))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=box)
    return image_of_bytes(buffer.getvalue())
