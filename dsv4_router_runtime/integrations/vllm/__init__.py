"""Serve the routers of DeepSeek-V4 models in vLLM 0.33; see VLLM.md beside this folder."""
