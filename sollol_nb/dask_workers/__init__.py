"""The machines of a Dask cluster as workers.

* `start.py`: `workers_from_dask`
* `plugin.py`: what each Dask worker runs; loaded there, and here when it is used, since it needs Dask
"""
