"""The steps of a codec, and the bodies of payloads that they make.

Owns rotation (transform.py), levels (quantiser.py), what bits mean (planes.py), coders (pack.py, rans.py,
coder.py) in numpy, and a body of all of them: body.py says in which order, native.py has the same bytes from
C++. Must not know headers nor who asks. Start at body.py.
"""
