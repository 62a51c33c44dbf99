"""One replica: the story of a request, and what the control plane may ask of it.

Others ask it to serve a request; for a snapshot, pins, receipts. It never knows Ray or FastAPI.
"""
