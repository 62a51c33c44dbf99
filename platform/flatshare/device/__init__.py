"""Where models run: what differs between CPU and CUDA, and nothing else does.

Others ask it to bring tensors over, to overwrite them, and what memory there is. It knows no models and no
tenants.
"""
