"""Requests, frames and bytes that nobody would send, at a server that is to survive them all: `make fuzz`."""
