"""Composed deployments: a pipeline's step runs before the model, in Serve deployments of its own.

Owns what a step is and its Serve shell. Offers them to ``local``, which deploys them. Never knows who calls,
or which model answers: a replica of the pool asks the step, with a request that it has let in.
"""
