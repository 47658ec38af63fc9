"""The ladder of evidence: whether an artifact is correct, without a GPU of its architecture.

README.md beside this file describes the rungs and what they do not prove.
"""
