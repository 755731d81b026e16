"""The face of vLLM: the part of its surface that trainers use, in front of the fake engine.

Names, signatures, defaults and kinds of errors are those of vLLM 0.32; the words are ours.
"""
