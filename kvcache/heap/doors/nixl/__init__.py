"""A door through which KV goes by NIXL (UCX): RDMA where hosts have it, TCP elsewhere.

Who may write, lanes, signals and signs of life go over a connection as at a door of TCP (``tcp/``); KV
alone goes by NIXL. The extra ``microserve[nixl]``. Start at door.py, which says by what fence a late write
is impossible.
"""
