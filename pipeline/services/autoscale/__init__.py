"""As many runners on this machine as there is work."""
