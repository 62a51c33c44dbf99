"""A fleet in virtual time: the decisions of ``placement/`` and the policies of ``residency/``, on traces.

It says how many slots and replicas a hit rate needs (``flatshare plan``), and simulates what no test machine
has: 100,000 tenants on 1,000 replicas (``scripts/simulate``).
"""
