"""Somebody who may publish on the broker attacks a running daemon, in a network and a mount namespace of its own."""
