"""The plug-in that ships: both architectures, digits, training, handwritings.

Nobody imports it but the demo, the command line's ``train`` and ``bench``, and the tests: the platform finds
its architectures by entry point. It never knows the platform's insides.
"""
