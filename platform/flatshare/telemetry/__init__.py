"""Traces: spans of sampled requests (``tracing``), and where they go (``exporting``).

Metrics are ``control/metrics.py``, logs ``process_log.py`` and ``access_log.py``.
"""
