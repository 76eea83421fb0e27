"""The response cache: answers to equal requests of one tenant, and one call for all of them.

A cache only ever saves work: a broken or slow one answers nothing and raises nothing.
"""
