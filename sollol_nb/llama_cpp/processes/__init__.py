"""Engine processes on this machine: coordinators and local workers, each under its own supervisor.

* `supervisor.py`: the small program that owns one engine process; runs alone, without this package
* `registry.py`: one small file per running engine; the table that all kernels share
* `process.py`: the handle of an engine process: start or adopt it, hold it, stop it
* `exit_reasons.py`: why an engine ended, read from its log
* `running.py`: all engines of this user: list them, stop them, read their logs
* `machine.py`: usable cores, free ports, who listens
* `traffic.py`: bytes that a process has sent, and the peers that it waits for
"""
