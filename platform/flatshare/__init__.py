"""flatshare."""
