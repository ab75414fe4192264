"""The engines of a router that uses a gateway: the same methods as `OwnEngines`, over HTTP.

In reading order:

- `engines.py`: what the router works with.
- `calls.py`: the methods that a gateway carries out for its notebooks, and the rights that they need.
- `connection.py`: HTTP to a gateway, its key, and its errors.
- `answers.py`: a streamed answer, continued after the gateway was started again.
- `live.py`: the gateway's events, and the live state of its cluster.
- `plain_data.py`: dataclasses and errors as JSON, and back.
"""
