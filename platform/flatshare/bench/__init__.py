"""Load against a running platform: what it costs, and whether the answers are right."""
