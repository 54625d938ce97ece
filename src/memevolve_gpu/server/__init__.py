"""A store over HTTP: the server, its keys, its metrics, and the client ``RemoteStore``.

Needs the extra ``server``; the rest of the package imports nothing of it. ``app.create_app`` makes the application,
``client.RemoteStore`` speaks to it, ``metrics.register`` gives the figures of an embedded store to Prometheus.
"""
