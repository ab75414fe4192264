"""What runs underneath: the I/O loop, events, order of requests, HTTP and SQLite; knows nothing of models.

- `io_loop.py`: the one thread with one event loop that carries all I/O, and blocking twins of async methods
- `callers.py`: functions of the user, which run where they cannot hold up the I/O loop
- `events.py`: all kinds of events, and the bus that publishes them
- `gate.py`: which request may use a server next
- `priority.py`: the ten levels of priority, and those of roles and tasks
- `amounts.py`: numbers and durations as callers give them
- `http_client.py`: JSON over HTTP
- `download.py`: large files over HTTP, resumed
- `exchange.py`: requests to a server on this machine, over one connection
- `sqlite_file.py`: SQLite files that several kernels use
- `process_identity.py`: which process this is, and whether another one still runs
- `private_files.py`: files and folders of this user alone
- `progress_bars.py`: progress bars
"""
