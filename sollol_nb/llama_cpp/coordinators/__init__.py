"""The coordinators: llama-servers that each run one model, over workers or on this machine alone.

* `pool.py`: all coordinators of a router; where the router asks for one.
* `running.py`: the table of what runs, the watch over it, and the end of idle ones.
* `start.py`: adopt a running coordinator or launch a new one.
* `adopting.py`: one that another kernel has started, if it is as asked or there is nothing better.
* `standby.py`: a second coordinator of a model, kept ready to take over.
* `seeding.py`: caches of far workers filled from their machine's own copy of the model, before a load.
* `planning.py`: which workers a starting one gets, and how many layers each.
* `coordinator.py`: one llama-server: launched, adopted, stopped.
* `streams.py`: the answers that it streams, and the watch over their silence.
* `readiness.py`: from its start until it can be used.
* `cached_weights.py`: the workers' caches of weights around a load, and how much was sent.
* `load_progress.py`: how much of its model it has loaded.
* `placement.py`: where it placed the layers, according to its log.
* `pace.py`: its usual time for a token, by which its silence is judged.
* `measurements.py`: the measured time of tokens on each layout, from which token times are predicted.
* `replanning.py`: what a better layout would bring, and the move there.
* `waits.py`: how long a coordinator waits for each of its workers.
* `calibration_models.py`: small generated models that measure workers.
* `calibrator.py`: measures how fast free workers are, with throw-away coordinators.
* `speculation.py`: whether a coordinator drafts tokens, how, and how many at once.
* `drafting.py`: chooses what a starting coordinator drafts.
* `draft_memory.py`: what drafts have brought, kept in a file.
* `settings.py`: how coordinators are started, what one runs, and the flags of llama-server for it.
"""
