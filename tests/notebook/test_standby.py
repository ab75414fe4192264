"""`%config Sollol.standby` in a kernel: what a standby takes is said first, and the model runs on meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engines import eventually
from tests.support.kernels import kernel

pytestmark = pytest.mark.engine


def test_the_setting_says_what_a_standby_takes_starts_it_and_ends_it(engine: object, tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path / "state"), SOLLOL_KEEP_ALIVE="30s") as notebook:
        assert notebook.run("%load_ext sollol_nb\n%config Sollol.num_workers = 2").error == []
        assert notebook.run("%sollol_cluster start 4").error == []
        asked = notebook.run("%%sollol demo:sharded --max-tokens 4\nHello!")
        assert asked.error == []
        url = notebook.run("from sollol_nb.notebook import session\nsession.router().coordinator.base_url").text

        assert "standby" not in notebook.run("%sollol_route demo:sharded").stream
        foreseen = notebook.run("%sollol_route demo:sharded -v").stream.splitlines()[-1]
        said = notebook.run("%config Sollol.standby = True").stream
        assert said.startswith("a standby of demo:sharded would take ")
        assert said.strip() == foreseen
        ready = "a standby of demo:sharded is ready: "
        shown = eventually(
            lambda: next(
                (line for line in notebook.run("%sollol_route demo:sharded").stream.splitlines() if ready in line),
                "",
            ),
            "it is ready",
        )
        assert shown.removeprefix(ready) == said.strip().split("would take ")[1], "it takes what was said"
        status = notebook.run("%sollol_cluster --text").stream
        assert "demo:sharded  ○ standby" in status
        assert "held by demo:sharded (standby)" in status

        assert notebook.run("%config Sollol.standby = False").error == []
        now, _, events = notebook.run("%sollol_cluster --text").stream.partition("\nlast events\n")
        assert "standby" not in now
        assert "stopped the standby of demo:sharded" in events
        assert notebook.run("session.router().coordinator.base_url").text == url, "the model runs on"
        notebook.run("%sollol_stop --all")
