"""From a lease to logits: quotas, admission, fair queueing, shared passes.

Other packages call it for the logits of rows under a lease. It knows nothing of refs or HTTP.
"""
