"""For our tests, and for those of an author of another device: a simulated CUDA, and what every device
promises.
"""
