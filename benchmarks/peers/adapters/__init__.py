"""One file for each peer, each a few dozen lines behind :class:`peers.protocol.Peer`."""
