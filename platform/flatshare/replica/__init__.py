"""One replica: how a request is served, and what the control plane may ask of it.

Other packages call it to serve a request, and for a snapshot, pins and receipts. It knows nothing of Ray or
FastAPI.
"""
