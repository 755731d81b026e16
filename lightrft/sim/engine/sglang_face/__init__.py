"""The face of SGLang: the part of its surface that trainers use, in front of the fake engine.

Names, signatures, defaults and what is returned are those of SGLang 0.5.23; the words are ours.
"""
