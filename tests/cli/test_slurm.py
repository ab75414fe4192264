"""`sollol-nb slurm`: the script runs (with a stand-in for srun), its workers join, and end with the job."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sollol_nb.cli.main import main
from sollol_nb.cli.slurm import LINKS, Job, job_script
from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.settings import config
from sollol_nb.sync_wrapper import HybridRouter
from tests.support import engines
from tests.support.engines import QUESTION, all_end, arguments_of, eventually, posix_only, with_variable

pytestmark = posix_only

MARK = "SOLLOL_TEST_SLURM"
SRUN = Path(engines.__file__).with_name("srun")


def test_the_script_asks_for_what_was_given() -> None:
    script = job_script(
        Job(nodes=4, partition="gpu", time_limit="2:00:00", gpus=2, threads=8, options=["--account=physics"]),
        Path("/home/a b/x.link"),
    )
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert asked[1:] == [
        *("--nodes=4", "--ntasks-per-node=1", "--partition=gpu", "--time=2:00:00", "--gpus-per-node=2"),
        *("--cpus-per-task=8", "--account=physics"),
    ]
    (step,) = (line for line in script.splitlines() if "srun" in line)
    assert {"--ntasks=4", "--cpus-per-task=8"} <= set(shlex.split(step.partition(" sh -c")[0]))
    assert "link='/home/a b/x.link'\n" in script


@pytest.mark.parametrize(
    "given",
    [
        {"nodes": 0},
        {"nodes": 65},
        {"threads": 0},
        {"gpus": -1},
        {"partition": "gpu\n#SBATCH --uid=0"},
        {"time_limit": "1 day"},
        {"options": ["echo hello"]},
        {"options": ["--comment=a\nrm -r /"]},
    ],
    ids=str,
)
def test_what_cannot_be_in_a_job_script_is_refused_in_one_line(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Job(**{"nodes": 2, **given})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.engine
def test_the_nodes_of_a_job_answer_together_and_end_with_it(
    engine: Engine, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    script = tmp_path / "job.sh"
    arguments = ["--nodes", "2", "--threads", "1", "--host", "127.0.0.1", "-o", str(script), "--", "--account=x"]
    assert main(["slurm", *arguments]) == 0
    assert "2 nodes may join until" in capfd.readouterr().err
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    (link,) = (config.state_dir() / LINKS).iterdir()
    assert stat.S_IMODE(link.stat().st_mode) == 0o600
    assert link.read_text().strip() not in script.read_text()

    programs = tmp_path / "bin"
    programs.mkdir()
    shutil.copy(SRUN, programs / "srun")
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    with (
        subprocess.Popen(["sh", script], env={**os.environ, "PATH": path}, start_new_session=True) as job,
        HybridRouter(rpc_backends=["invitations"], num_rpc_backends=2) as router,
    ):
        try:
            eventually(
                lambda: [worker.state for worker in router.check_workers()] == ["free", "free"],
                "both nodes have joined",
            )
            answer = router.route_request("demo:sharded", QUESTION, temperature=0)
            assert "worker" in answer["message"]["content"]
            assert len(router.coordinator.rpc_backends) == 2
            assert not router.invitations().open, "each node has used it once"
            marked = with_variable(MARK, str(tmp_path))
            nodes = []
            for process in marked:
                with suppress(psutil.NoSuchProcess):  # it may end at any moment
                    nodes += [process] if "SLURM_PROCID" in process.environ() else []
            secret = link.read_text().strip()
            assert not [process for process in marked if secret in " ".join(arguments_of(process))]
        finally:
            job.terminate()
            job.wait(30)
        all_end(nodes)
        eventually(lambda: not router.invitations().joined, "they have left")
