"""The version, also checked between ranks before training starts."""

VERSION = "0.1.0"
