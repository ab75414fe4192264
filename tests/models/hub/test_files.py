"""Which files of a repository make up the model that a user names."""

from __future__ import annotations

import pytest

from sollol_nb.errors import ModelNotFoundError
from sollol_nb.models.hub.files import HubFile, HubModel, HubReference, choose_model, is_model, quant_of


def chosen(wanted: str, *names: str) -> HubModel:
    reference = HubReference.parse(f"hf.co/user/repo:{wanted}" if wanted else "hf.co/user/repo")
    return choose_model(reference, [HubFile(name, 10_000_000, f"{at:064x}") for at, name in enumerate(names)])


def names_of(model: HubModel) -> list[str]:
    return [file.name for file in model.files]


@pytest.mark.parametrize(
    ("text", "repository", "wanted"),
    [
        ("hf.co/user/repo", "user/repo", ""),
        ("hf.co/user/repo:latest", "user/repo", ""),
        ("huggingface.co/user/Repo-GGUF:Q5_K_M", "user/Repo-GGUF", "Q5_K_M"),
        ("https://huggingface.co/user/repo", "user/repo", ""),
        ("user/repo:Q8_0", "user/repo", "Q8_0"),
        (" HF.co/u/r.v1:sub.gguf ", "u/r.v1", "sub.gguf"),
    ],
)
def test_a_repository_is_named_as_for_ollama_and_llama_cpp(text: str, repository: str, wanted: str) -> None:
    assert HubReference.parse(text) == HubReference(repository, wanted)


@pytest.mark.parametrize(
    "text", ["", "llama3.2", "hf.co/user", "../../etc", "hf.co/a/b/c", "a--b/c", "u/r\n:q", "/a/b", "u/r/:q"]
)
def test_what_names_no_repository_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"use hf\.co/user/repo or .* `ollama pull`"):
        HubReference.parse(text)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("Llama-3.2-3B-Instruct.q4_0.gguf", "Q4_0"),
        ("Qwen3-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("Q8_0/big-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("BF16/model-00001-of-00002.gguf", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("tiny-llama-1.1b.gguf", "tiny-llama-1.1b"),
        ("f16.gguf", "F16"),
    ],
)
def test_the_quantization_is_read_from_the_file_name(name: str, quant: str) -> None:
    assert quant_of(name) == quant


def test_q4_k_m_is_the_default_and_only_models_count() -> None:
    names = ("m-Q8_0.gguf", "m-IQ4_K_M.gguf", "m-Q4_K_M.gguf", "m.imatrix.gguf", "mtp-m-Q4_K_M.gguf", "README.md")
    assert names_of(chosen("", *names)) == ["m-Q4_K_M.gguf"]
    assert [is_model(name) for name in names] == [True, True, True, False, False, False]
    assert names_of(chosen("q8_0", *names)) == ["m-Q8_0.gguf"]
    assert names_of(chosen("m-Q8_0.gguf", *names)) == ["m-Q8_0.gguf"]
    assert chosen("", "only.gguf").quant == "only"


def test_all_parts_of_a_split_model_belong_to_it_and_none_may_be_missing() -> None:
    parts = [f"Q4_K_M/m-Q4_K_M-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert names_of(chosen("", *reversed(parts), "Q8_0/m-Q8_0-00001-of-00001.gguf")) == parts
    assert names_of(chosen(parts[1].rpartition("/")[2], *parts)) == parts
    with pytest.raises(ModelNotFoundError, match=r"has not all parts .*m-Q4_K_M-00002-of-00003\.gguf is missing"):
        chosen("", parts[0], parts[2])


def test_the_nearest_projector_is_taken_along() -> None:
    names = (
        "a/m-Q4_K_M.gguf",
        "a/mmproj-BF16.gguf",
        "a/mmproj-Q8_0.gguf",
        "mmproj-Q4_0.gguf",
        "b/mmproj-Q4_0.gguf",
    )
    assert names_of(chosen("", *names)) == ["a/m-Q4_K_M.gguf", "a/mmproj-Q8_0.gguf"]
    assert names_of(chosen("", "a/m-Q4_K_M.gguf", *names[3:])) == ["a/m-Q4_K_M.gguf", "mmproj-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("wanted", "names", "message"),
    [
        ("", ("m-Q8_0.gguf", "m-Q2_K.gguf"), "repo has no Q4_K_M; choose one, as in hf.co/user/repo:Q2_K. It has "
         "Q2_K (10 MB), Q8_0 (10 MB)"),
        ("Q5_K_M", ("m-Q8_0.gguf",), "repo has no 'Q5_K_M'; choose one, as in hf.co/user/repo:Q8_0. It has Q8_0"),
        ("", ("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "c-Q2_K.gguf"), "repo has several files of Q4_K_M; choose one, as "
         "in hf.co/user/repo:a-Q4_K_M.gguf. It has a-Q4_K_M.gguf (10 MB), b-Q4_K_M.gguf (10 MB)"),
        ("", ("model.safetensors", "mmproj-F16.gguf"), "repo has no GGUF file; look for"),
    ],
)  # fmt: skip
def test_where_nothing_fits_the_error_lists_what_there_is(
    wanted: str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        chosen(wanted, *names)
    assert message in str(caught.value)


def test_names_of_a_server_are_bounded_in_messages() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        chosen("Q9", *(f"{at}\x1b[31m{'x' * 500}\n.gguf" for at in range(300)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 6000
    assert str(caught.value).endswith(" and 260 more")
