"""The line of a magic: words, expressions, options, and one line of help for each mistake."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, ClassVar

import pytest
from IPython.core.error import UsageError
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.errors import ConfigError
from sollol_nb.notebook import magic_line


@magic_arguments()
@argument("words", nargs="*")
@argument("--temperature", type=magic_line.number)
@argument("--max-tokens", type=magic_line.whole_number)
@argument("--seed", type=magic_line.seed)
@argument("--priority", type=magic_line.priority)
@argument("--stop", action="append")
@argument("--system")
@argument("--format", choices=("markdown", "text", "json"))
@argument("--var", action="append")
@argument("--no-expand", dest="expand", action="store_false")
def magic(self: Any, line: str) -> None:
    """Do something."""


@magic_arguments()
@argument("model")
def needy(self: Any, line: str) -> None:
    """Do something else."""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("demo  What is it", ["demo", "What", "is", "it"]),
        ('demo "What is it?"', ["demo", "What is it?"]),
        ("demo 'What is it?'", ["demo", "What is it?"]),
        ("demo What's a worker", ["demo", "What's", "a", "worker"]),
        ('demo "never closed', ["demo", '"never', "closed"]),
        ('--system="You are x"', ["--system=You are x"]),
        (r'--stop "\n" --stop "a\"b"', ["--stop", "\n", "--stop", 'a"b']),
        (r"--stop '\n'", ["--stop", r"\n"]),
        ("{{ a b }} x", ["{{ a b }}", "x"]),
        ("a{{ 'x }} y' }}b c", ["a{{ 'x }} y' }}b", "c"]),
        ('{{ {"a": {"b": 1}} }} c', ['{{ {"a": {"b": 1}} }}', "c"]),
        ("{{ open", ["{{ open"]),
        ("demo\tx\ny", ["demo", "x", "y"]),
    ],
)
def test_a_line_is_split_into_words(line: str, words: list[str]) -> None:
    assert magic_line.split(line) == words


def test_words_keep_their_quotes() -> None:
    plain, quoted = magic_line.split('say "hello there"')

    assert (plain.raw, plain.is_quoted) == ("say", False)
    assert (quoted.raw, quoted.is_quoted) == ('"hello there"', True)


def test_options_and_prompt_may_come_in_any_order() -> None:
    arguments, _ = magic_line.parse(magic, "demo --temperature 0 What --max-tokens 5 now", name="%m")

    assert arguments.words == ["demo", "What", "now"]
    assert (arguments.temperature, arguments.max_tokens) == (0.0, 5)


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        (
            "demo --temprature 1",
            "%m: unknown option --temprature; did you mean --temperature? See %m? for the options",
        ),
        ("demo --xyzzy", "%m: unknown option --xyzzy; see %m? for the options"),
        (
            "--max-tokens many",
            "%m: --max-tokens takes a whole number such as 100, not 'many'; see %m? for the options",
        ),
        ("--max-tokens 0", "%m: --max-tokens must be 1 or more, not '0'; see %m? for the options"),
        ("--max-tokens -3", "%m: --max-tokens must be 1 or more, not '-3'; see %m? for the options"),
        (
            f"--max-tokens {'9' * 5000}",
            f"%m: --max-tokens must be at most 2147483647, not '{'9' * 39}…'; see %m? for the options",
        ),
        (f"--priority {'1' * 5000}", "%m: --priority takes 1 to 10 or a name such as high, not '111"),
        ("--temperature nan", "%m: --temperature takes a number such as 0.7, not 'nan'; see %m? for the options"),
        ("-t 0", "%m: unknown option -t; see %m? for the options"),
        ("--schema x", "%m: unknown option --schema; see %m? for the options"),
        ("--max-tokens", "%m: --max-tokens takes a value; see %m? for the options"),
        (
            "--temperature warm",
            "%m: --temperature takes a number such as 0.7, not 'warm'; see %m? for the options",
        ),
        ("--seed 1.5", "%m: --seed takes a whole number such as 42, not '1.5'; see %m? for the options"),
        (
            "--priority urgentt",
            "%m: --priority takes 1 to 10 or a name such as high, not 'urgentt'; see %m? for the options",
        ),
        (
            "--priority 11",
            "%m: --priority takes 1 to 10 or a name such as high, not '11'; see %m? for the options",
        ),
        ("--format jsn", "%m: invalid --format 'jsn'; did you mean json?"),
        ("--format zzz", "%m: invalid --format 'zzz'; choose from markdown, text, json"),
        ("--var city", "%m: --var takes NAME=VALUE, such as --var city=Rome, not 'city'"),
        ("--var 1x=2", "'1x' (--var) is not a valid variable name"),
    ],
)
def test_a_wrong_option_is_one_line_that_suggests_the_nearest(line: str, usage: str) -> None:
    with pytest.raises(UsageError) as caught:
        magic_line.parse(magic, line, name="%m", namespace={})
    assert str(caught.value).startswith(usage)
    assert "\n" not in str(caught.value)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UsageError, match=r"^%n: model is missing; see %n[?] for the options$"):
        magic_line.parse(needy, "", name="%n")
    with pytest.raises(UsageError, match=r"^%n: unexpected 'b c'; "):
        magic_line.parse(needy, "a b c", name="%n")


@pytest.mark.parametrize("line", ["--stop '---' demo", 'demo "--stop" "---"', "demo --stop={{ dashes }}"])
def test_a_quoted_value_may_begin_with_a_dash(line: str) -> None:
    arguments, _ = magic_line.parse(magic, line, name="%m", namespace={"dashes": "---"})
    assert (arguments.words, arguments.stop) == (["demo"], ["---"])


def test_expressions_in_options_are_expanded_each_as_one_word() -> None:
    variables = {"model": "demo", "role": 'a "wise" critic', "n": 3}
    line = "{{ model }} --system {{ role }} --max-tokens {{ n * 2 }} tell {{ n }}"
    arguments, _ = magic_line.parse(magic, line, name="%m", namespace=variables)

    assert arguments.words == ["demo", "tell", "3"]
    assert (arguments.system, arguments.max_tokens) == ('a "wise" critic', 6)


def test_variables_of_the_line_exist_in_this_cell_only() -> None:
    variables = {"n": 3}
    line = "--var city=Rome --var='many={{ n }}0' {{ city }}"
    arguments, given = magic_line.parse(magic, line, name="%m", namespace=variables)

    assert arguments.words == ["Rome"]
    assert given == {"n": 3, "city": "Rome", "many": "30"}
    assert variables == {"n": 3}


def test_expansion_can_be_switched_off() -> None:
    arguments, _ = magic_line.parse(magic, "demo --no-expand {{ nosuch }}", name="%m", namespace={})

    assert arguments.words == ["demo", "{{ nosuch }}"]
    assert arguments.expand is False


def test_an_unknown_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there is no variable citi"):
        magic_line.parse(magic, "{{ citi }}", name="%m", namespace={"city": 1})


@pytest.mark.parametrize(
    ("line", "name", "rest"),
    [
        ("answer << demo --seed 1", "answer", "demo --seed 1"),
        (" a1<< demo", "a1", "demo"),
        ("answer <<", "answer", ""),
        ("demo 1 << 2", None, "demo 1 << 2"),
        ("demo", None, "demo"),
    ],
)
def test_an_answer_can_be_named_before_the_line(line: str, name: str | None, rest: str) -> None:
    assert magic_line.split_assignment(line) == (name, rest)


def test_an_invalid_variable_name_is_refused() -> None:
    for name in ("1x", "class"):
        with pytest.raises(UsageError, match=f"'{name}' [(]before <<[)] is not a valid variable name"):
            magic_line.split_assignment(f"{name} << demo")


def call(**variables: Any) -> magic_line.Call:
    return magic_line.Call("%m", Namespace(), variables)


def test_an_option_can_name_a_variable() -> None:
    assert call(Person=int).named_value("list[Person]", "--schema") == list[int]
    with pytest.raises(ConfigError, match=r"--schema Persn: name 'Persn' is not defined; did you mean Person\?"):
        call(Person=int).named_value("Persn", "--schema")
    with pytest.raises(ConfigError, match=r"--schema Nope: name 'Nope' is not defined$"):
        call(open=open, Other=int).named_value("Nope", "--schema")
    with pytest.raises(ConfigError, match="--schema 1/0: ZeroDivisionError: division by zero"):
        call().named_value("1/0", "--schema")


def test_an_option_can_be_json() -> None:
    schema = '{"type": "object", "additionalProperties": false}'

    assert call().named_value(schema, "--schema") == {"type": "object", "additionalProperties": False}
    assert call().named_value("{'a': 1}", "--schema") == {"a": 1}


def test_abbreviated_options_mean_the_same_as_whole_ones() -> None:
    line = "--va city=Rome --temp=0.5 {{ city }}"
    arguments, given = magic_line.parse(magic, line, name="%m", namespace={})
    assert (arguments.words, arguments.temperature, given) == (["Rome"], 0.5, {"city": "Rome"})

    arguments, _ = magic_line.parse(magic, "--no-exp {{ nosuch }}", name="%m", namespace={})
    assert (arguments.words, arguments.expand) == (["{{ nosuch }}"], False)


class Shell:
    """A notebook with one variable."""

    user_ns: ClassVar[dict[str, Any]] = {"topic": "global"}


class Magics:
    """Magics as IPython has them, which return their call."""

    shell = Shell()

    @magic_line.options_magic()
    @magic_arguments()
    @argument("words", nargs="*")
    @argument("--out")
    def line(self, call: magic_line.Call) -> magic_line.Call:
        """Do something.

        Example::

            %line
        """
        return call

    @magic_line.options_magic(shell_style=False)
    @magic_arguments()
    @argument("words", nargs="*")
    def prompt(self, call: magic_line.Call) -> magic_line.Call:
        """Ask."""
        return call


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{{ topic }} x", ["global", "x"]),
        ("$topic {topic}", ["global"] * 2),
        ("pre$topic/x", ["preglobal/x"]),
        ("{{ price }} '$price'", ["$5", "$5"]),
        ("costs $5", ["costs", "$5"]),
        ("'$nosuch'", ["$nosuch"]),
    ],
)
def test_all_magics_take_expressions_and_the_shells_own_style(line: str, words: list[str]) -> None:
    price = "$5"
    assert Magics().line(line).arguments.words == words, price


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("$topc", "%line: there is no variable topc for $topc; did you mean topic?"),
        ("{nosuch}", "%line: there is no variable nosuch for {nosuch}; define it first, or quote the text"),
    ],
)
def test_a_variable_that_does_not_exist_is_named(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Magics().line(line)
    assert str(caught.value) == message


def test_local_variables_hide_those_of_the_notebook() -> None:
    topic = "local"
    called = Magics().line("{{ topic }}")
    assert (called.arguments.words, called.variables["topic"]) == (["local"], topic)


def ask_about(topic: str) -> list[str]:
    """Run a line in a comprehension in a nested function, neither of which names the topic."""

    def ask() -> list[str]:
        return [" ".join(Magics().line("{{ number }} {{ topic }}").arguments.words) for number in (1, 2)]

    return ask()


def test_variables_of_the_functions_around_are_seen_and_of_callers_are_not() -> None:
    topic, number = "of the caller", 0
    assert ask_about("outer") == ["1 outer", "2 outer"]

    def ask(word: str) -> list[str]:
        topic = word
        return [Magics().line("{{ topic }}").arguments.words[0] for topic in (topic, "inner")]

    assert ask("word") == ["word", "inner"]
    assert unrelated() == "global", (topic, number)


def unrelated() -> str:
    """Run a line in a function that has no variables."""
    return str(Magics().line("{{ topic }}").arguments.words[0])


def test_a_prompt_keeps_its_dollars_and_single_braces() -> None:
    assert Magics().prompt("$topic {topic} {{ topic }}").arguments.words == ["$topic", "{topic}", "global"]


@pytest.mark.parametrize("line", ["-h", "--help", "x --help", "--out 5 -h"])
def test_asking_for_help_prints_it(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Magics().line(line) is None
    printed = capsys.readouterr().out
    assert printed.startswith("%line [--out OUT] [words ...]\n")
    assert "Example::" in printed


def test_an_answer_can_be_named_in_two_ways_but_not_in_both() -> None:
    assert Magics().line("x << demo").arguments.out == Magics().line("demo --out x").arguments.out == "x"
    assert Magics().prompt("x << demo").arguments.words == ["x", "<<", "demo"]
    with pytest.raises(UsageError, match="%line: two variables, x and y; name one of them"):
        Magics().line("x << demo --out y")
