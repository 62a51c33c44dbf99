"""flatshare: many customers, one pool of GPU replicas, on Ray Serve."""
