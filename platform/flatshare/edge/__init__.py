"""The edge: HAProxy in front of the replicas, configured from what Serve says is running."""
