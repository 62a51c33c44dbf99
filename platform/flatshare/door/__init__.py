"""The replica's own HTTP listener: one hop from the edge, hot routes answered in the parser's callbacks.

Others ask it to start and stop, and for its address. It never knows Ray.
"""
