"""From a ref to the version that answers now: tenants' heads, and swaps that are under way.

Others ask it to resolve a ref, and to forget a tenant. It never knows leases.
"""
