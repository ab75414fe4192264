"""Contexts that outlive their engine: the KV cache of a conversation, saved as a file, restored on another engine.

llama-server writes what a slot holds to a file and reads it again, also into a server whose layers are spread
over other workers. So a conversation that was processed once is not processed again after its coordinator has
ended: only what is new since.

* `keeper.py`: when a context is saved, and what happens before and after a request.
* `restoring.py`: which saved context is brought into a slot before a request.
* `actions.py`: what the engine is asked to do with a slot, and what that costs.
* `visit.py`: a request, as the keeper sees it.
* `slots.py`: what each slot of a coordinator holds, and which slot a request shall use.
* `store.py`: the saved contexts of this user, a folder of files.
"""
