"""Asynchronous requests: what was taken is kept in the registry's store until it is answered, once.

Owns the record of a task, the queue of those that wait, and the story of one run. Offers them to the routes
and to the consumer. Never knows HTTP, Ray or a model: who runs a request is passed in.
"""
