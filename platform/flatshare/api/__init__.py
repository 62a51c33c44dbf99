"""The data plane's shell: bodies in, replies out, errors to statuses.."""
