"""Turns bodies into rows: JSON, npy, octets, images; checks limits before it spends memory.

Other packages call it for the rows of a body. It knows nothing of HTTP frameworks or tenants.
"""
