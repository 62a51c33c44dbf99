"""The edge: HAProxy in front of the replicas' doors, which it asks them for, and of the control plane."""
