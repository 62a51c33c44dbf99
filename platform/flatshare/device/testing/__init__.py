"""For tests, ours and those of whoever writes another device: a simulated CUDA, and what every device
promises.
"""
