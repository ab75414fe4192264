"""The llama.cpp backend: models whose layers are spread over RPC workers, or that run on this machine alone.

* `engine/`: llama.cpp's programs, found or built.
* `processes/`: engine processes under their supervisors, and the registry of what runs.
* `links/`: processes through which workers of other machines are reached.
* `workers/`: the RPC workers, and the state of each.
* `weights/`: what workers keep of weights, so that these are sent once.
* `answers/`: answers that survive their engine.
* `contexts/`: contexts of conversations that outlive their engine.
* `coordinators/`: llama-servers, each of which runs one plan of one model.
"""
