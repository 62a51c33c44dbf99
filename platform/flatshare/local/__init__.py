"""A whole platform on this machine: what ``flatshare up``, ``status`` and ``down`` do."""
