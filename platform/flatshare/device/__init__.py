"""Where models run: this package has all that differs between CPU and CUDA, and nothing elsewhere differs.

Other packages call it to bring tensors over, to overwrite them, and to ask what memory there is. It knows no
models and no tenants.
"""
