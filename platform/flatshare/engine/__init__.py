"""From a lease to logits: quotas, admission, fair queueing, shared passes.

Others ask it for the logits of rows under a lease. It never knows refs or HTTP.
"""
