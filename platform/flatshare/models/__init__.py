"""What a network is: architecture, stages, probe, conversion; found by name, through entry points.

Others ask it for an architecture. It never knows any one network, HTTP or Ray.
"""
