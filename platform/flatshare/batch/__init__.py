"""Offline: many rows at once, by Ray Data's actors, on the same core as a replica of the pool.

Owns inputs, the order of the work, and what is written. Offers ``Batch`` and the class that a notebook
maps over a dataset. Never knows HTTP or Serve; what it imports beyond the core (pyarrow, ray.data) is an
extra.
"""
