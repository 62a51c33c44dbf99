"""Residency: which models a replica holds, and for whom. No ray and no web framework in here."""
