"""Which models are on the device: leases, ledger, victim selection, tenants' caps and floors, room.

Other packages call it for a lease, to pin, unload or erase, and for a snapshot. It knows neither where bytes
come from nor refs.
"""
