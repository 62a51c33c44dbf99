"""Who is on the device: leases, ledger, victim selection, caps and floors of tenants, waiting for room.

Others ask it for a lease; to pin, unload, erase; for a snapshot. It never knows where bytes come from, nor
refs.
"""
