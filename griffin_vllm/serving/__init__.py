"""The vLLM plugin: serve a target with a GRIFFIN draft head."""
