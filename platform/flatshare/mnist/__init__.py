"""The plug-in that ships: both architectures, digits, training, handwritings.

Only the demo, the command line's ``train`` and ``bench``, and the tests import it: the platform finds its
architectures by entry point. It knows nothing of the platform's internals.
"""
