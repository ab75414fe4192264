"""Values that are images become PNG or JPEG for models that read images, and are described for all others."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import IPython.display
import matplotlib as mpl
import numpy as np
import PIL.Image
import pytest

from sollol_nb.text.images import MAX_IMAGE_BYTES, MAX_SIDE_PIXELS, image_in, image_of, is_image
from sollol_nb.text.readable import form_of, readable

mpl.use("agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    yield
    plt.close("all")


def saved(image: PIL.Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


RED = PIL.Image.new("RGB", (40, 30), "red")


def opened(value: Any) -> PIL.Image.Image:
    """The image that is sent for a value."""
    image = image_of(value)
    assert image is not None
    assert image.data is not None
    return PIL.Image.open(io.BytesIO(image.data))


class Drawing:
    """Draws itself as IPython's objects do."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return saved(RED, "PNG"), {"width": 20}

    def __repr__(self) -> str:
        return "a red drawing"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (RED, "image, 40 x 30 pixels"),
        (saved(RED, "PNG"), "PNG image, 40 x 30 pixels"),
        (bytearray(saved(RED, "PNG")), "PNG image, 40 x 30 pixels"),
        (memoryview(saved(RED, "PNG")), "PNG image, 40 x 30 pixels"),
        (saved(RED, "JPEG"), "JPEG image, "),
        (IPython.display.Image(data=saved(RED, "PNG")), "PNG image, 40 x 30 pixels"),
        (Drawing(), "a red drawing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_image_is_sent_and_described(value: Any, words: str) -> None:
    sent = opened(value)
    form = form_of(value)

    assert (sent.size, sent.format in ("PNG", "JPEG")) == ((40, 30), True)
    assert form.image is not None
    assert form.text.startswith(words)
    assert readable(value) == form.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB"])
def test_any_kind_of_pil_image_becomes_grey_or_rgb(mode: str) -> None:
    assert opened(PIL.Image.new(mode, (9, 5))).mode in ("L", "RGB", "1")


def test_what_is_transparent_becomes_white() -> None:
    """The engines drop transparency: below it, most images are black."""
    glass = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert opened(glass).getpixel((1, 1)) == (255, 255, 255)


def test_measured_values_keep_their_shades() -> None:
    measured = PIL.Image.fromarray(np.array([[0, 30_000], [60_000, 60_000]], np.uint16))
    assert [opened(measured).getpixel(at) for at in ((0, 0), (1, 0), (1, 1))] == [0, 127, 255]


def test_a_large_image_is_made_smaller_and_the_own_one_is_not_touched() -> None:
    large = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (2500, 3000, 3), np.uint8))
    sent = opened(large)

    assert max(sent.size) == MAX_SIDE_PIXELS
    assert sent.format == "JPEG"
    assert large.size == (3000, 2500)


def test_a_figure_is_drawn_and_described() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(40, 4))
    axes[0].plot([1, 2], label="line")
    whole, part = opened(figure), opened(axes[0])

    assert whole.size[0] <= MAX_SIDE_PIXELS * 1.1
    assert part.size[0] < whole.size[0] / 1.5
    assert form_of(figure).text.startswith("Figure with 2 axes")
    assert figure.get_size_inches().tolist() == [40, 4]


def test_a_figure_that_cannot_be_drawn_is_described() -> None:
    figure, axes = plt.subplots()
    axes.set_title("$\\nonsense{$")
    form = form_of(figure)

    assert form.image is None
    assert "Figure could not be drawn (ValueError" in form.problem
    assert form.text.startswith("Figure with 1 axes")


@pytest.mark.parametrize(
    ("value", "words", "problem"),
    [
        (saved(RED, "GIF"), "GIF image, ", "models take PNG and JPEG, not GIF"),
        (saved(RED, "WEBP"), "WebP image, ", "models take PNG and JPEG, not WebP"),
        (saved(RED, "BMP"), "BMP image, ", "not BMP"),
        (saved(RED, "PNG") + bytes(MAX_IMAGE_BYTES), "PNG image, ", "is over 8.0 MiB"),
        (PIL.Image.new("RGB", (0, 3)), "image, 0 x 3 pixels", "without pixels"),
        (IPython.display.Image(url="https://example.org/a.png"), "image that is only an address", "not fetched"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sent_is_described_and_the_reason_given(value: Any, words: str, problem: str) -> None:
    form = form_of(value)
    assert form.image is None
    assert form.text.startswith(words)
    assert problem in form.problem


@pytest.mark.parametrize("value", [b"", b"BM is text", b"RIFF....WAVE", "text", 3, None, [RED], int, object()])
def test_other_values_are_no_images(value: object) -> None:
    assert not is_image(value)
    assert image_of(value) is None


@pytest.mark.parametrize(
    ("data", "is_one"),
    [
        (saved(RED, "PNG"), True),
        (base64.b64encode(saved(RED, "JPEG")).decode(), True),
        ("not base64 at all", False),
        ("aGVsbG8=", False),
        (5, False),
        (None, False),
    ],
    ids=str,
)
def test_images_of_mime_bundles_are_bytes_or_base64(data: object, is_one: bool) -> None:
    assert (image_in(data) is not None) == is_one


@pytest.mark.parametrize(
    "make",
    ["b'\\x89PNG\\r\\n\\x1a\\n' + bytes(100)", "{'a': [1, b'abc', object()]}", "'x' * 200_000"],
)
def test_no_library_is_imported_for_a_value_that_is_not_its_own(make: str) -> None:
    code = (
        "import sys; from sollol_nb.text.insertions import Insertions\n"
        f"insertions = Insertions(); insertions.sent(insertions.text_of({make}))\n"
        "print({'PIL', 'polars', 'pyarrow', 'pandas', 'numpy', 'matplotlib', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
