"""How bytes come: host tier, fetch, hashing, proof, device, building a model; what threads do.

Others ask it for a model of a version, ready to place, and to overwrite tensors. It never knows who may be
evicted.
"""
