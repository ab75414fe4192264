"""Contexts that outlive their engine: the KV cache of a conversation, saved as a file, restored on another engine.

llama-server writes what a slot holds to a file and reads it again, also into a server whose layers are spread
over other workers. So a conversation that was processed once is not processed again after its coordinator has
ended: only what is new since.

* `store.py`: the saved contexts of this user, a folder of files.
* `slots.py`: what each slot of a coordinator holds, and which slot a request shall use.
* `keeper.py`: when a context is saved, and when one is restored before a request.
"""
