"""Ways to call the router from a model or an engine; each module is imported by itself."""
