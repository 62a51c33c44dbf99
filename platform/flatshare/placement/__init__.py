"""Pure decisions for a fleet: which replicas are a model's homes.

Other packages ask it where a model belongs. It knows nothing of Ray or HTTP, and has no clock of its own.
"""
