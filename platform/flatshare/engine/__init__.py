"""From a request to an answer: quotas, admission, fair queueing, shared passes. No ray, no web framework."""
