"""Links: make the workers of other machines reachable at endpoints on this machine's loopback.

llama.cpp connects to workers by plain TCP without a password. A link is a process that carries this traffic
through something safe, and restarts what ends on the other side. It is an engine process like a worker: under a
supervisor, in the registry, shared by all kernels of this user, with leases and keep_alive. Its registry entry has
the endpoints.

* `link.py`: start a link, and what its registry entry says
* `failures.py`: why links have failed, for all kernels
* `program.py`: the process of a link: its report, and copying between connections
* `ssh_errors.py`: what the messages of the `ssh` program mean, and what to do
* `ssh_session.py`: a script that runs on another machine; `common.sh` is what all of them share
* `ssh_shell.py`: run scripts on another machine, and forward ports, over one connection of that program
* `remote_engine.py`: the engine on such a machine: found, shipped or built
* `remote_facts.py`: what such a machine has, and which engines fit it
* `remote_server.py`: llama-server there, found or shipped
* `seeding.py`: caches of workers there filled from the model's file that the machine has itself; `seed.sh` does it
* `verifying.py`: before a load, the caches of workers on the other side are verified
* `ssh.py`: a link to the workers of one machine over SSH; `agent.sh` runs them there
* `join_link.py`: join links, and how both sides of one talk
* `memberships.py`: who may join: the file of invitations and of those who joined
* `invitations.py`: the link through which all workers come that have joined
* `joining.py`: the worker's side of a join link
* `relay.py`: a link to one worker at an address that llama.cpp cannot connect to (IPv6)
"""
