"""The control plane: tenants, versions, aliases and the fleet, as a Serve application under ``/admin``."""
