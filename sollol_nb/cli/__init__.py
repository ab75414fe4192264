"""The `sollol-nb` command.

* `main.py`: its subcommands
* `doctor.py`: what is installed on this machine, what is missing, and how to fix it
* `worker.py`: workers of this machine for others
* `inviting.py`: invitations for workers that dial in
* `calibrate.py`: the workers of this user, measured
* `slurm.py`: a job script whose nodes become workers of this machine
* `status.py`: the cluster of this user, seen from outside of any notebook
* `contexts.py`: the saved contexts of conversations
* `weights.py`: what workers of this machine keep of models
* `pulling.py`: models from the Hugging Face Hub
* `discover.py`: workers that could be used
"""
