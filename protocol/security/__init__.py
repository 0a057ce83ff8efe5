"""Who may speak, what each may ask for, and how much anybody may cost before he has shown who he is.

Owns roles and rights (rights.py, one table), which key has which role (trust.py, read anew from a directory
of keys), how much a connection may hold (connections.py, sans-I/O), and the thread that keeps both (guard.py:
ZAP, RFC 27, and connections cut). Must not know what a message is for, nor the sockets' owners: ``bus/`` uses
this.

Start with rights.py, then trust.py. Keys themselves are ``bus/curve.py``'s.
"""
