"""From a ref to the version that answers now: tenants' heads, and swaps that are under way.

Other packages call it to resolve a ref, and to forget a tenant. It knows nothing of leases.
"""
