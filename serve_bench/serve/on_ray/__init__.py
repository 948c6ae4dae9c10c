"""The server as a Ray Serve deployment: replicas of one student behind Ray's HTTP proxies."""
