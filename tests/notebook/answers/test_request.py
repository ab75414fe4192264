"""From the options of a cell to its request."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
from IPython.core.error import UsageError

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, StructureError
from sollol_nb.notebook import magic_line
from sollol_nb.notebook.answers.request import CellRequest, cell_request
from sollol_nb.notebook.magics.ask import AskMagics


def request(
    line: str, cell: str | None = None, *, defaults: dict[str, Any] | None = None, **variables: Any
) -> CellRequest:
    arguments, given = magic_line.parse(AskMagics.sollol, line, name="%%sollol", namespace=variables)
    return cell_request(magic_line.Call("%%sollol", arguments, given, cell), defaults or {})


@pytest.mark.parametrize(
    ("line", "cell", "model", "prompt"),
    [
        ("demo", "Hi\nthere\n", "demo", "Hi\nthere"),
        ("demo Hi there", None, "demo", "Hi there"),
        ('demo "Hi  there?"', None, "demo", "Hi  there?"),
        ('demo say "hello" twice', None, "demo", 'say "hello" twice'),
        ("demo --seed 1 What's up", None, "demo", "What's up"),
        ('"/my models/x.gguf" Hi', None, "/my models/x.gguf", "Hi"),
        ('"/my models/x.gguf"', "Hi", "/my models/x.gguf", "Hi"),
        ('"Hi there"', None, "default", "Hi there"),
        ("", "Hi", "default", "Hi"),
        ("{{ name }}", "Hi {{ name * 2 }}", "demo", "Hi demodemo"),
        ("demo --no-expand", "Hi {{ name }}", "demo", "Hi {{ name }}"),
        ("demo --var n=3", "{{ n }} {x}", "demo", "3 {x}"),
    ],
)
def test_model_and_prompt(line: str, cell: str | None, model: str, prompt: str) -> None:
    made = request(line, cell, defaults={"model": "default"}, name="demo")

    assert (made.model, made.prompt) == (model, prompt)


def test_options_override_defaults() -> None:
    defaults = {"temperature": 0.5, "max_tokens": 7, "system": "Be brief.", "format": "text", "priority": 3}
    made = request("demo --temperature 0 --stop a --stop b --priority high", "Hi", defaults=defaults)

    assert made.stream_options == {"temperature": 0.0, "max_tokens": 7, "stop": ["a", "b"], "priority": 7}
    assert made.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert made.shown_as == "text"
    assert request("demo --system ''", "Hi", defaults=defaults).messages == [{"role": "user", "content": "Hi"}]


def test_recovery_and_determinism_are_options_of_a_cell() -> None:
    made = request("demo --recovery exact --deterministic", "Hi")

    assert made.stream_options == {"recovery": "exact", "deterministic": True}
    assert request("demo", "Hi").stream_options == {}, "the router has its own settings"


RED = PIL.Image.new("RGB", (4, 3), "red")
UNSEEN = "[an image that you cannot see: image, 4 x 3 pixels]"


@pytest.mark.parametrize(
    ("line", "cell", "prompt", "without_images"),
    [
        ("demo", "What is {{ red }}?", "What is [image 1]?", f"What is {UNSEEN}?"),
        ('demo "What is {{ red }}?"', None, "What is [image 1]?", f"What is {UNSEEN}?"),
        ("demo What is {{ red }}?", None, "What is [image 1]?", f"What is {UNSEEN}?"),
        ('demo say "{{ red }}" twice', None, 'say "[image 1]" twice', f'say "{UNSEEN}" twice'),
        ("demo --system '{{ red }}' What is {{ red }}?", None, "What is [image 1]?", f"What is {UNSEEN}?"),
        ("demo", "{{ [red, red] }}", "[image 1]\n[image 2]", f"{UNSEEN}\n{UNSEEN}"),
        ("demo", "{{ red }}\n", "[image 1]", UNSEEN),
    ],
)
def test_an_image_is_sent_beside_the_prompt(line: str, cell: str | None, prompt: str, without_images: str) -> None:
    made = request(line, cell, red=RED)

    assert (made.prompt, made.without_images) == (prompt, without_images)
    assert len(made.images) == prompt.count("[image")
    assert made.messages[-1] == {
        "role": "user",
        "content": prompt,
        "images": made.images,
        "without_images": without_images,
    }
    assert made.system in (None, UNSEEN)


def test_what_was_cut_or_failed_is_noted_in_the_footer() -> None:
    class Chart:
        def _repr_llm_(self) -> int:
            return 1

        def __str__(self) -> str:
            return "a chart"

    made = request("demo '{{ text }} {{ chart }}'", text="x" * 150_000, chart=Chart())
    answer = made.apply_form(Completion(message={"role": "assistant", "content": "ok"}, model="demo"))

    assert len(made.prompt) < 101_000
    assert made.prompt.endswith("[cut: 99,940 of 150,000 characters shown] a chart")
    assert answer.footer() == (
        "demo · {{ text }} has 150,000 characters and was cut; {{ readable(text, limit_chars=150000) }} sends all "
        "of it · {{ chart }}: Chart._repr_llm_() returned int, not a text"
    )
    whole = request("demo", "{{ readable(text, limit_chars=150000) }}", text="x" * 150_000)
    assert (len(whole.prompt), whole.notes) == (150_000, [])


def test_the_first_images_of_many_are_sent() -> None:
    made = request("demo", "{{ reds }}", reds=[RED] * 20)

    assert len(made.images) == 16
    assert made.prompt.endswith("[image 16]" + "\nimage, 4 x 3 pixels" * 4)
    assert made.notes == ["only the first 16 images were sent"]


def test_also_images_that_objects_make_of_themselves_are_counted() -> None:
    class Chart:
        def _ai_repr_(self) -> dict[str, Any]:
            return {"image/png": RED._repr_png_()}

    made = request("demo", "{{ reds }} {{ chart }}", reds=[RED] * 16, chart=Chart())

    assert len(made.images) == 16
    assert made.notes == ["only the first 16 images were sent"]


def test_json_is_requested_from_the_engine_unless_there_is_a_schema() -> None:
    schema = {"type": "object"}

    assert request("demo --format json", "Hi").stream_options == {"format": "json"}
    assert request("demo --schema s", "Hi", s=schema).stream_options == {"schema": schema}
    assert request("demo --schema s", "Hi", s=schema).shown_as == "json"
    assert request("demo --schema s --format text", "Hi", s=schema).shown_as == "text"


@pytest.mark.parametrize(
    ("line", "cell", "message"),
    [
        ("demo", " \n", "the prompt is empty"),
        ("demo", None, "the prompt is empty"),
        ("demo what", "Hi", "unexpected 'what'; with %%sollol the prompt goes below"),
        ("", "Hi", "no model given"),
        ('"Hi there"', None, "no model given"),
        ("demo --reset", "Hi", "name it with --chat NAME"),
        ("demo --raw --quiet", "Hi", "--raw and --quiet cannot be combined"),
        ("x << demo --out y", "Hi", "two variables, x and y"),
        ("demo --out 1x", "Hi", "'1x' [(]--out[)] is not a valid variable name"),
        ("$name", "Hi", "'[$]name' is not a model's name; to insert a variable, write {{ name }}"),
        ("{name} Hi", None, "'{name}' is not a model's name; to insert a variable, write {{ name }}"),
    ],
)
def test_mistakes_are_usage_errors(line: str, cell: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(line, cell)


def test_the_name_before_the_line_is_where_the_answer_goes() -> None:
    assert request("x << demo", "Hi").out == request("demo --out x", "Hi").out == "x"
    assert request("demo", "Hi").out is None


def test_the_value_is_the_completion_or_its_frame() -> None:
    rows = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    answer = Completion(message={"role": "assistant", "content": '[{"a": 1}, {"a": 2}]'})
    plain, framed = request("demo", "Hi"), request("demo --schema s --frame", "Hi", s=rows)

    assert plain.value(plain.apply_form(answer)) is answer
    frame = framed.value(framed.apply_form(answer))
    assert not isinstance(frame, Completion)
    assert frame["a"].tolist() == [1, 2]
    assert frame.attrs["completion"] is answer


def test_an_answer_that_does_not_match_its_schema_has_no_value() -> None:
    made = request("demo --schema int", "Hi", int=int)
    answer = made.apply_form(Completion(message={"role": "assistant", "content": '"text"'}))

    with pytest.raises(StructureError, match="does not match the schema"):
        made.value(answer)


def test_an_unknown_schema_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean Person"):
        request("demo --schema Persn", "Hi", Person=int)
