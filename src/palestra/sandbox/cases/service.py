"""The service: placeholders until it is there."""
