"""How weights get here: host tier, fetching, hashing, proof, device, building a model; what threads do.

Other packages call it for a model of a version, ready to place, and to overwrite tensors. It does not know
which models may be evicted.
"""
