"""Bodies to rows: JSON, npy, octets, images; limits before memory.

Others ask it for the rows of a body. It never knows HTTP frameworks or tenants.
"""
