"""Offline: Ray Data's actors label many rows at once, with the same core code as a replica of the pool.

It owns inputs, the order of the work, and what is written. It offers ``Batch`` and the class that a notebook
maps over a dataset. It knows nothing of HTTP or Serve; what it imports beyond the core (pyarrow, ray.data) is
an extra.
"""
