"""The hosts of a configuration of ssh, for completion: what can be read is used, and nothing fails."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.settings.ssh_hosts import configured_hosts


def test_hosts_have_a_line_of_their_own(tmp_path: Path) -> None:
    config = tmp_path / "config"
    included = tmp_path / "more.conf"
    included.write_text("Host later\nHost gpu1\n")
    config.write_text(
        '# Host comment\nhost gpu1 "gpu 2"\n  HostName 10.0.0.1\nHOST=box\nHost *.lab web? !no -x\n'
        f"Match host other\nInclude {tmp_path}/*.conf {tmp_path}/none\nInclude {config}\n"
    )
    assert configured_hosts(config) == ["gpu1", "gpu", "2", "box", "later"]
    assert configured_hosts(tmp_path / "none") == []
    config.write_bytes(b"Host \xff\x00\nHost ok\n")
    assert configured_hosts(config)[-1] == "ok"
