"""Asynchronous requests: what was taken is kept in the registry's store until it is answered, once.

Owns the record of a task, the queue of waiting tasks, and the steps of one run. Offers them to the routes and
to the consumer. It does not know HTTP, Ray or a model: the function that runs a request is passed in.
"""
