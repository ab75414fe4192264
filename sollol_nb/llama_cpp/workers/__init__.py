"""RPC workers: find them, start them on this machine, follow their states, choose among them.

* `probe.py`: the RPC protocol's bytes: ask an endpoint whether it is a free worker, and for its memory
* `calibrations.py`: how fast workers are, as measured and kept
* `cached_units.py`: what workers have cached of models, as remembered
* `status.py`: one worker as it was seen last
* `identities.py`: which endpoints are names of one worker
* `losses.py`: how often each was lost lately
* `own_devices.py`: the CPU and GPUs of this machine, which need no worker
* `local.py`: start a worker process on this machine
* `local_workers.py`: the workers on this machine that a router started or shares
* `link_states.py`: one link as a router knows it
* `links.py`: the links to other machines that a router uses
* `invited.py`: invitations for workers that dial in
* `lent.py`: the workers that `sollol-nb worker` runs for other machines
* `workers.py`: all workers that a router may use
* `scan.py`: the addresses of a private network that accept connections on the workers' usual ports
* `announcements.py`: announce a worker in the local network (mDNS), and find those that are announced
* `ssh_hosts.py`: what hosts that are reached through ssh have
* `discovery.py`: workers that could be used, each with where it was found
* `choice.py`: which free workers get a model, and why none can be used
"""
