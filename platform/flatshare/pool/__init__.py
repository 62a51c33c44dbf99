"""The pool: the Serve deployment, the adapter to Ray's multiplexing, the request router."""
