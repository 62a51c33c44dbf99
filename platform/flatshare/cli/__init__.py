"""The command line. Registry verbs work on the light install; serving verbs say what they need."""
