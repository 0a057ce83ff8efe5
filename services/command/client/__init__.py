"""A client of any OpenAI-compatible server, for the commands that are one: chat/ and bench/.

Owns where the server is (flags.py, endpoint.py), HTTP/1.1 with connections that are kept (http.py), bytes to
events (sse.py) and events to what is read of them (chunk.py). Knows our gateway by two things only: the mesh
of a directory, and the headers ``x-microserve-*``. Must not print. Start with endpoint.py, then http.py.
"""
