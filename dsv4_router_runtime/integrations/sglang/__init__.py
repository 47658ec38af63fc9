"""Serve the routers of DeepSeek-V4 layers in SGLang 0.5.23; see SGLANG.md beside this folder."""
