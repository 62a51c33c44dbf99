"""What a network is: architecture, stages, probe, conversion; found by name, through entry points.

Other packages call it for an architecture. It knows no particular network, and nothing of HTTP or Ray.
"""
