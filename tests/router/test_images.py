"""Images reach models that read them, and words those that do not: on workers, in Ollama, through a gateway, and
from a cell. A real Ollama makes the models, one of them with a vision projector; real workers run them, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.sync_wrapper import HybridRouter
from sollol_nb.text.insertions import Insertions
from tests.support.gateway import own_gateway
from tests.support.gguf_files import write_llama, write_projector
from tests.support.go_templates import CHATML
from tests.support.kernels import ONE_THREAD, notebook_kernel
from tests.support.ollama_server import OllamaServer

pytestmark = [pytest.mark.engine, pytest.mark.ollama]

GREEDY = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1")
IMAGE_TOKENS = 4
"""Of an image, for the projector of these tests."""
SEEING, BLIND = "seeing:70b", "blind:70b"


@pytest.fixture(scope="module")
def server(scratch_ollama: OllamaServer, tmp_path_factory: pytest.TempPathFactory) -> OllamaServer:
    """An Ollama with a model that reads images, and one that does not."""
    folder = tmp_path_factory.mktemp("models")
    model, projector = write_llama(folder / "model.gguf"), write_projector(folder / "projector.gguf")
    scratch_ollama.create(SEEING, model, CHATML, f"FROM {projector}", *GREEDY)
    scratch_ollama.create(BLIND, DEMO_MODEL_PATH, CHATML, *GREEDY)
    return scratch_ollama


@pytest.fixture(scope="module")
def variables(server: OllamaServer) -> dict[str, str]:
    """For a process that uses this Ollama, its storage, and one worker started here."""
    return {
        "OLLAMA_HOST": server.base_url,
        "OLLAMA_MODELS": str(server.models_folder),
        "SOLLOL_AUTO_SETUP": "1",
        "SOLLOL_NUM_WORKERS": "1",
    }


@pytest.fixture(scope="module", params=["here", "gateway"])
def router(
    request: pytest.FixtureRequest,
    server: OllamaServer,
    variables: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HybridRouter]:
    if request.param == "gateway":
        with (
            own_gateway(tmp_path_factory.mktemp("gateway"), **ONE_THREAD, **variables) as running,
            HybridRouter(gateway=running.url) as remote,
        ):
            yield remote
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_MODELS", str(server.models_folder))
        with HybridRouter(
            OllamaPool([server.base_url]),
            auto_setup_rpc=True,
            auto_discover_rpc=False,
            num_rpc_backends=1,
            rpc_port=51272,  # its worker outlives it, and other tests want the usual port
        ) as own:
            yield own


def asking_about(*values: object) -> dict[str, Any]:
    """The message of a cell that inserts these values."""
    insertions = Insertions()
    text = "What is it? " + " ".join(map(insertions.text_of, values))
    content, images, without_images = insertions.sent(text)
    return {"role": "user", "content": content, "images": images, "without_images": without_images}


RED, WHITE = (PIL.Image.new("RGB", (56, 56), colour) for colour in ("red", "white"))


@pytest.mark.parametrize("backend", ["sharded", "ollama"])
def test_a_model_that_reads_images_gets_them(router: HybridRouter, backend: str) -> None:
    def asked(message: dict[str, Any]) -> Any:
        return router.route_request(SEEING, [message], backend=backend, max_tokens=8)

    red, white = asked(asking_about(RED)), asked(asking_about(WHITE))
    text_only = asked({"role": "user", "content": asking_about(RED)["content"]})

    assert red["prompt_eval_count"] >= text_only["prompt_eval_count"] + IMAGE_TOKENS
    assert red["message"]["content"] != white["message"]["content"]
    assert red["_routing"]["note"] == ""


@pytest.mark.parametrize("backend", ["sharded", "ollama"])
def test_a_model_that_reads_none_gets_words_and_the_answer_says_so(router: HybridRouter, backend: str) -> None:
    message = asking_about(RED, WHITE)
    answer = router.route_request(BLIND, [message], backend=backend, max_tokens=8, deterministic=False)
    in_words = router.route_request(BLIND, message["without_images"], backend=backend, max_tokens=8)

    assert answer["_routing"]["note"] == f"2 images not sent: {BLIND} reads none"
    assert answer["prompt_eval_count"] == in_words["prompt_eval_count"]
    assert answer["message"]["content"] == in_words["message"]["content"]
    assert router.count_tokens(BLIND, [message], backend=backend) == router.count_tokens(
        BLIND, message["without_images"], backend=backend
    )


def test_a_cell_sends_images_of_the_notebook(variables: dict[str, str], tmp_path: Path) -> None:
    with notebook_kernel(tmp_path, **variables) as notebook:
        notebook.run(
            "import io, PIL.Image, matplotlib; matplotlib.use('agg')\n"
            "import matplotlib.pyplot as plt\n"
            "red = PIL.Image.new('RGB', (56, 56), 'red')\n"
            "buffer = io.BytesIO(); red.save(buffer, 'PNG'); data = buffer.getvalue()\n"
            "figure, axes = plt.subplots(); axes.plot([1, 3]); axes.set_title('rain')\n"
            "class Chart:\n"
            "    async def _ai_repr_(self, **hints):\n"
            "        return {'text/plain': 'a chart of wind', 'image/png': data}\n"
        )
        seen = notebook.run(
            f"%%sollol {SEEING} --backend sharded --max-tokens 8 --out seen --chat pictures\n"
            "Compare {{ red }}, {{ data }}, {{ figure }} and {{ Chart() }}"
        )
        assert seen.error == []
        assert "not sent" not in seen.text
        sent = "_messages[0]['content'], len(_messages[0]['images'])"
        notebook.run("_messages = %sollol_chat pictures --messages")
        assert notebook.value(sent) == repr(
            ("Compare [image 1], [image 2], [image 3] and [image 4]\na chart of wind", 4)
        )
        assert int(notebook.value("seen['prompt_eval_count']")) >= 4 * IMAGE_TOKENS

        for cell in (
            f"%%sollol {BLIND} --backend sharded --max-tokens 8 --chat pictures\nAnd {{{{ axes }}}}?",
            f"%sollol {BLIND} --backend sharded --max-tokens 8 --chat pictures 'And {{{{ figure }}}}?'",
        ):
            blind = notebook.run(cell)
            assert blind.error == []
            assert f"images not sent: {BLIND} reads none" in blind.text
        notebook.run("_messages = %sollol_chat pictures --messages")
        assert notebook.value("'rain' in _messages[2]['without_images']") == "True"
