"""Pure decisions for a fleet: which replicas are a model's homes.

Others ask it where a model belongs. It never knows Ray, HTTP or a clock of its own.
"""
